// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls that only ask whether the kernel would: each leaves everything as it was, and none can block.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use mmu_notifier::{PAGE_SIZE, PageAddr};

use super::map::Mapping;
use super::procmap::ioctl_number;

const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const MADV_GUARD_INSTALL: libc::c_int = 102;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;

fn descriptor(rc: libc::c_long) -> io::Result<OwnedFd> {
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system call has just returned this descriptor, to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(rc as libc::c_int) })
}

fn done(rc: libc::c_long) -> io::Result<()> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct perf_event_attr` up to its second version (72 bytes).
#[repr(C)]
#[derive(Default)]
struct PerfAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
    config2: u64,
}

fn perf_event_open(attr: &mut PerfAttr, pid: libc::pid_t, cpu: libc::c_int) -> io::Result<OwnedFd> {
    attr.size = size_of::<PerfAttr>() as u32;
    // SAFETY: attr has the size that it states; pointers in it live in the callers' frames.
    descriptor(unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const *attr, pid, cpu, -1, PERF_FLAG_FD_CLOEXEC)
    })
}

/// Ask the uprobe PMU `pmu` for a probe on a file with no name: whoever may make probes gets as far as the name.
pub(crate) fn uprobe(pmu: u32) -> io::Result<()> {
    let path = c"";
    let mut attr = PerfAttr { kind: pmu, flags: 1, config1: path.as_ptr() as u64, ..PerfAttr::default() };
    match perf_event_open(&mut attr, 0, -1) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(()),
        other => other.map(drop),
    }
}

/// A userfaultfd by system call.
pub(crate) fn userfaultfd(user_mode_only: bool) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | if user_mode_only { UFFD_USER_MODE_ONLY } else { 0 };
    // SAFETY: plain numbers.
    descriptor(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })
}

/// A page of our own to try things on.
#[derive(Debug)]
pub(crate) struct Scratch {
    page: PageAddr,
    map: Mapping,
}

impl Scratch {
    /// One page, written to.
    pub(crate) fn page() -> io::Result<Scratch> {
        let map = Mapping::anonymous(PAGE_SIZE as usize)?;
        // SAFETY: the first byte of our own mapping, which nobody else knows.
        unsafe { map.ptr().write_volatile(1) };
        let page = PageAddr::new(map.ptr().as_ptr() as u64).map_err(io::Error::other)?;
        Ok(Scratch { page, map })
    }

    pub(crate) fn addr(&self) -> PageAddr {
        self.page
    }

    /// MADV_GUARD_INSTALL on it.
    pub(crate) fn install_guard(&self) -> io::Result<()> {
        self.map.advise(MADV_GUARD_INSTALL)
    }

    /// MADV_DONTNEED of it by way of process_madvise(2) of this very process.
    pub(crate) fn process_madvise(&self) -> io::Result<()> {
        // SAFETY: plain numbers.
        let myself = descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) })?;
        let iov = [self.page.get(), PAGE_SIZE];
        let (fd, advice) = (myself.as_raw_fd(), libc::MADV_DONTNEED);
        // SAFETY: `iov` is a struct iovec that names our own page, whose content nobody wants.
        done(unsafe { libc::syscall(libc::SYS_process_madvise, fd, iov.as_ptr(), 1, advice, 0) })
    }
}

/// PAGEMAP_SCAN of one page.
pub(crate) fn pagemap_scan(pagemap: &File, page: PageAddr) -> io::Result<()> {
    const PAGE_IS_PRESENT: u64 = 1 << 3;
    /// size, flags, start, end, walk_end, vec, vec_len, max_pages, then masks: inverted, all of, any of, returned
    const WORDS: usize = 12;
    let mut region = [0_u64; 3];
    let (start, end) = (page.get(), page.get() + PAGE_SIZE);
    let vec = region.as_mut_ptr() as u64;
    let mut arg: [u64; WORDS] = [WORDS as u64 * 8, 0, start, end, 0, vec, 1, 0, 0, 0, 0, PAGE_IS_PRESENT];
    // SAFETY: arg is a struct pm_scan_arg of the size that it states, region the one page_region that it promises.
    let rc = unsafe {
        libc::ioctl(pagemap.as_raw_fd(), ioctl_number(16, WORDS * 8) as libc::Ioctl, arg.as_mut_ptr())
    };
    done(rc.into())
}

/// mseal of no bytes.
pub(crate) fn mseal() -> io::Result<()> {
    const SYS_MSEAL: libc::c_long = 462;
    // SAFETY: an empty range.
    done(unsafe { libc::syscall(SYS_MSEAL, 0, 0, 0) })
}

/// A secret memfd, closed at once.
pub(crate) fn memfd_secret() -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    descriptor(unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) })
}

/// Whether the file may be opened for writing; nothing is written.
pub(crate) fn writable(path: &CStr) -> io::Result<()> {
    opens(path, libc::O_WRONLY)
}

/// Whether the file may be opened for reading; nothing is read.
pub(crate) fn readable(path: &CStr) -> io::Result<()> {
    opens(path, libc::O_RDONLY)
}

fn opens(path: &CStr, mode: libc::c_int) -> io::Result<()> {
    // SAFETY: a string that ends in zero.
    descriptor(unsafe { libc::open(path.as_ptr(), mode | libc::O_CLOEXEC) }.into()).map(drop)
}
