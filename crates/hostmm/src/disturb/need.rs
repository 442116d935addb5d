// SPDX-License-Identifier: MIT OR Apache-2.0
//! Does this machine offer what an event needs? Cheap questions that change nothing.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Arena, Need};
use crate::capability::Capability;

impl Need {
    /// Its name in a `skipped:` line: the capability's where there is one, else a word of its own.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Need::PageFrames => Capability::Pfn.name(),
            Need::Ksm => Capability::Ksm.name(),
            Need::Swap => Capability::Zram.name(),
            Need::Uprobe => Capability::Uprobes.name(),
            Need::Compaction => Capability::Compaction.name(),
            Need::Thp => Capability::Thp.name(),
            Need::Guard => Capability::GuardPages.name(),
            Need::DiskFile => "disk_file",
            Need::SysV => "sysv_shm",
            Need::Damon => "damon",
            Need::ProcessMadvise => "process_madvise",
        }
    }

    /// Why an event with this need cannot run here; `None` if it can as far as one can tell without trying.
    #[must_use]
    pub fn missing(self, arena: &Arena) -> Option<String> {
        match self {
            Need::PageFrames => page_frames(),
            Need::Ksm => writable("/sys/kernel/mm/ksm/run"),
            Need::Swap => exists("/sys/class/zram-control/hot_add").or_else(root),
            Need::Uprobe => exists("/sys/bus/event_source/devices/uprobe/type").or_else(root),
            Need::Compaction => writable("/proc/sys/vm/compact_memory"),
            Need::Thp => match fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled") {
                Ok(modes) if !modes.contains("[never]") => None,
                _ => Some("transparent huge pages are off: set enabled to madvise".to_owned()),
            },
            Need::DiskFile => not_on_disk(arena.dir()),
            Need::SysV => exists("/proc/sysvipc/shm"),
            Need::Damon => (!super::reclaim::damon_ages_memory())
                .then(|| "no DAMON thread watches physical memory on this machine".to_owned()),
            Need::Guard | Need::ProcessMadvise => older_than(6, 13),
        }
    }
}

fn exists(path: &str) -> Option<String> {
    (!Path::new(path).exists()).then(|| format!("no {path}: this kernel was built without it"))
}

fn writable(path: &str) -> Option<String> {
    File::options().write(true).open(path).err().map(|e| format!("{path}: {e}"))
}

fn root() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "needs root".to_owned())
}

fn page_frames() -> Option<String> {
    let probe = 0_u64;
    let mut entry = [0; 8];
    let at = (&raw const probe) as u64 / mmu_notifier::PAGE_SIZE * 8;
    match File::open("/proc/self/pagemap").and_then(|f| f.read_exact_at(&mut entry, at)) {
        Ok(()) if u64::from_ne_bytes(entry) & ((1 << 55) - 1) != 0 => None,
        Ok(()) => Some("/proc/self/pagemap hides page frame numbers: needs CAP_SYS_ADMIN".to_owned()),
        Err(e) => Some(format!("/proc/self/pagemap: {e}")),
    }
}

fn not_on_disk(dir: &Path) -> Option<String> {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    const OVERLAYFS_MAGIC: u64 = 0x794c_7630;
    match rustix::fs::statfs(dir) {
        Ok(fs) if ![TMPFS_MAGIC, OVERLAYFS_MAGIC].contains(&fs.f_type.cast_unsigned()) => None,
        Ok(_) => Some(format!("{} is on no disk file system", dir.display())),
        Err(e) => Some(format!("{}: {e}", dir.display())),
    }
}

fn older_than(major: u32, minor: u32) -> Option<String> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (version < (major, minor)).then(|| format!("Linux {release} is older than {major}.{minor}"))
}
