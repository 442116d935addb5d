// SPDX-License-Identifier: MIT OR Apache-2.0
//! userfaultfd: the descriptor, its ioctls and its messages, as ioctl_userfaultfd(2) documents them.
//!
//! Nothing here allocates, so the monitor thread may call all of it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use mmu_notifier::Range;

const UFFD_API: u64 = 0xAA;
/// Serve faults of user mode only: what an unprivileged caller may ask for. Since 5.11.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xC018_AA06;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

/// `UFFD_FEATURE_EVENT_REMAP`, since 4.11.
pub(crate) const EVENT_REMAP: u64 = 1 << 2;
/// `UFFD_FEATURE_EVENT_REMOVE`, since 4.11.
pub(crate) const EVENT_REMOVE: u64 = 1 << 3;
/// `UFFD_FEATURE_EVENT_UNMAP`, since 4.11.
pub(crate) const EVENT_UNMAP: u64 = 1 << 6;
/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`: anonymous memory can be registered for write protection. Since 5.7.
pub(crate) const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`, since 5.19.
pub(crate) const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_ASYNC`: any mapping but special ones can be registered. Since 6.7.
pub(crate) const WP_ASYNC: u64 = 1 << 15;

const UFFD_EVENT_REMAP: u8 = 0x14;
const UFFD_EVENT_REMOVE: u8 = 0x15;
const UFFD_EVENT_UNMAP: u8 = 0x16;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// `struct uffd_msg`, as read(2) fills it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Msg {
    event: u8,
    reserved1: u8,
    reserved2: u16,
    reserved3: u32,
    args: [u64; 3],
}

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// `[start, end)` is no longer mapped, or something else is mapped there. Sent after the fact.
    Unmap { start: u64, end: u64 },
    /// `[from, from + len)` moved to `[to, to + len)`, and its registration with it. Sent after the fact.
    Remap { from: u64, to: u64, len: u64 },
    /// The pages of `[start, end)` will be dropped, once this message has been read.
    Remove { start: u64, end: u64 },
    /// Nothing that we asked for.
    Other { code: u8 },
}

impl Msg {
    /// The event in it.
    pub(crate) fn event(&self) -> Event {
        let [a, b, c] = self.args;
        match self.event {
            UFFD_EVENT_UNMAP => Event::Unmap { start: a, end: b },
            UFFD_EVENT_REMAP => Event::Remap { from: a, to: b, len: c },
            UFFD_EVENT_REMOVE => Event::Remove { start: a, end: b },
            code => Event::Other { code },
        }
    }
}

fn ioctl<T>(fd: RawFd, request: libc::c_ulong, arg: &mut T) -> io::Result<()> {
    // SAFETY: every request used in this file takes a pointer to the `#[repr(C)]` structure that its caller passes as
    // `T`, reads and writes no byte outside it, and keeps no reference to it. A wrong descriptor is refused (ENOTTY).
    let rc = unsafe { libc::ioctl(fd, request, std::ptr::from_mut(arg)) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// userfaultfd(2) with `O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY`.
pub(crate) fn create() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: userfaultfd takes one integer and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The same through /dev/userfaultfd (since 6.1), where file permissions decide.
pub(crate) fn create_from_device() -> io::Result<OwnedFd> {
    let device =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: USERFAULTFD_IOC_NEW takes its flags by value and touches no memory.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as in `create`.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// UFFDIO_API: the handshake that every descriptor needs once. Returns the features that the kernel offers.
pub(crate) fn api(fd: RawFd, features: u64) -> io::Result<u64> {
    let mut arg = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    ioctl(fd, UFFDIO_API, &mut arg)?;
    Ok(arg.features)
}

/// UFFDIO_REGISTER in write-protect mode: events of `range` from now on. Nothing is write-protected by it.
pub(crate) fn register(fd: RawFd, range: Range) -> io::Result<()> {
    let range = UffdioRange { start: range.start(), len: range.len() };
    let mut arg = UffdioRegister { range, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    ioctl(fd, UFFDIO_REGISTER, &mut arg)
}

/// UFFDIO_UNREGISTER: no more events of `range`. Walks its page tables.
pub(crate) fn unregister(fd: RawFd, range: Range) -> io::Result<()> {
    ioctl(fd, UFFDIO_UNREGISTER, &mut UffdioRange { start: range.start(), len: range.len() })
}

/// What [`probe`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// No change of subscribed memory is between its page table update and the reading of its event.
    Quiet,
    /// One is.
    InFlight,
    /// Not our descriptor any more.
    Dead,
}

/// Is a change in flight? A UFFDIO_WRITEPROTECT of no bytes: the kernel says EAGAIN while `mmap_changing` is raised,
/// before it looks at the range, and EINVAL otherwise. Exact since 5.15, when the flag became a counter.
pub(crate) fn probe(fd: RawFd) -> Probe {
    let mut arg = UffdioWriteprotect { range: UffdioRange { start: 0, len: 0 }, mode: 0 };
    match ioctl(fd, UFFDIO_WRITEPROTECT, &mut arg).map_err(|e| e.raw_os_error()) {
        Err(Some(libc::EINVAL)) => Probe::Quiet,
        Err(Some(libc::EAGAIN)) => Probe::InFlight,
        _ => Probe::Dead,
    }
}

/// Reads what is there, without waiting: how many messages. Releases the threads whose messages it read.
pub(crate) fn read(fd: RawFd, into: &mut [Msg]) -> io::Result<usize> {
    // SAFETY: `into` is writable memory of that many bytes, and every bit pattern is a valid `Msg`.
    let n = unsafe { libc::read(fd, into.as_mut_ptr().cast(), std::mem::size_of_val(into)) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize / size_of::<Msg>()) }
}

/// Is all of `range` mapped? msync(2) with MS_ASYNC has had no effect since 2.6.19 but to look at each VMA for holes,
/// which makes it the cheapest such question: it costs a VMA each, not a page each.
pub(crate) fn fully_mapped(range: Range) -> bool {
    // SAFETY: MS_ASYNC neither reads nor writes memory, mapped or not.
    unsafe { libc::msync(range.start() as *mut libc::c_void, range.len() as usize, libc::MS_ASYNC) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_that_the_request_numbers_encode() {
        let size = |request: libc::c_ulong| ((request >> 16) & 0x3fff) as usize;
        assert_eq!(size(UFFDIO_API), size_of::<UffdioApi>());
        assert_eq!(size(UFFDIO_REGISTER), size_of::<UffdioRegister>());
        assert_eq!(size(UFFDIO_UNREGISTER), size_of::<UffdioRange>());
        assert_eq!(size(UFFDIO_WRITEPROTECT), size_of::<UffdioWriteprotect>());
        assert_eq!(size_of::<Msg>(), 32);
    }

    #[test]
    fn messages_are_decoded_by_kind() {
        let msg = |event| Msg { event, args: [1, 2, 3], ..Msg::default() };
        assert_eq!(msg(UFFD_EVENT_UNMAP).event(), Event::Unmap { start: 1, end: 2 });
        assert_eq!(msg(UFFD_EVENT_REMOVE).event(), Event::Remove { start: 1, end: 2 });
        assert_eq!(msg(UFFD_EVENT_REMAP).event(), Event::Remap { from: 1, to: 2, len: 3 });
        assert_eq!(msg(0x13).event(), Event::Other { code: 0x13 });
    }
}
