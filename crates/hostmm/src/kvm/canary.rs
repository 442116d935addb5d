// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page of our own, changed on purpose: what is heard of it says whether the source may be trusted.

use super::OpenError;
use super::layout::Kind;
use super::monitor::Record;
use super::shared::Shared;
use crate::sys::map::Mapping;
use crate::sys::ringbuf::RingReader;
use mmu_notifier::{PageAddr, Range};
use std::io;
use std::sync::Arc;

/// A private page that holds nothing.
#[derive(Debug)]
pub struct Canary(Mapping);

impl Canary {
    /// Reserves the page.
    ///
    /// # Errors
    /// No memory.
    pub fn reserve() -> io::Result<Canary> {
        Ok(Canary(Mapping::anonymous(4096)?))
    }

    /// The page.
    pub fn range(&self) -> Range {
        Range::page(PageAddr::containing(self.0.ptr().as_ptr() as u64))
    }

    /// Makes the kernel announce the page: MADV_DONTNEED does so even where nothing is mapped (measured on 6.18).
    pub(crate) fn poke(&self) {
        // Fails only for a range that is not ours, and then there is nothing to announce.
        let _ = self.0.advise(libc::MADV_DONTNEED);
    }

    /// Maps a fresh page over it, which unmaps the old one: what munmap does, without losing the address.
    fn overlay(&self) -> io::Result<()> {
        let ptr = self.0.ptr().as_ptr();
        // SAFETY: the page is ours, holds nothing and nothing borrows from it; the write touches it first, so that
        // there is something to unmap.
        let new = unsafe {
            ptr.write_volatile(1);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            libc::mmap(ptr.cast(), self.0.len(), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if new == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Changes the page several times and demands that counters, bucket and record tell of exactly that.
pub(crate) fn verify(
    canary: &Canary,
    shared: &Arc<Shared>,
    mut ring: Option<&mut RingReader>,
) -> Result<(), OpenError> {
    let range = canary.range();
    let global = shared.heads(Kind::Unmap);
    let local = shared.local(Kind::Unmap, range);
    let bucket = local.last().copied();
    for how in ["madvise", "munmap", "madvise", "munmap"] {
        let before: u64 = global.iter().map(|w| w.load()).sum();
        let bucket_before = bucket.map(|b| b.load());
        if how == "madvise" {
            canary.poke();
        } else {
            canary.overlay().map_err(super::error::system("changing the canary page"))?;
        }
        if global.iter().map(|w| w.load()).sum::<u64>() == before {
            return Err(OpenError::Canary(format!("{how} did not move the global counter")));
        }
        if bucket.is_some_and(|b| Some(b.load()) == bucket_before) {
            return Err(OpenError::Canary(format!("{how} of {range:?} did not move its bucket")));
        }
        if let Some(ring) = ring.as_deref_mut() {
            verify_record(ring, range, how)?;
        }
    }
    Ok(())
}

/// The record of the page must be in the ring; others' may be too.
fn verify_record(ring: &mut RingReader, range: Range, how: &str) -> Result<(), OpenError> {
    let mut seen = 0;
    loop {
        match ring.next::<{ super::program::RECORD_WORDS }>() {
            Ok(Some(words)) => {
                let r = Record::from_words(words);
                if (r.kind, r.start, r.end) == (Kind::Unmap, range.start(), range.end()) && r.ktime_ns != 0 {
                    return Ok(());
                }
                seen += 1;
            }
            Ok(None) => {
                return Err(OpenError::Canary(format!(
                    "{how} of {range:?} is in none of the {seen} records"
                )));
            }
            Err(len) => return Err(OpenError::Canary(format!("a record of {len} bytes"))),
        }
    }
}
