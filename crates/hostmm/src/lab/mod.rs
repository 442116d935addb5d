// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process to experiment on: memory at addresses that are known beforehand, changed by system calls given as data, in
//! this process and in a fork of it. For comparing what Linux does with what a model says.
//!
//! Invariant, on which the soundness of every call rests: nobody but a [`Lab`] uses the addresses of its arena. They lie far
//! below those that the kernel hands out, nothing is mapped there when the lab opens, and no reference into them is ever
//! made: loads and stores go through the kernel and answer `EFAULT` instead of raising a signal.

mod call;
mod fork;
mod ksm;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use interleave::{AtomicBool, Ordering};
use mmu_notifier::{PAGE_SIZE, Range};

use crate::sys::map::Mapping;
use crate::sys::{self as host, lab as sys};

pub use call::{Answer, Backing, Call, Rights};
pub use fork::Fork;
pub use ksm::Ksm;
pub use rustix::io::Errno;

/// One lab a process: two could be given the same arena.
static OPEN: AtomicBool = AtomicBool::const_new(false);

/// See the module.
#[derive(Debug)]
pub struct Lab {
    arena: Range,
    file: File,
    /// Never written to, so it has no anon_vma and fork does not announce it.
    mark: Mapping,
}

impl Lab {
    /// Keeps `arena` for experiments, with an empty memfd.
    ///
    /// # Errors
    /// `EBUSY` if this process has a lab; `EEXIST` if something is mapped there; what `memfd_create` says.
    pub fn open(arena: Range) -> io::Result<Lab> {
        if OPEN.swap(true, Ordering::SeqCst) {
            return Err(Errno::BUSY.into());
        }
        let lab = sys::is_free(arena).and_then(|()| {
            Ok(Lab { arena, file: sys::memfd()?, mark: Mapping::anonymous(PAGE_SIZE as usize)? })
        });
        if lab.is_err() {
            OPEN.store(false, Ordering::SeqCst);
        }
        lab
    }

    /// Makes it as new: nothing mapped, another file, of `pages` pages.
    ///
    /// # Errors
    /// What `memfd_create` or `ftruncate` say.
    pub fn renew(&mut self, pages: u64) -> io::Result<()> {
        sys::unmap(self.arena)?;
        self.file = sys::memfd()?;
        self.call(&Call::Truncate { pages }).map(drop).map_err(io::Error::from)
    }

    /// Unmaps what is mapped.
    ///
    /// # Errors
    /// What `munmap` says.
    pub fn clear(&self) -> io::Result<()> {
        sys::unmap(self.arena)
    }

    /// As [`Lab::renew`], with a file on a disk (in the directory for temporary files), written page by page: all of it is
    /// in the page cache.
    ///
    /// # Errors
    /// What `open` with `O_TMPFILE` or `pwrite` say.
    pub fn renew_on_disk(&mut self, pages: u64) -> io::Result<()> {
        sys::unmap(self.arena)?;
        self.file = sys::unnamed(&std::env::temp_dir())?;
        let write = |page| self.call(&Call::WriteFile { page, value: 0 }).map(drop).map_err(io::Error::from);
        (0..pages).try_for_each(write)
    }

    /// Sets a breakpoint on the first byte of page `page` of the file, in every process that maps it. Closing the
    /// descriptor takes it out again.
    ///
    /// # Errors
    /// What `perf_event_open` says: no such instruction, no uprobes, not permitted.
    pub fn probe(&self, page: u64) -> io::Result<OwnedFd> {
        let path = std::ffi::CString::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        host::perf::uprobe(&path, page * PAGE_SIZE)
    }

    /// Has every CPU put the pages that it batches on their lists, so that nobody holds a page for a moment only.
    pub fn drain(&self) {
        host::mm::drain_lru_batches(self.mark_range());
    }

    /// The addresses that calls may change.
    #[must_use]
    pub fn arena(&self) -> Range {
        self.arena
    }

    /// Makes one system call. May sleep.
    ///
    /// # Errors
    /// What the kernel says; `EINVAL` outside of the arena; a load or store that would raise a signal: `EFAULT`.
    pub fn call(&self, call: &Call) -> Answer {
        sys::call(self.arena, &self.file, call)
    }

    /// Makes the kernel announce exactly [`Lab::mark_range`]: a mark in the stream of announcements.
    ///
    /// # Errors
    /// What `madvise` says.
    pub fn mark(&self) -> io::Result<()> {
        self.mark.advise(libc::MADV_DONTNEED)
    }

    /// What [`Lab::mark`] announces, and nothing else does.
    #[must_use]
    pub fn mark_range(&self) -> Range {
        // A mapping is a range of user space.
        Range::new(self.mark.ptr().addr().get() as u64, PAGE_SIZE).unwrap_or(Range::ALL)
    }

    /// A child process with a copy of everything.
    ///
    /// # Errors
    /// What `fork` says.
    pub fn fork(&self) -> io::Result<Fork<'_>> {
        Fork::new(self)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Fails only for want of memory to split a mapping, which whole ones do not need.
        let _ = sys::unmap(self.arena);
        OPEN.store(false, Ordering::SeqCst);
    }
}

/// Takes away what makes the same calls end differently: the calling thread, and threads and processes that it makes
/// from now on, run on one CPU; the process gets no huge pages.
///
/// # Errors
/// What the kernel says.
pub fn calm() -> io::Result<()> {
    let allowed = rustix::thread::sched_getaffinity(None)?;
    let mut one = rustix::thread::CpuSet::new();
    let first = (0..rustix::thread::CpuSet::MAX_CPU).find(|&cpu| allowed.is_set(cpu));
    one.set(first.unwrap_or_default());
    rustix::thread::sched_setaffinity(None, &one)?;
    sys::disable_huge_pages()
}
