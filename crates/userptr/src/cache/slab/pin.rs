// SPDX-License-Identifier: MIT OR Apache-2.0
//! A pin is a lease of whatever is alive meanwhile: a slot that holds no index, but the epoch in which it was claimed.
//! Who pins writes a slot once for many entries. The taker begins an epoch after what he takes is dead: a pin of a later
//! one cannot see it alive, so that pins which follow each other without end keep nothing for ever.

use super::{Slab, State};
use crate::sync::{AtomicQuad, AtomicU64, Here, Ordering};

/// The mark of a slot that holds an epoch.
const PINNED: u64 = 1 << 63;

/// A lease of what is seen alive under it, until it is dropped.
#[must_use]
pub(crate) struct Pin<'s, T> {
    slab: &'s Slab<T>,
    slot: &'s AtomicU64,
}

/// What an entry was at a look under a pin.
pub(crate) struct Seen<'p, T> {
    slab: &'p Slab<T>,
    index: u32,
    words: AtomicQuad<'p>,
    state: State,
}

impl<T> Slab<T> {
    /// From here on what is seen alive stays.
    pub(crate) fn pin(&self) -> Pin<'_, T> {
        let here = Here::ask();
        // Acquire: what was dead when the epoch began is seen dead.
        let value = PINNED | self.epoch.load_here(here, Ordering::Acquire);
        let slot = self.any_slot(here, value).unwrap_or_else(|| {
            self.pins.fetch_add(1, Ordering::AcqRel);
            self.shared.given.fetch_add(1, Ordering::Relaxed);
            &self.counted
        });
        self.fence.light();
        Pin { slab: self, slot }
    }

    /// The epoch of the oldest pin.
    pub(super) fn oldest_pin(&self) -> Option<u64> {
        if self.pins.load(Ordering::Acquire) != 0 {
            return Some(0);
        }
        let held = self.lines().flat_map(|line| &line.slots).map(|slot| slot.load(Ordering::Acquire));
        held.filter(|held| held & PINNED != 0).map(|held| held & !PINNED).min()
    }
}

impl<T> Pin<'_, T> {
    /// What the entry is now, if there is one of this number.
    #[inline(always)]
    pub(crate) fn see(&self, here: Here, index: u32) -> Option<Seen<'_, T>> {
        let words = self.slab.get_words(index)?;
        Some(Seen { slab: self.slab, index, words, state: State::of(here, words) })
    }
}

impl<T> Drop for Pin<'_, T> {
    fn drop(&mut self) {
        if std::ptr::eq(self.slot, &raw const self.slab.counted) {
            self.slab.pins.fetch_sub(1, Ordering::Release);
        } else {
            // As a lease's.
            self.slot.store(0, Ordering::Release);
        }
    }
}

impl<'p, T> Seen<'p, T> {
    #[inline(always)]
    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// While the pin lasts those of the same life, if it was alive.
    #[inline(always)]
    pub(crate) fn words(&self) -> AtomicQuad<'p> {
        self.words
    }

    /// What the entry holds, if it was alive.
    pub(crate) fn body(&self) -> Option<&'p T> {
        if !self.state.is_live() {
            return None;
        }
        self.slab.bodies[self.index as usize].with(|at| {
            // SAFETY: the entry was Live after the pin was made, so whoever makes it Dead finds the pin, of an epoch no
            // later than that in which it died, and leaves the body in place while the pin is borrowed.
            unsafe { &*at }.as_ref()
        })
    }
}
