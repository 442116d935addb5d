// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory to change, and children to change it with.

use mmu_notifier::Range;
use std::ptr::null_mut;

pub(crate) const PAGE: usize = 4096;

/// A mapping that is unmapped on drop.
pub(crate) struct Memory {
    ptr: *mut u8,
    len: usize,
}

impl Memory {
    /// Private anonymous memory, written to.
    pub(crate) fn touched(len: usize) -> Memory {
        let m = Memory::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        m.touch();
        m
    }

    /// Address space that nobody touches.
    pub(crate) fn reserved(len: usize) -> Memory {
        Memory::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    pub(crate) fn shared(fd: i32, len: usize) -> Memory {
        Memory::map(len, libc::MAP_SHARED, fd)
    }

    fn map(len: usize, flags: i32, fd: i32) -> Memory {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let ptr = unsafe { libc::mmap(null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        assert_ne!(ptr, libc::MAP_FAILED);
        Memory { ptr: ptr.cast(), len }
    }

    pub(crate) fn touch(&self) {
        for at in (0..self.len).step_by(PAGE) {
            // SAFETY: inside the mapping, which is writable where tests touch it.
            unsafe { self.ptr.add(at).write_volatile(7) };
        }
    }

    pub(crate) fn range(&self) -> Range {
        Range::new(self.ptr as u64, self.len as u64).unwrap()
    }

    pub(crate) fn part(&self, page: usize, pages: usize) -> Range {
        Range::new(self.ptr as u64 + (page * PAGE) as u64, (pages * PAGE) as u64).unwrap()
    }

    pub(crate) fn advise(&self, advice: i32) {
        // SAFETY: the range is ours.
        let r = unsafe { libc::madvise(self.ptr.cast(), self.len, advice) };
        assert_eq!(r, 0, "{}", std::io::Error::last_os_error());
    }

    pub(crate) fn protect(&self, prot: i32) {
        // SAFETY: the range is ours.
        assert_eq!(unsafe { libc::mprotect(self.ptr.cast(), self.len, prot) }, 0);
    }

    pub(crate) fn unmap(self) {
        drop(self);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the range is ours.
        unsafe { libc::munmap(self.ptr.cast(), self.len) };
    }
}

/// Runs `f` in a child made by fork(2) or, `raw`, by a clone system call that libc does not see. Its answer is the
/// child's exit status.
pub(crate) fn forked(raw: bool, f: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child runs `f` and leaves by _exit; tests that call this have one thread or touch no locks of others.
    let pid = unsafe {
        if raw { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32 } else { libc::fork() }
    };
    assert!(pid >= 0);
    if pid == 0 {
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(99);
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: waits for our child.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert!(libc::WIFEXITED(status), "status {status:#x}");
    libc::WEXITSTATUS(status)
}

/// A memfd of `len` bytes.
pub(crate) fn memfd(len: usize) -> i32 {
    // SAFETY: a NUL-terminated name; the descriptor is checked and sized.
    unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        assert_eq!(libc::ftruncate(fd, len as i64), 0);
        fd
    }
}
