// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls on the mm for the sake of the locks that they take; see [`crate::barrier`].

use std::io;
use std::ptr;

use mmu_notifier::{PageAddr, Range};

const MPOL_DEFAULT: libc::c_int = 0;
const MPOL_F_ADDR: libc::c_ulong = 2;
const MPOL_MF_MOVE: libc::c_uint = 2;
/// Bits in the node mask handed to `get_mempolicy`; it must be no less than the kernel's own number of nodes.
const MAX_NODES: usize = 1024;

fn check(result: libc::c_long) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Does the mapping at `page` have no memory policy of its own?
///
/// # Errors
/// `EFAULT` where nothing is mapped, `ENOSYS` on kernels without NUMA, what a seccomp filter says.
pub(crate) fn has_default_policy(page: PageAddr) -> io::Result<bool> {
    let mut mode: libc::c_int = -1;
    let mut nodes = [0 as libc::c_ulong; MAX_NODES / libc::c_ulong::BITS as usize];
    // SAFETY: `mode` and `nodes` are ours, as large as the call is told, and live across it; the address is looked
    // up, not written.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            nodes.as_mut_ptr(),
            MAX_NODES,
            page.get(),
            MPOL_F_ADDR,
        )
    };
    check(result).map(|()| mode == MPOL_DEFAULT)
}

/// Set the default policy on `range`: with [`has_default_policy`], nothing but the locks.
///
/// # Errors
/// `EFAULT` where nothing is mapped (the mmap lock was taken all the same), `ENOSYS` without NUMA.
pub(crate) fn mbind_default(range: Range) -> io::Result<()> {
    mbind(range, 0)
}

/// Have every CPU put the pages that it batches on their LRU lists, as whoever may move pages does first
/// (`lru_cache_disable`). The pages of `range` stay where they are, unless the mapping has a memory policy. A kernel
/// without NUMA cannot be asked.
pub(crate) fn drain_lru_batches(range: Range) {
    let _ = mbind(range, MPOL_MF_MOVE);
}

fn mbind(range: Range, flags: libc::c_uint) -> io::Result<()> {
    let mask = ptr::null::<libc::c_ulong>();
    // SAFETY: no memory is handed over (the mask is null, as MPOL_DEFAULT wants), and where a page lies is nobody's
    // business but the kernel's.
    check(unsafe {
        libc::syscall(libc::SYS_mbind, range.start(), range.len(), MPOL_DEFAULT, mask, 0usize, flags)
    })
}

/// Whether core dumps hold `range`.
///
/// # Errors
/// `EINVAL` for mappings of a device, `ENOMEM` for a hole.
pub(crate) fn set_dump(range: Range, dump: bool) -> io::Result<()> {
    let advice = if dump { libc::MADV_DODUMP } else { libc::MADV_DONTDUMP };
    // SAFETY: these two advices change no page and no translation.
    check(unsafe { libc::madvise(range.start() as *mut libc::c_void, range.len() as usize, advice) }.into())
}

/// Make every page of `range` present, for writing if `write`.
///
/// # Errors
/// `ENOMEM` for a hole, `EINVAL` where the mapping does not allow it or before Linux 5.14, `EFAULT` past the end of a
/// file and on guard pages.
pub(crate) fn populate(range: Range, write: bool) -> io::Result<()> {
    let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    // SAFETY: it faults pages in as an access would, and changes no byte.
    check(unsafe { libc::madvise(range.start() as *mut libc::c_void, range.len() as usize, advice) }.into())
}
