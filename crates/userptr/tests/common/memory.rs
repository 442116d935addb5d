// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of a test's own, changed underneath in whatever way. Used by address: what is behind it may vanish at any time.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use mmu_notifier::{PAGE_SIZE, Range};

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
pub(crate) const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// A mapping, unmapped on drop.
pub(crate) struct Memory(pub(crate) Range);

impl Memory {
    /// Private anonymous pages that hold `value`.
    pub(crate) fn stamped(pages: u64, value: u64) -> Memory {
        let memory = Memory::map(0, pages, ANON, None).unwrap();
        memory.fill(value);
        memory
    }

    /// With `at`, there and only where nothing is.
    pub(crate) fn map(at: u64, pages: u64, flags: i32, file: Option<&File>) -> io::Result<Memory> {
        let fixed = if at == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
        let (len, fd) = (pages * PAGE_SIZE, file.map_or(-1, AsRawFd::as_raw_fd));
        // SAFETY: it replaces no mapping.
        let got = unsafe { libc::mmap(at as *mut _, len as usize, RW, flags | fixed, fd, 0) };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Memory(Range::new(got as u64, len).unwrap()))
    }

    pub(crate) fn page(&self, n: u64) -> Range {
        Range::new(self.0.start() + n * PAGE_SIZE, PAGE_SIZE).unwrap()
    }

    /// Pages of which no two touch: each that userfaultfd is told of takes two mappings more.
    pub(crate) fn islands(&self) -> impl Iterator<Item = Range> {
        self.0.iter_pages().step_by(2).map(Range::page)
    }

    /// The first word of every page.
    pub(crate) fn fill(&self, value: u64) {
        for page in self.0.iter_pages() {
            // SAFETY: mapped by this test, aligned, and no reference to it exists.
            unsafe { (page.get() as *mut u64).write_volatile(value) };
        }
    }

    /// All of it, copied.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.0.len() as usize];
        // SAFETY: mapped by this test; nobody writes it meanwhile.
        unsafe {
            std::ptr::copy_nonoverlapping(self.0.start() as *const u8, bytes.as_mut_ptr(), bytes.len())
        };
        bytes
    }

    pub(crate) fn load(&self) -> u64 {
        // SAFETY: as above.
        unsafe { (self.0.start() as *const u64).read_volatile() }
    }

    pub(crate) fn madvise(&self, part: Range, advice: i32) -> io::Result<()> {
        assert!(self.0.contains(part));
        // SAFETY: memory of the test's own, to which no reference exists.
        match unsafe { libc::madvise(part.start() as *mut _, part.len() as usize, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(crate) fn mlock(&self) {
        // SAFETY: it changes no byte.
        assert_eq!(unsafe { libc::mlock(self.0.start() as *const _, self.0.len() as usize) }, 0);
    }

    pub(crate) fn protect(&self, prot: i32) {
        // SAFETY: as for madvise.
        assert_eq!(unsafe { libc::mprotect(self.0.start() as *mut _, self.0.len() as usize, prot) }, 0);
    }

    pub(crate) fn unmap(self) {}

    /// In a forked child, whose copy it is.
    pub(crate) fn unmap_here(&self) {
        drop(Memory(self.0));
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by this test, and no reference to it exists.
        unsafe { libc::munmap(self.0.start() as *mut _, self.0.len() as usize) };
    }
}

/// A file in memory.
pub(crate) fn memfd() -> File {
    File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

/// Runs `body` in a forked child and says whether it returned true.
pub(crate) fn in_fork(body: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child runs body and leaves by _exit; its deadline is the test's.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(false);
        // SAFETY: ends the child without the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!ok)) };
    }
    let mut status = 0;
    // SAFETY: status is ours.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
}
