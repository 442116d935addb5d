// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page identity, pins, and what memory may be like.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use mmu_notifier::Range;
use rustix::process::{Resource, getrlimit};

use super::{Finding, UNEXPECTED};
use crate::page::{Frame, Maps, Pages, PidOrSelf};
use crate::pin::{PinError, Pinner};
use crate::sys::probe::{self, Scratch};

/// A scratch page, or why there is none.
fn scratch() -> Result<Scratch, Finding> {
    Scratch::page().map_err(|e| Finding::missing(format!("mapping a page: {e}"), UNEXPECTED))
}

pub(super) fn io_uring() -> Finding {
    let scratch = match scratch() {
        Ok(scratch) => scratch,
        Err(finding) => return finding,
    };
    match Pinner::new(1).and_then(|pinner| pinner.pin(Range::page(scratch.addr()))) {
        Ok(_) => match getrlimit(Resource::Memlock).current {
            Some(bytes) if !is_capable(CAP_IPC_LOCK) => {
                Finding::there(format!("at most {bytes} bytes pinned"))
            }
            _ => Finding::there("no limit on pinned bytes"),
        },
        Err(PinError::NoRing { how, source }) => Finding::missing(format!("io_uring: {source}"), how),
        Err(e @ PinError::MemlockLimit { .. }) => {
            Finding::missing(e.to_string(), "raise RLIMIT_MEMLOCK (ulimit -l), or give CAP_IPC_LOCK")
        }
        Err(e) => Finding::missing(e.to_string(), "use Linux 5.19 or later"),
    }
}

const CAP_IPC_LOCK: u32 = 14;

fn is_capable(capability: u32) -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).map(str::trim);
    effective.and_then(|hex| u64::from_str_radix(hex, 16).ok()).is_some_and(|set| set >> capability & 1 == 1)
}

pub(super) fn pfn() -> Finding {
    let scratch = match scratch() {
        Ok(scratch) => scratch,
        Err(finding) => return finding,
    };
    let seen = Pages::open(PidOrSelf::Myself).and_then(|pages| pages.identity(scratch.addr()));
    match seen.map(|page| page.frame) {
        Ok(Frame::Present(_)) => Finding::there(""),
        Ok(Frame::Hidden) => {
            Finding::missing("pagemap shows no frame numbers to this user", "give CAP_SYS_ADMIN (Linux 4.2)")
        }
        Ok(other) => Finding::missing(format!("a page just touched is {other:?}"), "try again"),
        Err(e) => Finding::missing(e.to_string(), "mount /proc; kernel: CONFIG_PROC_PAGE_MONITOR"),
    }
}

pub(super) fn frame_file(path: &str) -> Finding {
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut [0; 8], 0));
    Finding::of(read, path, |errno| match errno {
        libc::ENOENT => "kernel: CONFIG_PROC_PAGE_MONITOR",
        _ => "be root (the file has mode 0400)",
    })
}

pub(super) fn procmap_query() -> Finding {
    match Maps::open(PidOrSelf::Myself) {
        Ok(maps) if maps.by_query() => Finding::there(""),
        Ok(_) => Finding::missing("/proc/self/maps does not know it", "use Linux 6.11 or later"),
        Err(e) => Finding::missing(e.to_string(), "mount /proc"),
    }
}

pub(super) fn pagemap_scan() -> Finding {
    let scratch = match scratch() {
        Ok(scratch) => scratch,
        Err(finding) => return finding,
    };
    let scan = File::open("/proc/self/pagemap").and_then(|file| probe::pagemap_scan(&file, scratch.addr()));
    Finding::of(scan, "PAGEMAP_SCAN", |_| "use Linux 6.7 or later")
}

pub(super) fn guard_pages() -> Finding {
    match scratch() {
        Ok(scratch) => {
            Finding::of(scratch.install_guard(), "MADV_GUARD_INSTALL", |_| "use Linux 6.13 or later")
        }
        Err(finding) => finding,
    }
}

pub(super) fn process_madvise() -> Finding {
    match scratch() {
        Ok(scratch) => Finding::of(scratch.process_madvise(), "process_madvise", |errno| match errno {
            libc::EINVAL => "use Linux 6.13 or later",
            _ => "use Linux 6.13 or later; or a seccomp filter hides it",
        }),
        Err(finding) => finding,
    }
}

pub(super) fn mseal() -> Finding {
    Finding::of(probe::mseal(), "mseal", |_| "use Linux 6.10 or later")
}

pub(super) fn memfd_secret() -> Finding {
    let made: io::Result<()> = probe::memfd_secret().map(drop);
    Finding::of(
        made,
        "memfd_secret",
        |_| "kernel: CONFIG_SECRETMEM; before Linux 6.5 also boot with secretmem.enable=1; hibernation must be unused",
    )
}
