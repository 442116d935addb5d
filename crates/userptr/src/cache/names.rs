// SPDX-License-Identifier: MIT OR Apache-2.0
//! Blocks of the address space, and a hash table from them to numbers that is read without a lock.
//!
//! A block is 4^n aligned pages; n is its level. The table is open-addressed. Writers hold the cache's books; readers
//! hold nothing and may miss a number that is being moved. They never see one that is not there.
//!
//! Neighbours lie together: the words of eight blocks in a row are asked for in one cache line, so that a program that
//! registers an arena page by page touches an eighth of the lines that a hash of each page would.
//!
//! Invariants: at most three quarters of the words are used, so that a probe ends; a word is 0, or a name of 40 bits
//! and a number plus one; between a word and the place that its hash asks for, no word is 0.

use interleave::{AtomicWords, Here, Ordering};
use mmu_notifier::{PageAddr, Range};

/// 4^18 pages are all of user space.
pub(super) const LEVELS: usize = 19;
/// Of a word, what is not the name.
pub(super) const NUMBER_BITS: u32 = 24;
/// Of a name, those below are the block: all that a page number of user space has.
const LEVEL_AT: u32 = 35;
/// Of a block, the bits that say where in a cache line of words it is asked for.
const TOGETHER: u32 = 3;

/// That of the blocks of which one or two hold all of `range`.
pub(super) fn level(range: Range) -> u32 {
    let pages = range.pages();
    (u64::BITS - (pages - 1).leading_zeros()).div_ceil(2)
}

/// A block and its level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Name(u64);

impl Name {
    #[inline(always)]
    pub(super) fn new(page: u64, level: u32) -> Name {
        Name(u64::from(level) << LEVEL_AT | page >> (2 * level))
    }

    /// The blocks that `range` touches, of its own level.
    pub(super) fn of(range: Range) -> impl Iterator<Item = Name> {
        let level = level(range);
        let name = |page: PageAddr| Name::new(page.vpn(), level).0;
        (name(range.first_page())..=name(range.last_page())).map(Name)
    }

    /// That of 2^`bits` blocks in a row, and which of them this is. Such names are of a table of their own.
    #[inline(always)]
    pub(super) fn split(self, bits: u32) -> (Name, u32) {
        (Name(self.0 >> bits), self.0 as u32 & ((1 << bits) - 1))
    }

    /// Its high bits say where.
    #[inline(always)]
    fn hash(self) -> u64 {
        (self.0 >> TOGETHER).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// All of it that an address can have: equal words are equal names.
    #[inline(always)]
    fn word(self, number: u32) -> u64 {
        self.0 << NUMBER_BITS | (u64::from(number) + 1)
    }

    /// What a word says, if it is under this name.
    #[inline(always)]
    fn number(self, word: u64) -> Option<u32> {
        let number = word.wrapping_sub(self.word(0));
        if number < 1 << NUMBER_BITS { Some(number as u32) } else { None }
    }

    fn of_word(word: u64) -> Name {
        Name(word >> NUMBER_BITS)
    }
}

/// Numbers under names; a name may have several.
pub(super) struct NameMap {
    /// As many as a power of two says.
    words: AtomicWords,
    /// Leaves as many bits of a hash as there are words.
    shift: u32,
}

impl NameMap {
    /// Of at least `words` words.
    pub(super) fn new(words: usize) -> NameMap {
        let words = (words + 1).next_power_of_two();
        NameMap { words: AtomicWords::new(words, 0), shift: (u64::BITS - words.trailing_zeros()).min(63) }
    }

    fn mask(&self) -> usize {
        self.words.len() - 1
    }

    /// Counted around.
    #[inline(always)]
    fn home(&self, name: Name) -> usize {
        (name.hash() >> self.shift ^ name.0 & ((1 << TOGETHER) - 1)) as usize
    }

    /// The number of a name that lies where it is asked for, as most do.
    #[inline(always)]
    pub(super) fn at_home(&self, here: Here, name: Name) -> Option<u32> {
        name.number(self.words.around(self.home(name)).load_here(here, Ordering::Acquire))
    }

    /// All numbers under `name`. Looks at the whole table once at most, whatever writers do.
    pub(super) fn all(&self, here: Here, name: Name) -> impl Iterator<Item = u32> {
        let home = self.home(name);
        let words = (home..=home + self.mask()).map(|at| self.words.around(at));
        let used =
            words.map(move |word| word.load_here(here, Ordering::Acquire)).take_while(|found| *found != 0);
        used.filter_map(move |found| name.number(found))
    }

    /// The caller holds the books, here and below.
    pub(super) fn insert(&self, name: Name, number: u32) {
        let mut at = self.home(name);
        while self.words.around(at).load(Ordering::Relaxed) != 0 {
            at += 1;
        }
        self.words.around(at).store(name.word(number), Ordering::Release);
    }

    /// Of what was inserted.
    pub(super) fn remove(&self, name: Name, number: u32) {
        let mut at = self.home(name);
        while self.words.around(at).load(Ordering::Relaxed) != name.word(number) {
            at += 1;
        }
        self.close_gap(at);
    }

    /// Frees the word at `gap`, moving up those behind it that a probe would no longer reach.
    fn close_gap(&self, mut gap: usize) {
        let mask = self.mask();
        let mut at = gap;
        loop {
            at += 1;
            let found = self.words.around(at).load(Ordering::Relaxed);
            if found == 0 {
                break;
            }
            let home = self.home(Name::of_word(found));
            // It may move if its home is not behind the gap.
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(gap) & mask {
                // First here, then no longer there: a reader sees it at least once, or misses it.
                self.words.around(gap).store(found, Ordering::Release);
                gap = at;
            }
        }
        self.words.around(gap).store(0, Ordering::Release);
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        (0..self.words.len()).all(|n| self.words.around(n).load(Ordering::Relaxed) == 0)
    }
}
