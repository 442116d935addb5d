// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page that reads as zeros in every forked child.
//!
//! MADV_WIPEONFORK (Linux 4.14) is a property of the VMA, so it holds for fork(2), vfork(2)-less `clone(2)` without
//! CLONE_VM and raw system calls that no `pthread_atfork` handler sees. A child made with CLONE_VM has the same mm
//! and reads the same words.

use super::map::Mapping;
use std::io;
#[expect(clippy::disallowed_types, reason = "the kernel zeroes this word at fork")]
use std::sync::atomic::AtomicU64;

/// One page of private memory, zero in a forked child.
#[derive(Debug)]
pub(crate) struct WipePage(Mapping);

impl WipePage {
    /// Maps the page; every word is 0.
    pub(crate) fn new() -> io::Result<WipePage> {
        let map = Mapping::anonymous(4096)?;
        map.advise(libc::MADV_WIPEONFORK)?;
        Ok(WipePage(map))
    }

    /// The first word of the page.
    #[inline]
    #[expect(clippy::disallowed_types, reason = "the kernel zeroes this word at fork")]
    pub(crate) fn word(&self) -> &AtomicU64 {
        // SAFETY: the page is mapped readable and writable for as long as `self` lives, page aligned, and only ever
        // accessed as this atomic (the kernel's wipe replaces the page in a child, where no other thread runs).
        unsafe { self.0.ptr().cast::<AtomicU64>().as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn a_forked_child_reads_zero_and_the_parent_keeps_its_word() {
        let page = WipePage::new().unwrap();
        page.word().store(7, Ordering::Relaxed);
        // SAFETY: the child only reads memory and leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let code = i32::try_from(page.word().load(Ordering::Relaxed)).unwrap_or(99);
            // SAFETY: leaves the child without running anything of the parent's.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert!(libc::WIFEXITED(status));
        assert_eq!(libc::WEXITSTATUS(status), 0);
        assert_eq!(page.word().load(Ordering::Relaxed), 7);
    }
}
