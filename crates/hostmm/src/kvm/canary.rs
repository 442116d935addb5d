// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page of our own, changed on purpose: what is heard of it says whether the source may be trusted.

use super::OpenError;
use super::layout::Kind;
use super::perf_rings::{self, Fields};
use super::program::RECORD_WORDS;
use super::record::Record;
use super::shared::{Counters, Shared};
use crate::sys::map::Mapping;
use crate::sys::ringbuf::RingReader;
use mmu_notifier::{PageAddr, Range};
use std::io;

/// A private page that holds nothing.
#[derive(Debug)]
pub(crate) struct Canary(Mapping);

impl Canary {
    /// Reserves the page.
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn reserve() -> io::Result<Canary> {
        Ok(Canary(Mapping::anonymous(4096)?))
    }

    /// The page.
    pub(crate) fn range(&self) -> Range {
        let page = PageAddr::containing(self.0.ptr().as_ptr() as u64);
        Range::page(page.unwrap_or_else(|_| unreachable!("mmap without a hint stays below TASK_SIZE")))
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

/// Where records can be read while nobody else does, for the check alone.
pub(crate) enum Records<'a> {
    None,
    Bpf(&'a mut RingReader),
    Perf(Fields),
}

/// How often a change is made again whose record had no room: other VMs of the machine fill the ring too.
const ATTEMPTS: u32 = 100;

/// Changes the page several times and demands that counters, bucket and record tell of exactly that.
pub(crate) fn verify(canary: &Canary, shared: &Shared, mut records: Records<'_>) -> Result<(), OpenError> {
    let range = canary.range();
    for how in ["madvise", "munmap", "madvise", "munmap"] {
        let mut attempts = 1..ATTEMPTS;
        while !is_told(canary, shared, &mut records, how)? {
            if attempts.next().is_none() {
                return Err(OpenError::Canary(format!(
                    "no record tells of {how} of {range:?}: the ring overflows as fast as it is read, or holds what is no record"
                )));
            }
        }
    }
    Ok(())
}

/// Changes it once. `false` if records were lost meanwhile, and with them perhaps the one that matters.
fn is_told(
    canary: &Canary,
    shared: &Shared,
    records: &mut Records<'_>,
    how: &str,
) -> Result<bool, OpenError> {
    let range = canary.range();
    let global = shared.heads(Kind::Unmap);
    let bucket = shared.local(Kind::Unmap, range).last().copied();
    if let Records::Bpf(ring) = records {
        drain(ring)?;
    }
    let lost = shared.lost();
    let before: Vec<u64> = global.iter().map(|w| w.load()).collect();
    let bucket_before = bucket.map(|b| b.load());
    if how == "madvise" {
        canary.poke();
    } else {
        canary.overlay().map_err(super::error::system("changing the canary page"))?;
    }
    if global.iter().map(|w| w.load()).eq(before.iter().copied()) {
        return Err(OpenError::Canary(format!("{how} of {range:?} did not move the global counter")));
    }
    if bucket.is_some_and(|b| Some(b.load()) == bucket_before) {
        return Err(OpenError::Canary(format!("{how} of {range:?} did not move its bucket")));
    }
    let of_canary = |r: &Record| (r.kind, r.start, r.end) == (Kind::Unmap, range.start(), range.end());
    let (heard, complete) = match records {
        Records::None => (true, true),
        Records::Bpf(ring) => {
            let heard = drain(ring)?.iter().any(|r| of_canary(r) && r.ktime_ns != 0);
            (heard, shared.lost() == lost)
        }
        Records::Perf(fields) => {
            let (records, complete) = perf_records(shared, &before, *fields);
            (records.iter().any(of_canary), complete)
        }
    };
    if !heard && complete {
        return Err(OpenError::Canary(format!("no record tells of {how} of {range:?}")));
    }
    Ok(heard)
}

fn drain(ring: &mut RingReader) -> Result<Vec<Record>, OpenError> {
    let mut out = Vec::new();
    loop {
        match ring.next::<RECORD_WORDS>() {
            Ok(Some(words)) => out.push(Record::from_words(words)),
            Ok(None) => return Ok(out),
            Err(len) => return Err(OpenError::Canary(format!("a record of {len} bytes"))),
        }
    }
}

/// What was written to the rings since the heads `from`, and whether it is all: a ring that was overwritten meanwhile
/// gives nothing.
fn perf_records(shared: &Shared, from: &[u64], fields: Fields) -> (Vec<Record>, bool) {
    let Counters::Perf { rings, .. } = &*shared.counters else { return (Vec::new(), true) };
    let read = |(ring, mut tail)| perf_rings::read(ring, &mut tail, 0, fields);
    let read: Vec<_> = rings.iter().zip(from.iter().copied()).map(read).collect();
    let complete = read.iter().all(Option::is_some);
    (read.into_iter().flatten().flatten().collect(), complete)
}
