// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which entries could contain a range? Answered without a lock.
//!
//! An entry of up to 4^n pages is on *level* n and listed under the one or two aligned blocks of 4^n pages that it
//! touches. Whatever contains a page is listed under that page's block on its own level, and whatever contains a range
//! is on the range's level or above: a lookup asks once a level in use, beginning with its own, and most programs use
//! few.
//!
//! What a reader finds is a candidate, which its [state](super::slab) confirms: entries may be moved, and windows are
//! but a guess. Whoever misses looks again in the books.
//!
//! # Windows
//!
//! Where registrations are many, a hit waits for memory: for a word of the list, and for the entry. A *window* saves the
//! first: 64 entries in a row are set apart for the 64 blocks in a row in which something is registered first, each
//! block's entry in its place. One word for all of them says where. It is a preference: an entry whose place is taken,
//! or that has no window because no 64 are free, lies anywhere and is found in the list, where every entry is.

use interleave::{AtomicU64, Here, Ordering};
use mmu_notifier::{PAGE_SHIFT, PAGE_SIZE, Range};

use super::names::{LEVELS, NUMBER_BITS, Name, NameMap, level};
use super::places::{Places, WINDOW, WINDOW_BITS};

/// Entries that a table can name.
pub(crate) const MAX_ENTRIES: usize = (1 << NUMBER_BITS) - 2;

pub(crate) struct Table {
    entries: NameMap,
    windows: NameMap,
    /// A bit for each level in use, and [`MANY_BIT`].
    levels: AtomicU64,
}

/// Entries whose words together are more than a CPU has in its nearest caches.
const MANY: u32 = 8192;
/// Of the levels' word: that many are listed.
const MANY_BIT: u64 = 1 << 32;

/// What writers must know; part of the books.
#[derive(Debug)]
pub(crate) struct Listed {
    /// Entries on each level.
    levels: [u32; LEVELS],
    places: Places,
}

impl Table {
    /// For `capacity` entries, at most [`MAX_ENTRIES`], which are free.
    pub(crate) fn new(capacity: usize) -> (Table, Listed) {
        let table = Table {
            entries: NameMap::new(capacity * 8 / 3),
            // Few: so sparse that hardly one lies behind another.
            windows: NameMap::new(8 * capacity / WINDOW),
            levels: AtomicU64::new(0),
        };
        (table, Listed { levels: [0; LEVELS], places: Places::new(capacity) })
    }

    /// Those that a range may be on.
    #[inline(always)]
    fn levels(&self, here: Here, range: Range) -> Levels {
        let levels = self.levels.load_here(here, Ordering::Acquire) as u32;
        // What contains a page may be on any.
        if range.len() <= PAGE_SIZE {
            return Levels(levels);
        }
        let first = level(range);
        Levels(levels >> first << first)
    }

    /// Are there so many entries that a lookup mostly waits for memory?
    pub(crate) fn has_many(&self, here: Here) -> bool {
        self.levels.load_here(here, Ordering::Relaxed) & MANY_BIT != 0
    }

    /// The entries that could contain `range`, and some that do not.
    pub(crate) fn candidates(&self, here: Here, range: Range) -> impl Iterator<Item = u32> {
        let page = range.start() >> PAGE_SHIFT;
        self.levels(here, range).flat_map(move |level| self.entries.all(here, Name::new(page, level)))
    }

    /// One that mostly is the one: that of the range's place in a window, or else the first of the
    /// [candidates](Self::candidates).
    #[inline(always)]
    pub(crate) fn candidate(&self, here: Here, range: Range) -> Option<u32> {
        let name = Name::new(range.start() >> PAGE_SHIFT, self.levels(here, range).next()?);
        let (window, place) = name.split(WINDOW_BITS);
        if let Some(window) = self.windows.at_home(here, window) {
            return Some(window << WINDOW_BITS | place);
        }
        self.further_candidate(here, range, name)
    }

    /// As [`candidate`](Self::candidate): `name` has no window where it is asked for.
    #[inline(never)]
    fn further_candidate(&self, here: Here, range: Range, name: Name) -> Option<u32> {
        if let Some(found) = self.entries.at_home(here, name) {
            return Some(found);
        }
        self.levels(here, range).find_map(|level| {
            let name = Name::new(range.start() >> PAGE_SHIFT, level);
            let (window, place) = name.split(WINDOW_BITS);
            let window = self.windows.all(here, window).next();
            let found = window.map(|window| window << WINDOW_BITS | place);
            found.or_else(|| self.entries.all(here, name).next())
        })
    }

    /// A free entry for `range`, which is free no longer. The caller holds the books, here and below.
    pub(crate) fn take(&self, listed: &mut Listed, range: Range) -> Option<u32> {
        listed.places.take(&self.windows, Name::of(range).next()?)
    }

    /// An entry is free again.
    pub(crate) fn give(&self, listed: &mut Listed, index: u32) {
        listed.places.give(&self.windows, index);
    }

    /// Lists `index` under `range`.
    pub(crate) fn insert(&self, listed: &mut Listed, range: Range, index: u32) {
        Name::of(range).for_each(|name| self.entries.insert(name, index));
        let level = level(range);
        listed.levels[level as usize] += 1;
        let many = if listed.entries() >= MANY { MANY_BIT } else { 0 };
        self.levels.fetch_or(1 << level | many, Ordering::Release);
    }

    /// Strikes `index` off.
    pub(crate) fn remove(&self, listed: &mut Listed, range: Range, index: u32) {
        Name::of(range).for_each(|name| self.entries.remove(name, index));
        let level = level(range);
        listed.levels[level as usize] -= 1;
        let unused = if listed.levels[level as usize] == 0 { 1 << level } else { 0 };
        let few = if listed.entries() == MANY - 1 { MANY_BIT } else { 0 };
        if unused | few != 0 {
            self.levels.fetch_and(!(unused | few), Ordering::Release);
        }
    }
}

impl Listed {
    /// On all levels.
    fn entries(&self) -> u32 {
        self.levels.iter().sum()
    }

    /// Entries that are free.
    pub(crate) fn free(&self) -> usize {
        self.places.free()
    }
}

/// Some levels, the lowest first.
struct Levels(u32);

impl Iterator for Levels {
    type Item = u32;

    #[inline(always)]
    fn next(&mut self) -> Option<u32> {
        let level = self.0.trailing_zeros();
        self.0 &= self.0.wrapping_sub(1);
        (level < u32::BITS).then_some(level)
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

    /// As the cache does it.
    fn register(table: &Table, listed: &mut Listed, range: Range) -> u32 {
        let index = table.take(listed, range).unwrap();
        table.insert(listed, range, index);
        index
    }

    #[test]
    fn an_arena_lies_in_windows_whatever_the_order() {
        let (table, mut listed) = Table::new(3 * WINDOW + 5);
        for n in 0..2 * WINDOW as u64 {
            register(&table, &mut listed, pages(0x1000 + n * 37 % 128, 1));
        }
        let at = |n| table.candidate(Here::ask(), pages(n, 1)).unwrap();
        let first = at(0x1000);
        assert!((0x1000..0x1040).all(|n| at(n) == first + (n - 0x1000) as u32));
        assert_eq!(at(0x1040) as usize % WINDOW, 0);
    }

    proptest! {
        #[test]
        fn every_entry_that_contains_a_range_is_a_candidate(
            capacity in prop_oneof![Just(12_usize), Just(64), Just(150)],
            ops in prop::collection::vec((0..12_usize, 0..512_u64, 1..40_u64), 1..200),
            want in (0..520_u64, 1..20_u64),
        ) {
            let (table, mut listed) = Table::new(capacity);
            let mut model: BTreeMap<u32, Range> = BTreeMap::new();
            for (nth, first, len) in ops {
                if let Some((index, range)) = model.iter().nth(nth).map(|(index, range)| (*index, *range)) {
                    table.remove(&mut listed, range, index);
                    table.give(&mut listed, index);
                    model.remove(&index);
                } else {
                    let range = pages(first, len);
                    let index = register(&table, &mut listed, range);
                    prop_assert!((index as usize) < capacity);
                    prop_assert_eq!(model.insert(index, range), None);
                }
                prop_assert_eq!(listed.free(), capacity - model.len());
                let want = pages(want.0, want.1);
                for (index, range) in model.iter().filter(|(_, range)| range.contains(want)) {
                    prop_assert!(table.candidates(Here::ask(), want).any(|i| i == *index), "{want} in {range}");
                    prop_assert!(table.candidate(Here::ask(), want).is_some_and(|i| (i as usize) < capacity));
                }
                let strangers = table.candidates(Here::ask(), want).filter(|i| !model.contains_key(i)).count();
                prop_assert_eq!(strangers, 0, "a candidate that is not listed");
            }
            for (index, range) in model {
                table.remove(&mut listed, range, index);
                table.give(&mut listed, index);
            }
            prop_assert!(table.entries.is_empty() && table.windows.is_empty());
        }
    }
}
