// SPDX-License-Identifier: MIT OR Apache-2.0
//! This process's memory by way of the kernel: what is not mapped is an answer, and no signal.

use libc::{c_void, iovec};
use mmu_notifier::PAGE_SIZE;

/// Memory of the device's own for what is on its way.
#[derive(Debug)]
pub(super) struct Bounce {
    left: Box<[u8]>,
    right: Box<[u8]>,
}

impl Bounce {
    pub(super) fn new(bytes: usize) -> Bounce {
        Bounce { left: vec![0; bytes].into(), right: vec![0; bytes].into() }
    }

    /// Two buffers for a command of `len` bytes: no longer than it needs.
    pub(super) fn halves(&mut self, len: u64) -> (&mut [u8], &mut [u8]) {
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(self.left.len());
        (&mut self.left[..len], &mut self.right[..len])
    }
}

/// The most of `[addr, addr + len)` that goes by one call, and if that fails, no more than a page.
fn transfer(addr: u64, len: usize, call: impl Fn(u64, usize, usize) -> isize) -> Result<(), usize> {
    let mut done = 0;
    while done < len {
        let at = addr + done as u64;
        let moved = call(at, done, len - done);
        if moved > 0 {
            done += moved as usize;
            continue;
        }
        // The kernel gives up as a whole where the first page cannot be had; elsewhere it says how far it came.
        let page = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(len - done);
        match call(at, done, page) {
            moved if moved > 0 => done += moved as usize,
            _ => return Err(done),
        }
    }
    Ok(())
}

/// Reads `into` from this process's memory at `addr`. How many bytes could be had, if not all.
pub(in crate::device) fn read(addr: u64, into: &mut [u8]) -> Result<(), usize> {
    let base = into.as_mut_ptr();
    transfer(addr, into.len(), |at, done, len| {
        let local = iovec { iov_base: base.wrapping_add(done).cast(), iov_len: len };
        let remote = iovec { iov_base: at as *mut c_void, iov_len: len };
        // SAFETY: the kernel writes `local`, a part of `into`, which is ours; `remote` it reads or refuses.
        unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) }
    })
}

/// Writes `from` to this process's memory at `addr`. How many bytes could be put, if not all.
///
/// # Safety
/// Nobody has a reference to the memory.
pub(super) unsafe fn write(addr: u64, from: &[u8]) -> Result<(), usize> {
    let base = from.as_ptr();
    transfer(addr, from.len(), |at, done, len| {
        let local = iovec { iov_base: base.wrapping_add(done).cast_mut().cast(), iov_len: len };
        let remote = iovec { iov_base: at as *mut c_void, iov_len: len };
        // SAFETY: the kernel only reads `local`; the caller answers for `remote`, which it writes or refuses.
        unsafe { libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) }
    })
}
