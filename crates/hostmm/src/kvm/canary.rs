// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page of our own, changed on purpose: what is heard of it says whether the source may be trusted.

use super::OpenError;
use super::layout::Kind;
use super::perf_rings::{self, Fields};
use super::program::RECORD_WORDS;
use super::record::Record;
use super::shared::{Counters, Shared};
use crate::sys::map::{Mapping, Word};
use crate::sys::ringbuf::RingReader;
use mmu_notifier::{PageAddr, Range};
use std::io;

/// A private page that holds nothing, and addresses behind it, which are kept: what is still told of them when the source
/// is open must be nobody's.
#[derive(Debug)]
pub(crate) struct Canary {
    page: Mapping,
    _room: Mapping,
}

const PAGE: usize = 4096;
/// Bytes that hold a wide granule of the [default layout](super::Buckets) wherever they start.
const SPAN: usize = 8 << 20;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

impl Canary {
    /// Reserves the page.
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn reserve() -> io::Result<Canary> {
        let mut page = Mapping::reserved(SPAN)?;
        let _room = page.split_off(PAGE);
        let canary = Canary { page, _room };
        canary.overlay(PAGE, RW)?;
        Ok(canary)
    }

    /// The page.
    pub(crate) fn range(&self) -> Range {
        let page = PageAddr::containing(self.page.ptr().as_ptr() as u64);
        Range::page(page.unwrap_or_else(|_| unreachable!("mmap without a hint stays below TASK_SIZE")))
    }

    /// Makes the kernel announce the page: MADV_DONTNEED does so even where nothing is mapped (measured on 6.18).
    pub(crate) fn poke(&self) {
        // Fails only for a range that is not ours, and then there is nothing to announce.
        let _ = self.page.advise(libc::MADV_DONTNEED);
    }

    /// Maps fresh memory over `len` bytes from the page on, which unmaps the old: what munmap does, without losing the
    /// address.
    fn overlay(&self, len: usize, prot: i32) -> io::Result<()> {
        assert!(len <= SPAN, "{len} bytes");
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let ptr = self.page.ptr().as_ptr().cast();
        // SAFETY: page and room are ours, lie one behind the other, hold nothing, and nothing borrows from them.
        let new = unsafe { libc::mmap(ptr, len, prot, flags, -1, 0) };
        if new == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Has the kernel announce what `change` says.
    fn make(&self, change: &Change) -> io::Result<()> {
        if change.how == How::Madvise {
            self.poke();
            return Ok(());
        }
        // Touched first, so that there is something to unmap.
        // SAFETY: the page is ours, writable, and nothing borrows from it.
        unsafe { self.page.ptr().as_ptr().write_volatile(1) };
        match change.how {
            How::Wide => {
                self.overlay(SPAN, libc::PROT_NONE)?;
                self.overlay(PAGE, RW)
            }
            _ => self.overlay(PAGE, RW),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Madvise,
    Munmap,
    /// munmap of the room behind it too.
    Wide,
}

/// A change that is made to be heard.
struct Change {
    how: How,
    range: Range,
    /// The word that tells of it and of little else.
    word: Option<Word>,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = if self.how == How::Madvise { "madvise" } else { "munmap" };
        write!(f, "{name} of {:?}", self.range)
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
    let page = canary.range();
    let word = shared.local(Kind::Unmap, page).last().copied();
    let twice = [How::Madvise, How::Munmap, How::Madvise, How::Munmap];
    let changes = twice.into_iter().map(|how| Change { how, range: page, word });
    for change in changes.chain(wide(page, shared)) {
        let mut attempts = 1..ATTEMPTS;
        while !is_told(canary, shared, &mut records, &change)? {
            if attempts.next().is_none() {
                return Err(OpenError::Canary(format!(
                    "no record tells of {change}: the ring overflows as fast as it is read, or holds what is no record"
                )));
            }
        }
    }
    Ok(())
}

/// The change of page and room, and the word of a wide granule in it; `None` if none fits in.
fn wide(page: Range, shared: &Shared) -> Option<Change> {
    let range = Range::new(page.start(), SPAN as u64).ok()?;
    let bytes = match &*shared.counters {
        Counters::Bpf { layout, .. } => layout.buckets.map(|b| u64::from(b.wide) << b.granule_shift),
        Counters::Perf { .. } => None,
    };
    let Some(bytes) = bytes else { return Some(Change { how: How::Wide, range, word: None }) };
    let whole = Range::new(range.start().next_multiple_of(bytes), bytes).ok()?;
    let first = Range::page(whole.first_page());
    let word = shared.local(Kind::Unmap, first).first().copied();
    range.contains(whole).then_some(Change { how: How::Wide, range, word })
}

/// Makes the change once. `false` if records were lost meanwhile, and with them perhaps the one that matters.
fn is_told(
    canary: &Canary,
    shared: &Shared,
    records: &mut Records<'_>,
    change: &Change,
) -> Result<bool, OpenError> {
    let range = change.range;
    let global = shared.heads(Kind::Unmap);
    if let Records::Bpf(ring) = records {
        drain(ring)?;
    }
    let lost = shared.lost();
    let before: Vec<u64> = global.iter().map(|w| w.load()).collect();
    let word_before = change.word.map(Word::load);
    canary.make(change).map_err(super::error::system("changing the canary page"))?;
    if global.iter().map(|w| w.load()).eq(before.iter().copied()) {
        return Err(OpenError::Canary(format!("{change} did not move the global counter")));
    }
    if change.word.is_some_and(|word| Some(word.load()) == word_before) {
        return Err(OpenError::Canary(format!("{change} did not move its bucket")));
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
        return Err(OpenError::Canary(format!("no record tells of {change}")));
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
