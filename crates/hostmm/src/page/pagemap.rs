// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reading `/proc/PID/pagemap`, `/proc/kpageflags` and `/proc/kpagecount`.
//!
//! A descriptor of pagemap belongs to the mm of the process that it was opened for, also after a fork: a child that
//! reads its parent's descriptor gets its parent's pages. [`Owner`] refuses that.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use mmu_notifier::{PageAddr, Range};

use super::entry::{PagemapEntry, Pfn};
use super::error::PageError;
use crate::sys::wipe::MmMark;

/// Bytes in a word of each of the files.
const WORD: usize = 8;
/// Words per read: the kernel fills at most so many at once and allocates for them.
const BATCH: usize = 4096;

/// Whose address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PidOrSelf {
    /// The calling process.
    Myself,
    /// Another process, by its number.
    Pid(u32),
}

impl PidOrSelf {
    pub(super) fn path(self, file: &str) -> PathBuf {
        match self {
            PidOrSelf::Myself => format!("/proc/self/{file}").into(),
            PidOrSelf::Pid(pid) => format!("/proc/{pid}/{file}").into(),
        }
    }

    pub(super) fn pid(self) -> Option<u32> {
        match self {
            PidOrSelf::Myself => None,
            PidOrSelf::Pid(pid) => Some(pid),
        }
    }
}

/// The mm of a handle on its opener's own memory; none for a handle on another process.
#[derive(Debug)]
pub(super) struct Owner(Option<MmMark>);

impl Owner {
    pub(super) fn new(who: PidOrSelf) -> Result<Owner, PageError> {
        match who {
            PidOrSelf::Myself => match MmMark::new() {
                Ok(mark) => Ok(Owner(Some(mark))),
                Err(e) => Err(PageError::from_io(who.path("maps"), e, None)),
            },
            PidOrSelf::Pid(_) => Ok(Owner(None)),
        }
    }

    pub(super) fn check(&self) -> Result<(), PageError> {
        match &self.0 {
            Some(mark) if !mark.is_here() => Err(PageError::Forked),
            _ => Ok(()),
        }
    }
}

/// An open `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    path: PathBuf,
    who: PidOrSelf,
    owner: Owner,
}

impl Pagemap {
    /// Open it.
    ///
    /// # Errors
    /// [`PageError::Permission`], [`PageError::NoProcess`].
    pub fn open(who: PidOrSelf) -> Result<Pagemap, PageError> {
        let path = who.path("pagemap");
        let file = File::open(&path).map_err(|e| PageError::from_io(&path, e, who.pid()))?;
        Ok(Pagemap { file, path, who, owner: Owner::new(who)? })
    }

    /// The entry of one page. A page of no mapping has the entry 0, as has one that was never touched.
    ///
    /// # Errors
    /// [`PageError::Forked`], [`PageError::NoProcess`].
    pub fn entry(&self, page: PageAddr) -> Result<PagemapEntry, PageError> {
        let mut word = [0; WORD];
        self.read(page, &mut word)?;
        Ok(PagemapEntry::from_raw(u64::from_ne_bytes(word)))
    }

    /// The entries of all pages of a range, in order. They are not a snapshot: each is of its own moment.
    ///
    /// # Errors
    /// As for [`Pagemap::entry`].
    pub fn entries(&self, range: Range) -> Result<Vec<PagemapEntry>, PageError> {
        let mut entries = Vec::with_capacity(range.pages() as usize);
        let mut buf = vec![0; BATCH.min(range.pages() as usize) * WORD];
        let mut pages = range.iter_pages();
        while let Some(first) = pages.next() {
            let n = BATCH.min(pages.len() + 1);
            let bytes = &mut buf[..n * WORD];
            self.read(first, bytes)?;
            entries.extend(words(bytes).map(PagemapEntry::from_raw));
            if n > 1 {
                pages.nth(n - 2);
            }
        }
        Ok(entries)
    }

    fn read(&self, first: PageAddr, bytes: &mut [u8]) -> Result<(), PageError> {
        self.owner.check()?;
        self.file.read_exact_at(bytes, first.vpn() * WORD as u64).map_err(|e| match e.kind() {
            // The mm of an exited process reads as an empty file.
            io::ErrorKind::UnexpectedEof => PageError::NoProcess { pid: self.who.pid().unwrap_or(0) },
            _ => PageError::from_io(&self.path, e, self.who.pid()),
        })
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<WORD>().0.iter().map(|w| u64::from_ne_bytes(*w))
}

/// `/proc/kpageflags` or `/proc/kpagecount`: a word for each page frame.
#[derive(Debug)]
pub(super) struct FrameFile {
    file: File,
    path: &'static str,
}

impl FrameFile {
    pub(super) fn open(path: &'static str) -> Result<FrameFile, PageError> {
        let file = File::open(path).map_err(|e| PageError::from_io(path, e, None))?;
        Ok(FrameFile { file, path })
    }

    pub(super) fn word(&self, pfn: Pfn) -> Result<u64, PageError> {
        let mut word = [0; WORD];
        self.file
            .read_exact_at(&mut word, pfn.get() * WORD as u64)
            .map_err(|e| PageError::from_io(self.path, e, None))?;
        Ok(u64::from_ne_bytes(word))
    }
}
