// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system memory of the guest, as the host sees it.
//!
//! Both sides read and write it at the same time, so the host only ever touches it as atomic words.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::layout::{MAILBOX, SYSTEM_LEN, mailbox};

#[expect(clippy::disallowed_types, reason = "words shared with the guest")]
pub(super) type Word = std::sync::atomic::AtomicU64;

/// One private mapping, unmapped on drop. A forked child finds it empty.
#[derive(Debug)]
pub(super) struct SystemMemory(NonNull<u8>);

// SAFETY: it is accessed through atomic words only, by any thread.
unsafe impl Send for SystemMemory {}
// SAFETY: as above.
unsafe impl Sync for SystemMemory {}

impl SystemMemory {
    pub(super) fn new() -> io::Result<SystemMemory> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let len = SYSTEM_LEN as usize;
        // SAFETY: without MAP_FIXED the kernel picks a free range.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory =
            SystemMemory(NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mmap returned 0"))?);
        // SAFETY: the mapping is ours, whole and empty.
        if unsafe { libc::madvise(at, len, libc::MADV_WIPEONFORK) } != 0 {
            return Err(io::Error::last_os_error());
        }
        memory.word(MAILBOX + mailbox::OWNED).store(1, Ordering::Relaxed);
        Ok(memory)
    }

    /// Address of its first byte in this process.
    pub(super) fn addr(&self) -> u64 {
        self.0.as_ptr().addr() as u64
    }

    /// The word at guest physical address `at`, which is a multiple of 8 in the system memory.
    #[inline]
    pub(super) fn word(&self, at: u64) -> &Word {
        assert!(at < SYSTEM_LEN && at.is_multiple_of(8), "no word at guest address {at:#x}");
        // SAFETY: inside the mapping and aligned by the assertion; everybody accesses it atomically, or is the guest.
        unsafe { self.0.add(at as usize).cast::<Word>().as_ref() }
    }

    /// Writes `bytes` at `at`, a multiple of 8. Before the guest starts.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        for (at, chunk) in (at..).step_by(8).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(at).store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }

    /// Is this still the process that made it?
    pub(super) fn is_owned(&self) -> bool {
        self.word(MAILBOX + mailbox::OWNED).load(Ordering::Relaxed) == 1
    }
}

impl Drop for SystemMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; words are borrowed from `self` only.
        unsafe { libc::munmap(self.0.as_ptr().cast(), SYSTEM_LEN as usize) };
    }
}
