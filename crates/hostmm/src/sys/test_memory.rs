// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(dead_code, reason = "each test uses some of it")]
//! Memory for this crate's own tests: a mapping that can be changed underneath in every way.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use mmu_notifier::{PageAddr, Range};

/// A mapping, unmapped on drop. Tests use it by address: the memory behind may vanish at any time.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) range: Range,
}

pub(crate) const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

impl Memory {
    pub(crate) fn anon(bytes: u64) -> Memory {
        Memory::map(None, bytes, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None).unwrap()
    }

    pub(crate) fn file(file: &File, bytes: u64, flags: i32) -> Memory {
        Memory::map(None, bytes, RW, flags, Some(file)).unwrap()
    }

    /// With `at`, over whatever is there.
    pub(crate) fn map(
        at: Option<u64>,
        bytes: u64,
        prot: i32,
        flags: i32,
        file: Option<&File>,
    ) -> io::Result<Memory> {
        let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: without `at` nothing that exists is touched; with it the tests name only memory of their own, to
        // which no reference exists.
        let p = unsafe { libc::mmap(at.unwrap_or(0) as *mut _, bytes as usize, prot, flags | fixed, fd, 0) };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Memory { range: Range::new(p as u64, bytes).unwrap() })
    }

    pub(crate) fn page(&self, n: u64) -> PageAddr {
        PageAddr::containing(self.range.start() + (n << 12)).unwrap()
    }

    pub(crate) fn write(&self, off: u64, bytes: &[u8]) {
        assert!(off + bytes.len() as u64 <= self.range.len());
        for (i, b) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping; a test that has unmapped it does not write.
            unsafe { ((self.range.start() + off) as *mut u8).add(i).write_volatile(*b) };
        }
    }

    pub(crate) fn read(&self, off: u64, len: usize) -> Vec<u8> {
        assert!(off + len as u64 <= self.range.len());
        // SAFETY: inside the mapping; a test that has unmapped it does not read.
        (0..len)
            .map(|i| unsafe { ((self.range.start() + off) as *const u8).add(i).read_volatile() })
            .collect()
    }

    pub(crate) fn touch(&self) {
        for page in 0..self.range.pages() {
            self.write(page << 12, &[1]);
        }
    }

    pub(crate) fn madvise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: it acts on our mapping, to which no reference exists.
        let rc = unsafe { libc::madvise(self.range.start() as *mut _, self.range.len() as usize, advice) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    pub(crate) fn mprotect(&self, prot: i32) {
        // SAFETY: as for madvise.
        let rc = unsafe { libc::mprotect(self.range.start() as *mut _, self.range.len() as usize, prot) };
        assert_eq!(rc, 0, "{}", io::Error::last_os_error());
    }

    /// Move it elsewhere.
    pub(crate) fn mremap(self) -> Memory {
        let to = Memory::map(
            None,
            self.range.len(),
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            None,
        );
        let to = to.unwrap();
        let len = self.range.len() as usize;
        // SAFETY: both ranges are our own, without references to them; `self` is forgotten below.
        let p = unsafe {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            libc::mremap(self.range.start() as *mut _, len, len, flags, to.range.start() as *mut libc::c_void)
        };
        assert_eq!(p as u64, to.range.start(), "{}", io::Error::last_os_error());
        std::mem::forget(self);
        to
    }

    pub(crate) fn munmap(self) {}
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was mapped by us and nobody has a reference to it.
        unsafe { libc::munmap(self.range.start() as *mut _, self.range.len() as usize) };
    }
}

/// Run `body` in a forked child; whether it returned.
pub(crate) fn fork(body: impl FnOnce()) -> bool {
    // SAFETY: tests that fork run alone in a child of the test runner, and the new child only runs body and exits.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_ok();
        // SAFETY: ends the child without the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!ok)) };
    }
    let mut status = 0;
    // SAFETY: status is ours.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
}
