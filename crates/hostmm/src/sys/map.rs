// SPDX-License-Identifier: MIT OR Apache-2.0
//! One mapping that is unmapped when dropped.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use mmu_notifier::PageAddr;

/// A mapping that this process made. Invariant: `[ptr, ptr + len)` is ours until drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the mm, not to a thread; what may be done with its bytes is up to its owner.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Mapping` itself lends only the address.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn map(len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> io::Result<Mapping> {
        // SAFETY: without MAP_FIXED the kernel picks a free range, so no existing memory is touched.
        let ptr = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, offset) };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ptr =
            NonNull::new(ptr.cast::<u8>()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(Mapping { ptr, len })
    }

    /// `len` bytes of `fd` from `offset`, shared, with `prot`.
    pub(crate) fn shared(fd: BorrowedFd<'_>, len: usize, prot: i32, offset: i64) -> io::Result<Mapping> {
        Mapping::map(len, prot, libc::MAP_SHARED, fd.as_raw_fd(), offset)
    }

    /// Maps the pages at `of`, a shared mapping, a second time: `len` bytes from there on, which may reach past the
    /// end of the file, with the same rights.
    ///
    /// # Errors
    /// `EINVAL` for private mappings (Linux 4.14), `EFAULT` where nothing is mapped or a mapping may not grow.
    pub(crate) fn second(of: PageAddr, len: usize) -> io::Result<Mapping> {
        // SAFETY: an old size of 0 leaves the old mapping as it is and maps its pages at a free address.
        let ptr = unsafe { libc::mremap(of.get() as *mut libc::c_void, 0, len, libc::MREMAP_MAYMOVE) };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ptr =
            NonNull::new(ptr.cast::<u8>()).ok_or_else(|| io::Error::other("mremap returned address 0"))?;
        Ok(Mapping { ptr, len })
    }

    /// Private anonymous memory, readable and writable.
    pub(crate) fn anonymous(len: usize) -> io::Result<Mapping> {
        Mapping::map(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// Addresses with nothing behind them.
    pub(crate) fn reserved(len: usize) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Mapping::map(len, libc::PROT_NONE, flags, -1, 0)
    }

    /// Shared anonymous memory, readable and writable: a forked child has the same pages.
    pub(crate) fn shared_anonymous(len: usize) -> io::Result<Mapping> {
        Mapping::map(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// madvise(2) over the whole mapping.
    pub(crate) fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range is ours; callers pass advice that their own contents can bear (WIPEONFORK, DONTFORK,
        // DONTNEED of a page that holds nothing).
        if unsafe { libc::madvise(self.ptr.as_ptr().cast(), self.len, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Cuts off what lies behind the first `len` bytes, whole pages and not all of it.
    pub(crate) fn split_off(&mut self, len: usize) -> Mapping {
        assert!(len.is_multiple_of(4096) && 0 < len && len < self.len, "{len} of {} bytes", self.len);
        let rest = self.len - len;
        self.len = len;
        // SAFETY: inside the mapping.
        Mapping { ptr: unsafe { self.ptr.add(len) }, len: rest }
    }

    /// First byte.
    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours and nothing borrows from it any more: every pointer into it is kept beside the
        // mapping by its owner.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

/// One 64-bit word that somebody else writes: the kernel, or another thread.
///
/// Invariant: whoever holds a `Word` also holds the mapping that it points into.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Word(NonNull<Atomic>);

#[expect(clippy::disallowed_types, reason = "words shared with the kernel")]
type Atomic = std::sync::atomic::AtomicU64;

// SAFETY: the word is only read, and atomically.
unsafe impl Send for Word {}
// SAFETY: as above.
unsafe impl Sync for Word {}

impl Word {
    /// The word itself.
    pub(crate) fn of(word: &Atomic) -> Word {
        Word(NonNull::from(word))
    }

    /// Reads it with acquire ordering: what the writer did before is visible, what the reader does after stays after.
    #[inline]
    pub(crate) fn load(self) -> u64 {
        // SAFETY: by the type's invariant the mapping is there; the word is aligned and accessed atomically by all.
        unsafe { self.0.as_ref() }.load(std::sync::atomic::Ordering::Acquire)
    }
}

/// A power of two of such words, one after the other. The same invariant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WordRing {
    first: Word,
    mask: usize,
}

impl WordRing {
    /// The `n`th, counted around.
    #[inline]
    pub(crate) fn at(self, n: u64) -> Word {
        // SAFETY: `Mapping::words` found as many words as the mask can name inside the mapping.
        Word(unsafe { self.first.0.add(n as usize & self.mask) })
    }
}

impl Mapping {
    /// The `count` words, a power of two, from `offset` on; see [`Mapping::word`].
    pub(crate) fn words(&self, offset: usize, count: usize) -> Option<WordRing> {
        let last = offset.checked_add(8 * count.checked_sub(1)?)?;
        let first = self.word(last).and_then(|_| self.word(offset))?;
        count.is_power_of_two().then_some(WordRing { first, mask: count - 1 })
    }

    /// The word at `offset` bytes, which must be a multiple of 8 inside the mapping.
    pub(crate) fn word(&self, offset: usize) -> Option<Word> {
        if !offset.is_multiple_of(8) || offset.checked_add(8)? > self.len {
            return None;
        }
        // SAFETY: inside the mapping by the check above.
        Some(Word(unsafe { self.ptr.add(offset) }.cast()))
    }
}
