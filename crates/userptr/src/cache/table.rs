// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which entries could contain a range? Answered without a lock.
//!
//! An entry of up to 4^n pages is on *level* n and listed under the one or two aligned blocks of 4^n pages that it
//! touches. Whatever contains a page is listed under that page's block on its own level, and whatever contains a range
//! is on the range's level or above: a lookup asks once a level in use, beginning with its own, and most programs use
//! few.
//!
//! The lists are one open-addressed hash table. Writers hold the cache's books; readers hold nothing and may miss an
//! entry that is being moved. They never see one that is not there: what they find is a candidate, which its
//! [state](super::slab) confirms. Whoever misses looks again in the books.
//!
//! Neighbours lie together: the words of eight blocks in a row are asked for in one cache line, so that a program that
//! registers an arena page by page touches an eighth of the lines that a hash of each page would.
//!
//! Invariants: at most three quarters of the words are used, so that a probe ends; a word is 0, or a tag of 40 bits
//! and an index plus one; between a word and the place that its hash asks for, no word is 0.

use interleave::{AtomicU64, AtomicWords, Here, Ordering};
use mmu_notifier::{PAGE_SHIFT, PAGE_SIZE, Range};

/// 4^18 pages are all of user space.
const LEVELS: usize = 19;
const INDEX_BITS: u32 = 24;
/// Of a name, those below are the block: all that a page number of user space has.
const LEVEL_AT: u32 = 35;
/// Of a block, the bits that say where in a cache line of words it is asked for.
const TOGETHER: u32 = 3;
/// Entries that a table can name.
pub(crate) const MAX_ENTRIES: usize = (1 << INDEX_BITS) - 2;

pub(crate) struct Table {
    words: AtomicWords,
    /// One less than there are words, a power of two.
    mask: usize,
    /// Leaves as many bits of a hash as the mask has.
    shift: u32,
    /// A bit for each level in use.
    levels: AtomicU64,
}

/// What writers must know; part of the books.
#[derive(Debug, Default)]
pub(crate) struct Levels([u32; LEVELS]);

fn level(range: Range) -> u32 {
    let pages = range.pages();
    (u64::BITS - (pages - 1).leading_zeros()).div_ceil(2)
}

/// A block and its level: what a word is listed under.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Name(u64);

impl Name {
    #[inline(always)]
    fn new(page: u64, level: u32) -> Name {
        Name(u64::from(level) << LEVEL_AT | page >> (2 * level))
    }

    /// Its high bits say where.
    #[inline(always)]
    fn hash(self) -> u64 {
        (self.0 >> TOGETHER).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// All of it that an address can have: equal words are equal names.
    #[inline(always)]
    fn word(self, index: u32) -> u64 {
        self.0 << INDEX_BITS | (u64::from(index) + 1)
    }
}

#[inline(always)]
fn tag(word: u64) -> u64 {
    word >> INDEX_BITS
}

#[inline(always)]
fn index(word: u64) -> u32 {
    (word as u32 & ((1 << INDEX_BITS) - 1)) - 1
}

impl Table {
    /// For `capacity` entries, at most [`MAX_ENTRIES`].
    pub(crate) fn new(capacity: usize) -> Table {
        let words = (capacity * 8 / 3 + 1).next_power_of_two();
        Table {
            words: AtomicWords::new(words, 0),
            mask: words - 1,
            shift: (u64::BITS - words.trailing_zeros()).min(63),
            levels: AtomicU64::new(0),
        }
    }

    #[inline(always)]
    fn home(&self, name: Name) -> usize {
        (name.hash() >> self.shift ^ name.0 & ((1 << TOGETHER) - 1)) as usize & self.mask
    }

    /// The entries that could contain `range`, and some that do not.
    #[inline(always)]
    pub(crate) fn candidates(&self, here: Here, range: Range) -> Candidates<'_> {
        let first = level(range);
        let levels = self.levels.load_here(here, Ordering::Acquire) >> first << first;
        Candidates {
            table: self,
            here,
            page: range.start() >> PAGE_SHIFT,
            levels,
            name: Name::default(),
            at: 0,
            left: 0,
        }
    }

    /// The first of the [candidates](Self::candidates), which mostly is the one.
    #[inline(always)]
    pub(crate) fn candidate(&self, here: Here, range: Range) -> Option<u32> {
        let mut levels = self.levels.load_here(here, Ordering::Acquire);
        // What contains a page may be on any.
        if range.len() > PAGE_SIZE {
            let first = level(range);
            levels = levels >> first << first;
        }
        while levels != 0 {
            let level = levels.trailing_zeros();
            levels &= levels - 1;
            let name = Name::new(range.start() >> PAGE_SHIFT, level);
            let home = self.home(name);
            let found = self.words.word(home).load_here(here, Ordering::Acquire);
            if found != 0 {
                if tag(found ^ name.word(0)) == 0 {
                    return Some(index(found));
                }
                let found = self.behind(here, name, home);
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }

    /// The first candidate of this name, whose home is another's.
    #[inline(never)]
    fn behind(&self, here: Here, name: Name, home: usize) -> Option<u32> {
        let words = (1..=self.mask).map(|n| self.words.word((home + n) & self.mask));
        let used = words.map(|word| word.load_here(here, Ordering::Acquire)).take_while(|found| *found != 0);
        used.filter(|found| tag(found ^ name.word(0)) == 0).map(index).next()
    }

    fn names(range: Range) -> impl Iterator<Item = Name> {
        let level = level(range);
        let name = |addr: u64| Name::new(addr >> PAGE_SHIFT, level).0;
        (name(range.start())..=name(range.end() - 1)).map(Name)
    }

    /// Lists `index` under `range`. The caller holds the books.
    pub(crate) fn insert(&self, levels: &mut Levels, range: Range, index: u32) {
        let mask = self.mask;
        for name in Self::names(range) {
            let mut at = self.home(name);
            while self.words.word(at).load(Ordering::Relaxed) != 0 {
                at = (at + 1) & mask;
            }
            self.words.word(at).store(name.word(index), Ordering::Release);
        }
        let level = level(range);
        levels.0[level as usize] += 1;
        self.levels.fetch_or(1 << level, Ordering::Release);
    }

    /// Strikes `index` off. The caller holds the books; `range_of` tells where the entries are that are listed.
    pub(crate) fn remove(
        &self,
        levels: &mut Levels,
        range: Range,
        index: u32,
        range_of: impl Fn(u32) -> Range,
    ) {
        let mask = self.mask;
        for name in Self::names(range) {
            let mut at = self.home(name);
            while self.words.word(at).load(Ordering::Relaxed) != name.word(index) {
                at = (at + 1) & mask;
            }
            self.close_gap(at, &range_of);
        }
        let level = level(range);
        levels.0[level as usize] -= 1;
        if levels.0[level as usize] == 0 {
            self.levels.fetch_and(!(1 << level), Ordering::Release);
        }
    }

    /// Frees the word at `gap`, moving up those behind it that a probe would no longer reach.
    fn close_gap(&self, mut gap: usize, range_of: &impl Fn(u32) -> Range) {
        let mask = self.mask;
        let mut at = gap;
        loop {
            at = (at + 1) & mask;
            let found = self.words.word(at).load(Ordering::Relaxed);
            if found == 0 {
                break;
            }
            let range = range_of(index(found));
            let home = Self::names(range)
                .find(|name| tag(name.word(0)) == tag(found))
                .map_or(at, |name| self.home(name));
            // It may move if its home is not behind the gap.
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(gap) & mask {
                // First here, then no longer there: a reader sees it at least once, or misses it.
                self.words.word(gap).store(found, Ordering::Release);
                gap = at;
            }
        }
        self.words.word(gap).store(0, Ordering::Release);
    }
}

/// See [`Table::candidates`].
pub(crate) struct Candidates<'t> {
    table: &'t Table,
    here: Here,
    page: u64,
    /// Not yet looked at.
    levels: u64,
    /// Of the block on the level that is looked at.
    name: Name,
    /// The next word to look at.
    at: usize,
    /// How many there are still, at most: the whole table once, whatever writers do.
    left: usize,
}

impl Iterator for Candidates<'_> {
    type Item = u32;

    #[inline(always)]
    fn next(&mut self) -> Option<u32> {
        loop {
            if self.left == 0 {
                if self.levels == 0 {
                    return None;
                }
                let level = self.levels.trailing_zeros();
                self.levels &= self.levels - 1;
                self.name = Name::new(self.page, level);
                self.at = self.table.home(self.name);
                self.left = self.table.mask + 1;
            }
            let found = self.table.words.word(self.at).load_here(self.here, Ordering::Acquire);
            self.at = (self.at + 1) & self.table.mask;
            self.left -= 1;
            if found == 0 {
                self.left = 0;
            } else if tag(found) == tag(self.name.word(0)) {
                return Some(index(found));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn pages(first: u64, pages: u64) -> Range {
        Range::new(first << PAGE_SHIFT, pages << PAGE_SHIFT).unwrap()
    }

    #[test]
    fn levels_are_powers_of_four() {
        let of = |n| level(pages(1, n));
        assert_eq!([1, 2, 4, 5, 16, 17, 64, 65].map(of), [0, 1, 1, 2, 2, 3, 3, 4]);
        assert_eq!(level(Range::ALL) as usize, LEVELS - 1);
    }

    proptest! {
        #[test]
        fn every_entry_that_contains_a_range_is_a_candidate(
            ops in prop::collection::vec((0..12_u32, 0..64_u64, 1..40_u64), 1..80),
            want in (0..100_u64, 1..20_u64),
        ) {
            let (table, mut levels) = (Table::new(12), Levels::default());
            let mut model = BTreeMap::new();
            for (index, first, len) in ops {
                if let Some(range) = model.get(&index).copied() {
                    table.remove(&mut levels, range, index, |i| model[&i]);
                    model.remove(&index);
                } else {
                    let range = pages(first, len);
                    model.insert(index, range);
                    table.insert(&mut levels, range, index);
                }
                let want = pages(want.0, want.1);
                let first = table.candidates(Here::ask(), want).next();
                prop_assert_eq!(table.candidate(Here::ask(), want), first);
                for (index, range) in model.iter().filter(|(_, range)| range.contains(want)) {
                    prop_assert!(table.candidates(Here::ask(), want).any(|i| i == *index), "{want} in {range}");
                }
                let strangers = table.candidates(Here::ask(), want).filter(|i| !model.contains_key(i)).count();
                prop_assert_eq!(strangers, 0, "a candidate that is not listed");
            }
            for (index, range) in model.clone() {
                table.remove(&mut levels, range, index, |i| model[&i]);
                model.remove(&index);
            }
            prop_assert!((0..table.words.len()).all(|w| table.words.word(w).load(Ordering::Relaxed) == 0));
        }
    }
}
