// SPDX-License-Identifier: MIT OR Apache-2.0
//! The swap area and the swap cache (all versions; one area, memory for a device, every write finished at once).
//!
//! A slot holds one page's contents. Swap entries in page tables count in its map; a page whose contents are those of a
//! slot, or will be, can be in the swap cache, which holds one reference on it.
//!
//! Invariants:
//! * A slot is free exactly if no pte holds it and no page is cached for it.
//! * Every fault on an entry meets the same page as long as it is cached, so that whoever pinned that page before
//!   it was swapped out is still on it afterwards.
//! * The cache of a slot and [`Frames::swap_slot`](crate::Frames) of its page change together, under the page lock.
//!
//! Lock order: `page_lock`, `ptl` -> `swap_lock`, a leaf.

use crate::error::OutOfMemory;
use crate::fail::FailNth;
use crate::frame::FrameId;
use crate::machine::Machine;
use interleave::{Context, Digest, LockClass, MaySleep, SpinLock};
use mmu_notifier::Pfn;

static SWAP_LOCK: LockClass = LockClass::new("swap_lock");

/// The number of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(pub(crate) u32);

#[derive(Default)]
struct State {
    /// Swap entries in page tables (swap_map).
    ptes: u32,
    cached: Option<Pfn>,
    contents: Box<[u64]>,
}

impl Digest for State {
    fn digest(&self) -> u64 {
        (self.ptes, self.cached.map(|pfn| pfn.0), &self.contents).digest()
    }
}

impl State {
    fn is_free(&self) -> bool {
        self.ptes == 0 && self.cached.is_none()
    }
}

/// See the module.
pub struct Swap {
    slots: SpinLock<Box<[State]>>,
    pub(crate) fail: FailNth,
}

impl Swap {
    pub(crate) fn new(slots: u32) -> Swap {
        Swap {
            slots: SpinLock::with_digest(
                &SWAP_LOCK,
                (0..slots).map(|_| State::default()).collect(),
                <Box<[State]>>::digest,
            ),
            fail: FailNth::never(),
        }
    }

    /// Slots that hold contents or wait for them.
    pub fn in_use<C: Context + ?Sized>(&self, cx: &mut C) -> usize {
        self.slots.lock(cx).iter().filter(|slot| !slot.is_free()).count()
    }

    /// vm_swap_full: more than half is in use, so cached pages give their slots back as soon as they can.
    fn is_full<C: Context + ?Sized>(&self, cx: &mut C) -> bool {
        let slots = self.slots.lock(cx);
        slots.iter().filter(|slot| !slot.is_free()).count() * 2 > slots.len()
    }

    /// One swap entry more (swap_duplicate).
    pub(crate) fn duplicate<C: Context + ?Sized>(&self, cx: &mut C, slot: Slot) {
        self.slots.lock(cx)[slot.0 as usize].ptes += 1;
    }

    /// One swap entry less (swap_free). The page that is left in the cache without any is told.
    pub(crate) fn free<C: Context + ?Sized>(&self, cx: &mut C, slot: Slot) -> Option<Pfn> {
        let mut slots = self.slots.lock(cx);
        let state = &mut slots[slot.0 as usize];
        state.ptes -= 1;
        state.cached.filter(|_| state.ptes == 0)
    }

    /// Swap entries that hold `slot` (page_swapcount).
    pub(crate) fn count<C: Context + ?Sized>(&self, cx: &mut C, slot: Slot) -> u32 {
        self.slots.lock(cx)[slot.0 as usize].ptes
    }
}

impl Machine {
    /// The pages in the swap cache. Out of date at once, unless nothing runs.
    pub fn swap_cache<C: Context + ?Sized>(&self, cx: &mut C) -> Vec<FrameId> {
        let slots = self.swap().slots.lock(cx);
        slots.iter().filter_map(|slot| slot.cached).map(|pfn| self.frames().id(pfn)).collect()
    }

    /// add_to_swap: gives the page a slot. False: none is free. The page is locked, held and in no slot.
    pub(crate) fn add_to_swap<C: Context + ?Sized>(&self, cx: &mut C, pfn: Pfn) -> bool {
        if self.swap().fail.fails_now() {
            return false;
        }
        if self.take_slot(cx, pfn) {
            return true;
        }
        // A page that was locked when its last entry went still has its slot, and no pte by which anybody would find it.
        self.reclaim_cache_only(cx);
        self.take_slot(cx, pfn)
    }

    /// Frees the slots that only the swap cache holds, of pages that nobody works on (__try_to_reclaim_swap).
    fn reclaim_cache_only<C: Context + ?Sized>(&self, cx: &mut C) {
        let frames = self.frames();
        let slots = self.swap().slots.lock(cx);
        let unneeded = slots.iter().filter(|slot| slot.ptes == 0).filter_map(|slot| slot.cached);
        let held: Vec<Pfn> = unneeded.filter(|&pfn| frames.try_get(pfn, 1)).collect();
        drop(slots);
        for pfn in held {
            if let Some(lock) = frames.trylock_page(cx, pfn) {
                self.try_to_free_swap(cx, pfn);
                drop(lock);
            }
            frames.put(pfn, 1);
        }
    }

    fn take_slot<C: Context + ?Sized>(&self, cx: &mut C, pfn: Pfn) -> bool {
        let mut slots = self.swap().slots.lock(cx);
        let Some(index) = slots.iter().position(State::is_free) else { return false };
        slots[index].cached = Some(pfn);
        self.frames().get(pfn, 1);
        self.frames().set_swap_slot(pfn, Some(Slot(index as u32)));
        self.frames().set_dirty(pfn);
        true
    }

    /// delete_from_swap_cache: the page is locked and held.
    pub(crate) fn delete_from_swap_cache<C: Context + ?Sized>(&self, cx: &mut C, pfn: Pfn) {
        self.detach_cached(cx, pfn);
        self.frames().set_dirty(pfn);
        self.frames().put(pfn, 1);
    }

    /// The same, but the reference of the cache is the caller's afterwards.
    pub(crate) fn detach_cached<C: Context + ?Sized>(&self, cx: &mut C, pfn: Pfn) {
        let Some(slot) = self.frames().swap_slot(pfn) else { return };
        let mut slots = self.swap().slots.lock(cx);
        slots[slot.0 as usize].cached = None;
        self.frames().set_swap_slot(pfn, None);
    }

    /// try_to_free_swap: takes a page out of the cache that no swap entry needs. The page is locked and held.
    pub(crate) fn try_to_free_swap<C: Context + ?Sized>(&self, cx: &mut C, pfn: Pfn) -> bool {
        let Some(slot) = self.frames().swap_slot(pfn) else { return false };
        if self.swap().count(cx, slot) > 0 {
            return false;
        }
        self.delete_from_swap_cache(cx, pfn);
        true
    }

    /// The same if the area is filling up.
    pub(crate) fn try_to_free_swap_if_full<C: Context + ?Sized>(&self, cx: &mut C, pfn: Pfn) {
        if self.swap().is_full(cx) {
            self.try_to_free_swap(cx, pfn);
        }
    }

    /// free_swap_cache: the page is held and about to be put; nobody may map it any more.
    pub(crate) fn free_swap_cache<C: Context + ?Sized>(&self, cx: &mut C, pfn: Pfn) {
        if self.frames().swap_slot(pfn).is_none() || self.frames().mapcount(pfn) > 0 {
            return;
        }
        if let Some(lock) = self.frames().trylock_page(cx, pfn) {
            self.try_to_free_swap(cx, pfn);
            drop(lock);
        }
    }

    /// free_swap_and_cache: a swap entry goes away unread.
    pub(crate) fn free_swap_and_cache<C: Context + ?Sized>(&self, cx: &mut C, slot: Slot) {
        let Some(pfn) = self.swap().free(cx, slot) else { return };
        let frames = self.frames();
        if !frames.try_get(pfn, 1) {
            return;
        }
        // Whoever holds the page lock sees to it; else reclaim does, some day.
        if let Some(lock) = frames.trylock_page(cx, pfn) {
            if frames.swap_slot(pfn) == Some(slot) && frames.mapcount(pfn) == 0 {
                self.try_to_free_swap(cx, pfn);
            }
            drop(lock);
        }
        frames.put(pfn, 1);
    }

    /// The page for `slot`, with a reference: from the cache, or read into a new one (swapin_readahead). None: no
    /// swap entry holds the slot any more.
    pub(crate) fn swap_in(&self, cx: &mut MaySleep<'_>, slot: Slot) -> Result<Option<Pfn>, OutOfMemory> {
        let frames = self.frames();
        let mut new = None;
        loop {
            let mut slots = self.swap().slots.lock(cx);
            let state = &mut slots[slot.0 as usize];
            let found = state.cached.filter(|&pfn| frames.try_get(pfn, 1));
            if let (None, Some(pfn)) = (state.cached, new.filter(|_| state.ptes > 0)) {
                frames.fill(pfn, &state.contents);
                frames.get(pfn, 1);
                frames.set_swap_slot(pfn, Some(slot));
                state.cached = Some(pfn);
                return Ok(Some(pfn));
            }
            let wanted = state.ptes > 0 && state.cached.is_none();
            let leaving = state.cached.is_some() && found.is_none();
            drop(slots);
            if wanted {
                new = Some(frames.alloc()?);
                continue;
            }
            if leaving {
                // Frozen by reclaim, which is about to take it out of the cache.
                interleave::yield_now();
                continue;
            }
            if let Some(unused) = new {
                frames.put(unused, 1);
            }
            return Ok(found);
        }
    }

    /// swap_writepage: the contents go to the slot; the page is locked, unmapped and clean afterwards.
    pub(crate) fn swap_out<C: Context + ?Sized>(&self, cx: &mut C, pfn: Pfn) {
        let Some(slot) = self.frames().swap_slot(pfn) else { return };
        self.frames().clear_dirty(pfn);
        let contents = self.frames().contents(pfn);
        self.swap().slots.lock(cx)[slot.0 as usize].contents = contents;
    }
}
