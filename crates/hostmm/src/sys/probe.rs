// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls that only ask whether the kernel would: each leaves everything as it was, and none can block.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use mmu_notifier::{PAGE_SIZE, PageAddr};

use super::procmap::ioctl_number;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_PROG_TYPE_TRACEPOINT: u32 = 5;
const UFFD_API: u64 = 0xaa;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
/// `_IO(0xaa, 0)`
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
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

/// The part of `union bpf_attr` that BPF_MAP_CREATE reads.
#[repr(C)]
struct BpfMapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// The part of `union bpf_attr` that BPF_PROG_LOAD reads.
#[repr(C)]
struct BpfProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: attr is the leading part of bpf_attr with its size; the kernel reads the rest as zero. Pointers in it
    // live in the callers' frames.
    descriptor(unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attr, size_of::<T>()) })
}

/// Make the kind of map that counts for user space.
pub(crate) fn bpf_map() -> io::Result<OwnedFd> {
    let (map_type, value_size) = (BPF_MAP_TYPE_ARRAY, PAGE_SIZE as u32);
    bpf(
        BPF_MAP_CREATE,
        &BpfMapCreate { map_type, key_size: 4, value_size, max_entries: 1, map_flags: BPF_F_MMAPABLE },
    )
}

/// Load `return 0` for tracepoints.
pub(crate) fn bpf_program() -> io::Result<OwnedFd> {
    let insns: [u64; 2] = [0xb7, 0x95];
    let license = c"Dual MIT/GPL";
    bpf(
        BPF_PROG_LOAD,
        &BpfProgLoad {
            prog_type: BPF_PROG_TYPE_TRACEPOINT,
            insn_cnt: insns.len() as u32,
            insns: insns.as_ptr() as u64,
            license: license.as_ptr() as u64,
        },
    )
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

/// Open the tracepoint `id` for every task on CPU 0, disabled, and map its ring.
pub(crate) fn perf_ring(id: u64) -> io::Result<()> {
    const PERF_TYPE_TRACEPOINT: u32 = 2;
    const PERF_SAMPLE_RAW: u64 = 1 << 10;
    const DISABLED: u64 = 1;
    let mut attr = PerfAttr {
        kind: PERF_TYPE_TRACEPOINT,
        config: id,
        sample_period: 1,
        sample_type: PERF_SAMPLE_RAW,
        flags: DISABLED,
        ..PerfAttr::default()
    };
    let event = perf_event_open(&mut attr, -1, 0)?;
    Scratch::map(2 * PAGE_SIZE, libc::PROT_READ, libc::MAP_SHARED, event.as_raw_fd()).map(drop)
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

/// A userfaultfd from `/dev/userfaultfd` (Linux 6.1).
pub(crate) fn userfaultfd_from(device: &File) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    let rc =
        unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    descriptor(rc.into())
}

/// The features that the kernel knows; `want` are asked for.
pub(crate) fn uffd_features(uffd: &OwnedFd, want: u64) -> io::Result<u64> {
    let mut api: [u64; 3] = [UFFD_API, want, 0];
    // SAFETY: api is a struct uffdio_api: three words, read and written.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    done(rc.into()).map(|()| api[1])
}

/// A page of our own to try things on.
#[derive(Debug)]
pub(crate) struct Scratch {
    start: *mut libc::c_void,
    len: usize,
}

impl Scratch {
    /// One page, written to.
    pub(crate) fn page() -> io::Result<Scratch> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        Scratch::map(PAGE_SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    }

    fn map(len: u64, prot: libc::c_int, flags: libc::c_int, fd: libc::c_int) -> io::Result<Scratch> {
        let len = len as usize;
        // SAFETY: a new mapping where nothing is.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Scratch { start, len }) }
    }

    pub(crate) fn addr(&self) -> PageAddr {
        PageAddr::containing(self.start as u64)
    }

    /// MADV_GUARD_INSTALL on it.
    pub(crate) fn install_guard(&self) -> io::Result<()> {
        // SAFETY: our own mapping, which nobody uses.
        done(unsafe { libc::madvise(self.start, self.len, MADV_GUARD_INSTALL) }.into())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses.
        unsafe { libc::munmap(self.start, self.len) };
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
    // SAFETY: a string that ends in zero.
    descriptor(unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) }.into()).map(drop)
}
