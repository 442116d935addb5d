// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page that reads as zeros in every forked child.
//!
//! MADV_WIPEONFORK (Linux 4.14) is a property of the VMA, so it holds for fork(2), vfork(2)-less `clone(2)` without
//! CLONE_VM and raw system calls that no `pthread_atfork` handler sees. A child made with CLONE_VM has the same mm
//! and reads the same words.

use super::map::Mapping;
use std::io;
use std::sync::atomic::Ordering;

/// A word of such a page.
#[expect(
    clippy::disallowed_types,
    reason = "it lies in memory that the kernel wipes at fork, so it is a bare word"
)]
pub(crate) type WipeWord = std::sync::atomic::AtomicU64;

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

    /// The words of the page.
    pub(crate) fn words(&self) -> &[WipeWord; 512] {
        // SAFETY: the page is mapped readable and writable for as long as `self` lives, page aligned, and only ever
        // accessed as these atomics (the kernel's wipe replaces the page in a child, where no other thread runs).
        unsafe { self.0.ptr().cast::<[WipeWord; 512]>().as_ref() }
    }
}

/// Tells whether we still run in the mm in which it was made.
///
/// Better than a process number, which a child in a new pid namespace may share, and which differs in a CLONE_VM child
/// of the same mm.
#[derive(Debug)]
pub(crate) struct MmMark(WipePage);

impl MmMark {
    /// Marks the mm of the caller.
    pub(crate) fn new() -> io::Result<MmMark> {
        let page = WipePage::new()?;
        page.words()[0].store(1, Ordering::Relaxed);
        Ok(MmMark(page))
    }

    /// Is the caller's mm the marked one? False in a forked child.
    pub(crate) fn is_here(&self) -> bool {
        self.0.words()[0].load(Ordering::Relaxed) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forked_child_reads_zero_and_the_parent_keeps_its_word() {
        let page = WipePage::new().unwrap();
        page.words()[0].store(7, Ordering::Relaxed);
        // SAFETY: the child only reads memory and leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let code = i32::try_from(page.words()[0].load(Ordering::Relaxed)).unwrap_or(99);
            // SAFETY: leaves the child without running anything of the parent's.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert!(libc::WIFEXITED(status));
        assert_eq!(libc::WEXITSTATUS(status), 0);
        assert_eq!(page.words()[0].load(Ordering::Relaxed), 7);
    }
}
