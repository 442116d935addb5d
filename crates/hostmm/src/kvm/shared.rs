// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the source, its watches and its monitor share, and the one word that says whether any of it may be trusted.
//!
//! No lock here but that of `subs`; see [`super::subscription`].

use super::error::Gone;
use super::layout::{Buckets, Kind, LOST, Layout};
use super::subscription::Subs;
use crate::sys::map::{Mapping, Word, WordRing};
use crate::sys::perf::Ring;
use crate::sys::wipe::WipePage;
use interleave::{AtomicU64, Ordering};
use mmu_notifier::Range;
use std::mem::ManuallyDrop;

/// Bits of the state word. A forked child reads 0: none of them.
pub(crate) const ALIVE: u64 = 1;
pub(crate) const MONITOR: u64 = 2;
pub(crate) const CLOSED: u64 = 4;

/// Words of the state page: the bits above, and for the one load that a watch makes, two of them as words of their own.
const STATE: usize = 0;
const IS_ALIVE: usize = 1;
/// 1 while both source and monitor are.
const IS_MONITORED: usize = 2;

/// Where the counts are.
#[derive(Debug)]
pub(crate) enum Counters {
    /// In the program's map.
    Bpf { map: Mapping, layout: Layout },
    /// In the heads of the rings, one per CPU.
    Perf { rings: Vec<Ring>, cpus: Vec<u32> },
}

/// Granules that are added up without a look at the one word that counts everything first. With more that is cheaper.
const KEY_GRANULES: u64 = 4;
/// Of a key, those that say which granule is the first. Granules are at least pages, and not more than 2^16 of them are added
/// up, so that there is room.
const KEY_BITS: u32 = 47;

/// Where the counts of ranges are, without a look at the layout. Whoever has it keeps the [`Shared`] that it is of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Near {
    buckets: WordRing,
    wide: WordRing,
    /// log2 of the granules in a wide one.
    wide_shift: u32,
}

/// Does a [key](Shared::key) name so few words that they are asked for themselves?
pub(super) fn is_short(key: u64) -> bool {
    key >> KEY_BITS < KEY_GRANULES
}

impl Near {
    /// The sum of the words that a [key](Shared::key) names. Each only grows, so it moves if and only if one of them
    /// does.
    #[inline]
    pub(super) fn count(&self, key: u64) -> u64 {
        // A bucket's number is counted around, whatever is above it.
        let count = self.buckets.at(key).load().wrapping_add(self.wide.at(key >> self.wide_shift).load());
        match key >> KEY_BITS {
            0 => count,
            more => self.count_more(count, key, more),
        }
    }

    /// The same as [`Layout::words`], where a range of several granules can lie in several wide ones.
    fn count_more(&self, count: u64, key: u64, more: u64) -> u64 {
        let first = key & ((1 << KEY_BITS) - 1);
        let wide = (first >> self.wide_shift) + 1..=(first + more) >> self.wide_shift;
        let buckets = (first + 1..=first + more).map(|granule| self.buckets.at(granule));
        let words = buckets.chain(wide.map(|granule| self.wide.at(granule)));
        words.fold(count, |n, word| n.wrapping_add(word.load()))
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    state: WipePage,
    /// Invariant: mapped for as long as this lives, in the process that made it. A ring's mapping is not inherited
    /// by a child (perf maps with VM_DONTCOPY), which therefore must not unmap it: something else may be there.
    pub(crate) counters: ManuallyDrop<Counters>,
    pub(crate) subs: Subs,
    /// Times that a perf ring was overwritten before it was read.
    overruns: AtomicU64,
}

impl Shared {
    pub(crate) fn new(state: WipePage, counters: Counters) -> Shared {
        Shared {
            state,
            counters: ManuallyDrop::new(counters),
            subs: Subs::new(),
            overruns: AtomicU64::new(0),
        }
    }

    /// Is this the process that opened the source?
    pub(crate) fn at_home(&self) -> bool {
        self.state.words()[STATE].load(Ordering::Acquire) != 0
    }

    pub(crate) fn set(&self, bits: u64) {
        self.state.words()[STATE].fetch_or(bits, Ordering::SeqCst);
        if bits & ALIVE != 0 {
            self.state.words()[IS_ALIVE].store(1, Ordering::SeqCst);
        }
        if bits & MONITOR != 0 {
            self.state.words()[IS_MONITORED].store(1, Ordering::SeqCst);
        }
    }

    /// Bits are cleared once and never set again, so it does not matter in which order the words follow.
    pub(crate) fn clear(&self, bits: u64) {
        self.state.words()[STATE].fetch_and(!bits, Ordering::SeqCst);
        if bits & ALIVE != 0 {
            self.state.words()[IS_ALIVE].store(0, Ordering::SeqCst);
        }
        self.state.words()[IS_MONITORED].store(0, Ordering::SeqCst);
    }

    /// Are all of the bits `need` set? Says what is wrong otherwise.
    pub(crate) fn check(&self, need: u64) -> Result<(), Gone> {
        let word = self.state.words()[STATE].load(Ordering::Acquire);
        if word & need == need {
            return Ok(());
        }
        Err(match word {
            0 => Gone::Forked,
            w if w & CLOSED != 0 => Gone::Closed,
            _ => Gone::MonitorDead,
        })
    }

    pub(crate) fn count_overrun(&self) {
        self.overruns.fetch_add(1, Ordering::Relaxed);
    }

    /// Records lost since the source was opened, or times that some were.
    pub(crate) fn lost(&self) -> u64 {
        match &*self.counters {
            Counters::Bpf { map, .. } => map.word(LOST as usize).map_or(0, Word::load),
            Counters::Perf { .. } => self.overruns.load(Ordering::Relaxed),
        }
    }

    /// The word that is 1 while all of the bits `need` are set, and 0 in a forked child.
    pub(crate) fn state_word(&self, need: u64) -> Word {
        Word::of(&self.state.words()[if need & MONITOR != 0 { IS_MONITORED } else { IS_ALIVE }])
    }

    /// The words whose sum moves with anything at all.
    pub(crate) fn heads(&self, kind: Kind) -> Vec<Word> {
        match &*self.counters {
            Counters::Bpf { map, .. } => map.word(Layout::global(kind) as usize).into_iter().collect(),
            Counters::Perf { rings, .. } => rings.iter().map(|r| Word::of(r.head())).collect(),
        }
    }

    /// Where [`Shared::local`]'s words are, ready to be asked; `None` where only the heads can tell.
    pub(super) fn near(&self, kind: Kind) -> Option<Near> {
        let Counters::Bpf { map, layout } = &*self.counters else { return None };
        let buckets = layout.buckets?;
        Some(Near {
            buckets: map.words(layout.table(kind) as usize, buckets.count as usize)?,
            wide: map.words(layout.wide_table(kind) as usize, Buckets::WIDE_COUNT as usize)?,
            wide_shift: buckets.wide_shift(),
        })
    }

    /// Which words [`Shared::local`] names, for [`Near::count`]; `None` where only the heads can tell.
    pub(super) fn key(&self, range: Range) -> Option<u64> {
        let Counters::Bpf { layout, .. } = &*self.counters else { return None };
        let (first, last) = layout.granules(range)?;
        Some((last - first) << KEY_BITS | first)
    }

    /// The words whose sum moves when something in `range` does; empty where only the heads can tell.
    pub(crate) fn local(&self, kind: Kind, range: Range) -> Vec<Word> {
        match &*self.counters {
            Counters::Bpf { map, layout } => {
                let offsets = layout.words(kind, range).into_iter().flatten();
                offsets.filter_map(|at| map.word(at as usize)).collect()
            }
            Counters::Perf { .. } => Vec::new(),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.at_home() {
            // SAFETY: dropped once, here, and not used afterwards: whoever holds a word of it holds an `Arc` of self.
            unsafe { ManuallyDrop::drop(&mut self.counters) };
        }
    }
}
