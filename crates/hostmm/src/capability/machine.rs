// SPDX-License-Identifier: MIT OR Apache-2.0
//! Settings and triggers of the machine with which memory is changed underneath a device.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::process::{self, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_open};

use super::{Finding, UNEXPECTED};
use crate::sys::probe;

const BE_ROOT: &str = "be root, in a container with that part of /sys and /proc writable";

fn text(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

/// There with `detail`, if the file may be written.
fn settable(path: &CStr, detail: String) -> Finding {
    match probe::writable(path) {
        Ok(()) => Finding::there(detail),
        Err(e) => Finding::missing(format!("{}: {e}", path.to_string_lossy()), BE_ROOT),
    }
}

pub(super) fn ksm() -> Finding {
    let run = match text("/sys/kernel/mm/ksm/run") {
        Ok(run) => run,
        Err(e) => {
            return Finding::missing(
                format!("/sys/kernel/mm/ksm/run: {e}"),
                "kernel: CONFIG_KSM; mount /sys",
            );
        }
    };
    match probe::writable(c"/sys/kernel/mm/ksm/run") {
        Ok(()) => Finding::there(format!("run={run}")),
        Err(e) if run == "1" => Finding::partial(format!("it runs, but cannot be set: {e}"), BE_ROOT),
        Err(e) => Finding::missing(format!("it does not run, and cannot be set: {e}"), BE_ROOT),
    }
}

pub(super) fn swap() -> Finding {
    match text("/proc/swaps") {
        Ok(swaps) if swaps.lines().count() > 1 => {
            let areas: Vec<&str> =
                swaps.lines().skip(1).filter_map(|l| l.split_whitespace().next()).collect();
            Finding::there(areas.join(" "))
        }
        Ok(_) => Finding::missing("no swap area is active", "swapon a disk or, as root, a zram device"),
        Err(e) => Finding::missing(format!("/proc/swaps: {e}"), "kernel: CONFIG_SWAP; mount /proc"),
    }
}

pub(super) fn zram() -> Finding {
    // To read from it would add a device; to open it does not.
    let hot_add = c"/sys/class/zram-control/hot_add";
    Finding::of(probe::readable(hot_add), &hot_add.to_string_lossy(), |errno| match errno {
        libc::ENOENT => "load the module zram (kernel: CONFIG_ZRAM)",
        _ => BE_ROOT,
    })
}

pub(super) fn hugetlb() -> Finding {
    settable(c"/proc/sys/vm/nr_hugepages", String::new())
}

pub(super) fn sysv() -> Finding {
    match fs::metadata("/proc/sysvipc/shm") {
        Ok(_) => Finding::there(""),
        Err(e) => Finding::missing(format!("/proc/sysvipc/shm: {e}"), "kernel: CONFIG_SYSVIPC; mount /proc"),
    }
}

pub(super) fn damon() -> Finding {
    let dir = "/sys/kernel/mm/damon/admin/kdamonds";
    let is = |file: String, value: &str| text(&file).is_ok_and(|text| text == value);
    let number = match text(&format!("{dir}/nr_kdamonds")).map(|n| n.parse().unwrap_or(0_u32)) {
        Ok(number) => number,
        Err(e) => {
            return Finding::missing(
                format!("{dir}: {e}"),
                "be root, on a kernel with CONFIG_DAMON_PADDR and CONFIG_DAMON_SYSFS",
            );
        }
    };
    let watches = (0..number).find(|n| {
        is(format!("{dir}/{n}/state"), "on") && is(format!("{dir}/{n}/contexts/0/operations"), "paddr")
    });
    match watches {
        Some(n) => Finding::there(format!("kdamond {n}")),
        None => Finding::missing(
            "no DAMON thread watches physical memory",
            "start one by /sys/kernel/mm/damon/admin, or DAMON_RECLAIM or DAMON_LRU_SORT at boot",
        ),
    }
}

pub(super) fn disk_file(dir: &Path) -> Finding {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    const RAMFS_MAGIC: u64 = 0x8584_58f6;
    const OVERLAYFS_MAGIC: u64 = 0x794c_7630;
    let how = "set TMPDIR to a directory on ext4, xfs or btrfs";
    let shown = dir.display();
    match rustix::fs::statfs(dir) {
        Ok(fs) if [TMPFS_MAGIC, RAMFS_MAGIC, OVERLAYFS_MAGIC].contains(&fs.f_type.cast_unsigned()) => {
            Finding::missing(format!("{shown} is on no disk file system"), how)
        }
        Ok(_) => Finding::there(shown.to_string()),
        Err(e) => Finding::missing(format!("{shown}: {e}"), how),
    }
}

pub(super) fn uprobes() -> Finding {
    const TYPE: &str = "/sys/bus/event_source/devices/uprobe/type";
    let no_pmu = "use Linux 4.17 or later with CONFIG_UPROBE_EVENTS and CONFIG_PERF_EVENTS; mount /sys";
    match text(TYPE).map(|id| id.parse::<u32>()) {
        Ok(Ok(pmu)) => Finding::of(probe::uprobe(pmu), "perf_event_open", |errno| match errno {
            libc::EPERM | libc::EACCES => "give CAP_PERFMON (Linux 5.8; before: CAP_SYS_ADMIN)",
            _ => UNEXPECTED,
        }),
        Ok(Err(e)) => Finding::missing(format!("{TYPE}: {e}"), no_pmu),
        Err(e) => Finding::missing(format!("{TYPE}: {e}"), no_pmu),
    }
}

pub(super) fn thp() -> Finding {
    const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    match text(ENABLED) {
        Ok(modes) if modes.contains("[never]") => Finding::partial(
            "never, except by MADV_COLLAPSE (Linux 6.1)",
            "echo madvise > that file, as root",
        ),
        Ok(modes) => Finding::there(modes),
        Err(e) => {
            Finding::missing(format!("{ENABLED}: {e}"), "kernel: CONFIG_TRANSPARENT_HUGEPAGE; mount /sys")
        }
    }
}

pub(super) fn compaction() -> Finding {
    settable(c"/proc/sys/vm/compact_memory", String::new())
}

pub(super) fn numa() -> Finding {
    match text("/sys/devices/system/node/online") {
        Ok(nodes) if nodes != "0" => Finding::there(format!("nodes {nodes}")),
        Ok(_) => Finding::missing("one node", "boot with numa=fake=2, or use a machine with several nodes"),
        Err(e) => {
            Finding::missing(format!("/sys/devices/system/node: {e}"), "kernel: CONFIG_NUMA; mount /sys")
        }
    }
}

pub(super) fn ptrace() -> Finding {
    // Without Yama there is no such file, and no restriction on children.
    match text("/proc/sys/kernel/yama/ptrace_scope").as_deref() {
        Ok("3") => {
            Finding::missing("kernel.yama.ptrace_scope is 3 until reboot", "boot with another ptrace_scope")
        }
        Ok(scope) => Finding::there(format!("ptrace_scope {scope}")),
        Err(_) => Finding::there("no Yama"),
    }
}

pub(super) fn pidfd_getfd() -> Finding {
    let fetch = || -> rustix::io::Result<OwnedFd> {
        let myself = pidfd_open(getpid(), PidfdFlags::empty())?;
        process::pidfd_getfd(&myself, myself.as_raw_fd(), PidfdGetfdFlags::empty())
    };
    Finding::of(fetch().map(drop).map_err(io::Error::from), "pidfd_getfd", |errno| match errno {
        libc::ENOSYS => "use Linux 5.6 or later; or a seccomp filter hides it",
        _ => "lift the seccomp filter",
    })
}
