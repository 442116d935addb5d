// SPDX-License-Identifier: MIT OR Apache-2.0
//! io_uring with fixed buffers: registration by slot, and one transfer at a time.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use interleave::{AtomicU64, Ordering};
use io_uring::{IoUring, opcode, types::Fd};
use mmu_notifier::Range;

/// Numbers requests, of all rings.
static NEXT: AtomicU64 = AtomicU64::const_new(0);

const IORING_REGISTER_BUFFERS_UPDATE: libc::c_uint = 16;

/// `struct io_uring_rsrc_update2`
#[repr(C)]
struct RsrcUpdate2 {
    offset: u32,
    resv: u32,
    data: u64,
    tags: u64,
    nr: u32,
    resv2: u32,
}

/// `call` again for as long as signals interrupt it.
pub(crate) fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// A ring of `entries` with an empty buffer table of `slots` (Linux 5.19).
pub(crate) fn with_table(entries: u32, slots: u32) -> io::Result<IoUring> {
    let ring = uninterrupted(|| IoUring::new(entries))?;
    uninterrupted(|| ring.submitter().register_buffers_sparse(slots))?;
    Ok(ring)
}

/// Put `range`, or nothing, into `slot` of the buffer table of the ring `ring` (Linux 5.13).
///
/// The kernel pins the pages or fails; it does not look at what they hold, and does not touch them until a request
/// names the slot.
pub(crate) fn update_slot(ring: BorrowedFd<'_>, slot: u32, range: Option<Range>) -> io::Result<()> {
    let iovec = libc::iovec {
        iov_base: range.map_or(0, Range::start) as *mut libc::c_void,
        iov_len: range.map_or(0, Range::len) as usize,
    };
    let tag = 0_u64;
    let update = RsrcUpdate2 {
        offset: slot,
        resv: 0,
        data: &raw const iovec as u64,
        tags: &raw const tag as u64,
        nr: 1,
        resv2: 0,
    };
    uninterrupted(|| update_once(ring, &update))
}

/// `update` points to an iovec and a tag of its caller.
fn update_once(ring: BorrowedFd<'_>, update: &RsrcUpdate2) -> io::Result<()> {
    // SAFETY: update is the struct that the operation takes, with its size as the count; iovec and tag have nr = 1
    // elements and are the caller's, who waits. The range is only an address for the kernel to check.
    let done = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            IORING_REGISTER_BUFFERS_UPDATE,
            std::ptr::from_ref(update),
            size_of::<RsrcUpdate2>(),
        )
    };
    match done {
        1 => Ok(()),
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// A descriptor of our own for the ring.
pub(crate) fn descriptor(ring: &IoUring) -> io::Result<OwnedFd> {
    // SAFETY: the ring owns the descriptor and is borrowed for the call.
    unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }.try_clone_to_owned()
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// WRITE_FIXED: the device reads the pinned pages and writes them to the file.
    FromPages,
    /// READ_FIXED: the device writes the file's bytes into the pinned pages.
    ToPages,
}

/// Move `len` bytes between `file`, from its offset 0, and the pinned pages of `slot` that were registered as `addr`.
///
/// Returns how many bytes were moved.
///
/// # Safety
/// For [`Transfer::ToPages`]: no reference may exist to the pinned bytes, wherever they are mapped now.
pub(crate) unsafe fn transfer(
    ring: &mut IoUring,
    way: Transfer,
    file: &File,
    slot: u16,
    addr: u64,
    len: u32,
) -> io::Result<u32> {
    // A request whose wait failed may complete later; its completion is not ours.
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let fd = Fd(file.as_raw_fd());
    let entry = match way {
        Transfer::FromPages => opcode::WriteFixed::new(fd, addr as *const u8, len, slot).offset(0).build(),
        Transfer::ToPages => opcode::ReadFixed::new(fd, addr as *mut u8, len, slot).offset(0).build(),
    };
    let entry = entry.user_data(number);
    // SAFETY: the kernel finds the memory by slot: pages that are pinned until the slot is cleared, or, if it is
    // empty, none (EFAULT). The caller answers for references to them. The file outlives the request, which is
    // waited for below.
    unsafe { ring.submission().push(&entry) }.map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
    loop {
        // An interrupted wait has submitted; a request on a memfd always completes.
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if let Some(done) = ring.completion().find(|done| done.user_data() == number) {
            let result = done.result();
            return u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        }
    }
}
