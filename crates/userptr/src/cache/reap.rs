// SPDX-License-Identifier: MIT OR Apache-2.0
//! Giving back what is dead: the device must not hold freed memory longer than somebody leases it, also when the
//! program asks for nothing more.
//!
//! An entry dies at a lookup, by a callback, by eviction or by request, and goes to the list of the dead. Whoever reaps
//! takes the list: those that are leased wait in the books, the others are struck off, unsubscribed and unmapped, and
//! only then is their entry free again. The thread that reaps sleeps until something dies; while leased ones wait it also
//! looks every [`PATIENCE`], since a lease ends with a plain store that nobody need see at once.

use std::sync::Arc;
use std::time::Duration;

use interleave::{MaySleep, Ordering};
use mmu_notifier::Access;
use mmu_notifier::primary::PrimaryMmu;

use super::core::{Core, Registration};
use crate::device::Device;

const PATIENCE: Duration = Duration::from_millis(10);
/// How often within that time it is looked whether batches have ended.
const LOOKS: u32 = 8;
/// Entries that an eviction lets go at a time, so that a full cache does not evict for each miss.
const EVICT: usize = 8;

impl<M: PrimaryMmu, D: Device<M>> Core<M, D> {
    /// Lets go of what is dead and not leased. How many.
    pub(super) fn reap(&self, cx: &mut MaySleep<'_>) -> usize {
        let mut gone = Vec::new();
        let mut books = self.books.lock(cx);
        let mut leased = std::mem::take(&mut books.leased);
        self.slab.count_dead(self.take_dead(), &mut leased);
        for index in leased.iter().map(|dead| dead.index) {
            // Struck off first: a lookup that finds it later finds it dead.
            if let Some((key, range)) = books.keys[index as usize].take() {
                self.table.remove(&mut books.listed, range, index);
                books.ranges.remove(key);
            }
        }
        match self.slab.take(&mut leased, |index, registration| gone.push((index, registration))) {
            Ok(kept) => books.batched = kept.by_pins,
            Err(refused) => tracing::error!("dead registrations stay with the device: {refused}"),
        }
        books.leased = leased;
        books.going += gone.len();
        drop(books);
        let reaped = gone.len();
        for (index, registration) in gone {
            self.let_go(cx, index, registration);
        }
        reaped
    }

    fn let_go(&self, cx: &mut MaySleep<'_>, index: u32, registration: Registration<M, D>) {
        let Registration { range, rights, mapping, watched } = registration;
        // A fence: no callback of it runs afterwards. Ours takes no lock, so that this waits for nobody of ours.
        drop(watched);
        let pages = self.device.unmap(cx, mapping);
        self.device.put_pages(cx, pages, rights == Access::Write);
        self.slab.free(index);
        let mut books = self.books.lock(cx);
        books.bytes -= range.len();
        self.table.give(&mut books.listed, index);
        books.going -= 1;
        self.counters.released.add(1);
        drop(books);
        self.room.wake_all();
    }

    /// The one lease of a registration that nobody else finds has ended. Where the caller may not sleep, somebody else
    /// lets it go.
    #[cold]
    #[inline(never)]
    pub(super) fn end_one_shot(&self, index: u32) {
        if self.at_home() && self.kill(index, self.slab.state(index)) {
            let _ = MaySleep::try_enter(|cx| self.reap(cx));
        }
    }

    /// Lets go of something, or waits until somebody else has; `false` if everything is leased.
    pub(super) fn make_room(&self, cx: &mut MaySleep<'_>) -> bool {
        let before = self.counters.released.get();
        if self.reap(cx) > 0 {
            return true;
        }
        self.evict(cx, EVICT);
        if self.reap(cx) > 0 {
            return true;
        }
        // The reaper may have been faster.
        let books = self.books.lock(cx);
        let (others, batched) = (books.going > 0, books.batched);
        drop(books);
        if others {
            self.room.wait_event(cx, || self.counters.released.get() != before);
        } else if batched && self.outlast_batches(cx) {
            return true;
        }
        others || self.counters.released.get() != before
    }

    /// Batches are short, unless one is the caller's own, or of somebody who waits for room too.
    fn outlast_batches(&self, cx: &mut MaySleep<'_>) -> bool {
        let before = self.counters.released.get();
        let released = || self.counters.released.get() != before;
        (0..LOOKS).any(|_| {
            self.room.wait_event_timeout(cx, PATIENCE / LOOKS, released);
            self.reap(cx) > 0 || released()
        })
    }

    /// Takes up to `count` entries out of use that nobody leases and nobody used lately (the clock, a cheap LRU). How
    /// many.
    pub(super) fn evict(&self, cx: &mut MaySleep<'_>, count: usize) -> usize {
        let mut books = self.books.lock(cx);
        let entries = self.slab.len();
        let mut evicted = 0;
        // Twice round: the first time it finds them used.
        for _ in 0..2 * entries {
            let index = books.hand as u32;
            books.hand = (books.hand + 1) % entries;
            let state = self.slab.state(index);
            if !state.is_live()
                || books.keys[index as usize].is_none()
                || self.head(index).take_used()
                || self.slab.is_leased(index)
            {
                continue;
            }
            if self.kill(index, state) {
                self.counters.evicted.add(1);
                evicted += 1;
                if evicted == count {
                    break;
                }
            }
        }
        evicted
    }

    /// Takes every entry out of use that `which` names. How many.
    pub(super) fn kill_all(
        &self,
        cx: &mut MaySleep<'_>,
        which: impl Fn(mmu_notifier::Range) -> bool,
    ) -> usize {
        let books = self.books.lock(cx);
        let mut killed = 0;
        for (index, key) in books.keys.iter().enumerate() {
            if key.is_some_and(|(_, range)| which(range)) {
                let state = self.slab.state(index as u32);
                killed += usize::from(self.kill(index as u32, state));
            }
        }
        killed
    }
}

/// The reaper's thread.
pub(super) fn run<M: PrimaryMmu, D: Device<M>>(cx: &mut MaySleep<'_>, core: &Arc<Core<M, D>>) {
    loop {
        let waits = !core.books.lock(cx).leased.is_empty();
        let ready =
            || core.stop.load(Ordering::Acquire) || core.has_dead() || core.kicked.load(Ordering::Acquire);
        if waits {
            core.reaper.wait_event_timeout(cx, PATIENCE, ready);
        } else {
            core.reaper.wait_event(cx, ready);
        }
        if core.stop.load(Ordering::Acquire) {
            return;
        }
        core.kicked.store(false, Ordering::Release);
        core.reap(cx);
    }
}
