// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which entries are free, and which of them a range would like best.
//!
//! Entries lie in windows of 64. One that is wholly free is set apart for the first name that asks, until all of its entries are
//! free again; see [`super::table`]. What finds no place in a window of its own takes one from a *spare* window, which is
//! nobody's, and where no other can be had, from somebody's, whose it is no longer.
//!
//! Invariants: a window that has an owner is listed under its name; every window with both free and taken entries is the spare or
//! among the `open`, where others may be too.

use interleave::Here;

use super::names::{Name, NameMap};

/// log2 of the entries in a window.
pub(super) const WINDOW_BITS: u32 = 6;
/// Entries in a window.
pub(super) const WINDOW: usize = 1 << WINDOW_BITS;

/// A bit each.
const ALL: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Window {
    /// A bit for each entry.
    free: u64,
    owner: Option<Name>,
    is_open: bool,
}

#[derive(Debug)]
pub(super) struct Places {
    windows: Box<[Window]>,
    /// Wholly free.
    whole: Vec<u32>,
    /// Once they were partly free.
    open: Vec<u32>,
    spare: Option<u32>,
    /// Windows that have owners: in a cache of few entries none, and nobody looks for one.
    owned: usize,
    free: usize,
}

impl Places {
    /// `capacity` free entries.
    pub(super) fn new(capacity: usize) -> Places {
        let free =
            |first: usize| ALL.checked_shr((first + WINDOW).saturating_sub(capacity) as u32).unwrap_or(0);
        let window = |first| Window { free: free(first), owner: None, is_open: false };
        let windows: Box<[Window]> = (0..capacity).step_by(WINDOW).map(window).collect();
        let whole = (0..windows.len() as u32).rev().filter(|n| windows[*n as usize].free == ALL).collect();
        // The last may have fewer, and is never whole.
        let spare =
            windows.len().checked_sub(1).filter(|last| windows[*last].free != ALL).map(|last| last as u32);
        Places { windows, whole, open: Vec::new(), spare, owned: 0, free: capacity }
    }

    pub(super) fn free(&self) -> usize {
        self.free
    }

    /// A free entry, in the window of the blocks around `name` if that can be.
    pub(super) fn take(&mut self, listed: &NameMap, name: Name) -> Option<u32> {
        self.free = self.free.checked_sub(1)?;
        let (owner, place) = name.split(WINDOW_BITS);
        let window = self.window_of(listed, owner);
        if let Some(window) = window.filter(|n| self.windows[*n as usize].free & 1 << place != 0) {
            return Some(self.take_at(window, place));
        }
        let window = self.any(listed)?;
        Some(self.take_at(window, self.windows[window as usize].free.trailing_zeros()))
    }

    fn take_at(&mut self, window: u32, place: u32) -> u32 {
        self.windows[window as usize].free &= !(1 << place);
        window << WINDOW_BITS | place
    }

    /// The window of `owner`, which gets one if there is one.
    fn window_of(&mut self, listed: &NameMap, owner: Name) -> Option<u32> {
        let window = if self.owned > 0 { listed.all(Here::ask(), owner).next() } else { None };
        if window.is_some() {
            return window;
        }
        let window = self.whole.pop()?;
        listed.insert(owner, window);
        self.windows[window as usize].owner = Some(owner);
        self.owned += 1;
        self.open(window);
        Some(window)
    }

    fn disown(&mut self, listed: &NameMap, window: u32) {
        if let Some(owner) = self.windows[window as usize].owner.take() {
            listed.remove(owner, window);
            self.owned -= 1;
        }
    }

    /// One with a free entry, nobody's.
    fn any(&mut self, listed: &NameMap) -> Option<u32> {
        let has_free = |places: &Places, n: u32| places.windows[n as usize].free != 0;
        if let Some(spare) = self.spare.filter(|n| has_free(self, *n)) {
            return Some(spare);
        }
        self.spare = self.whole.pop();
        while self.spare.is_none() {
            let window = self.open.pop()?;
            self.windows[window as usize].is_open = false;
            // It may have been filled since. Wholly free it is not, or it would be among those.
            self.spare = Some(window).filter(|n| has_free(self, *n));
        }
        let spare = self.spare?;
        self.disown(listed, spare);
        Some(spare)
    }

    fn open(&mut self, window: u32) {
        if !std::mem::replace(&mut self.windows[window as usize].is_open, true) {
            self.open.push(window);
        }
    }

    /// An entry is free again.
    pub(super) fn give(&mut self, listed: &NameMap, index: u32) {
        let window = index >> WINDOW_BITS;
        self.free += 1;
        let it = &mut self.windows[window as usize];
        it.free |= 1 << (index as usize % WINDOW);
        if it.free == ALL {
            self.disown(listed, window);
            if self.spare == Some(window) {
                self.spare = None;
            }
            self.whole.push(window);
        } else if self.spare != Some(window) {
            self.open(window);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// All that its windows say.
    fn check(places: &Places, listed: &NameMap, taken: &BTreeSet<u32>) {
        for (n, window) in places.windows.iter().enumerate() {
            let n = n as u32;
            let first = n << WINDOW_BITS;
            let has_taken = taken.range(first..first + WINDOW as u32).next().is_some();
            assert!(taken.range(first..first + WINDOW as u32).all(|i| window.free & 1 << (i - first) == 0));
            assert_eq!(places.whole.contains(&n), window.free == ALL, "{n} {window:?}");
            if has_taken && window.free != 0 {
                assert!(places.spare == Some(n) || places.open.contains(&n), "{n} {window:?} is lost");
            }
            assert_eq!(places.open.iter().filter(|open| **open == n).count(), usize::from(window.is_open));
            if let Some(owner) = window.owner {
                assert_eq!(listed.all(Here::ask(), owner).next(), Some(n));
            }
        }
        assert_eq!(places.owned, places.windows.iter().filter(|window| window.owner.is_some()).count());
    }

    proptest! {
        #[test]
        fn every_entry_is_given_out_once_and_none_is_lost(
            capacity in 1..300_usize,
            // Few blocks, many, or all in one window; taken twice as often as given.
            ops in prop::collection::vec((0..3_u32, 0..300_usize, prop_oneof![0..64_u64, 0..4096_u64]), 1..600),
        ) {
            let listed = NameMap::new(8 * capacity / WINDOW);
            let mut places = Places::new(capacity);
            let mut taken = BTreeSet::new();
            for (what, nth, page) in ops {
                if what > 0 {
                    let index = places.take(&listed, Name::new(page, 0));
                    prop_assert_eq!(index.is_some(), taken.len() < capacity);
                    if let Some(index) = index {
                        prop_assert!((index as usize) < capacity && taken.insert(index));
                    }
                } else if let Some(index) = taken.iter().nth(nth).copied() {
                    taken.remove(&index);
                    places.give(&listed, index);
                }
                prop_assert_eq!(places.free(), capacity - taken.len());
                check(&places, &listed, &taken);
            }
            for index in std::mem::take(&mut taken) {
                places.give(&listed, index);
            }
            check(&places, &listed, &taken);
            prop_assert!(listed.is_empty());
        }
    }
}
