// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a cache has done so far.

use interleave::{AtomicU64, MaySleep, Ordering};
use mmu_notifier::primary::PrimaryMmu;

use super::core::Core;
use super::slab::Dead;
use crate::device::Device;

/// A number that only grows.
pub(super) struct Counter(AtomicU64);

impl Counter {
    fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    #[inline]
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counted off the hit path; hits are what the lease slots have counted besides.
        pub(super) struct Counters {
            $($(#[$doc])* pub(super) $name: Counter,)*
        }

        impl Counters {
            pub(super) fn new() -> Counters {
                Counters { $($name: Counter::new()),* }
            }
        }
    };
}

counters! {
    /// Leases that were taken and were no hit.
    in_vain,
    /// Leases of new registrations.
    fresh,
    /// Lookups of batches that found something.
    batched,
    registered,
    one_shot,
    unheard,
    failed,
    retried,
    stale,
    told,
    merged,
    evicted,
    released,
    audited,
    audited_stale,
    unaudited,
}

/// What a cache has done since it was made. Read without a lock: numbers of different moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Leases of something that was in the cache, and as many as batches that have ended found there.
    pub hits: u64,
    /// Registrations put into the cache.
    pub registered: u64,
    /// Registrations for one lease: not admitted, or nobody would hear their changes.
    pub one_shot: u64,
    /// Of these, those whose changes the source cannot hear. More than none is a warning: nothing of such
    /// memory is ever cached. [`RegistrationCache::warning`](super::RegistrationCache::warning) says why.
    pub unheard: u64,
    /// Times that a range could not be registered.
    pub failed: u64,
    /// Times that a range changed while it was registered, so that it was done again.
    pub retried: u64,
    /// Registrations found out of date at a lookup.
    pub stale: u64,
    /// Registrations taken out because the source told of a change.
    pub told: u64,
    /// Registrations taken out because a longer one replaced them.
    pub merged: u64,
    /// Registrations taken out for want of room.
    pub evicted: u64,
    /// Registrations that the device has let go, whatever for.
    pub released: u64,
    /// Hits that the device was asked about ([`Options::audit`](super::Options::audit)).
    pub audited: u64,
    /// Of these, those that were stale though the source told of no change. More than none is a bug of the source,
    /// or of a program that changes memory in a way which the source cannot hear.
    pub audited_stale: u64,
    /// Of these, those about which nothing is known: the caller may not sleep, the device cannot tell, or the memory
    /// changed meanwhile.
    pub unaudited: u64,
    /// Registrations that the device holds now.
    pub entries: u64,
    /// Bytes that the device holds now, freed memory included.
    pub bytes: u64,
    /// Of these, bytes of dead registrations that somebody still leases.
    pub leased_dead_bytes: u64,
}

impl<M: PrimaryMmu, D: Device<M>> Core<M, D> {
    pub(super) fn stats(&self, cx: &mut MaySleep<'_>) -> Stats {
        let counters = &self.counters;
        let books = self.books.lock(cx);
        let dead = |dead: &Dead| self.head(dead.index).bytes();
        let leased_dead_bytes = books.leased.iter().map(dead).sum();
        let entries = (self.slab.len() - books.listed.free()) as u64;
        let bytes = books.bytes;
        drop(books);
        let leases = self.slab.leases_given().saturating_sub(counters.in_vain.get() + counters.fresh.get());
        Stats {
            hits: leases + counters.batched.get(),
            registered: counters.registered.get(),
            one_shot: counters.one_shot.get(),
            unheard: counters.unheard.get(),
            failed: counters.failed.get(),
            retried: counters.retried.get(),
            stale: counters.stale.get(),
            told: counters.told.get(),
            merged: counters.merged.get(),
            evicted: counters.evicted.get(),
            released: counters.released.get(),
            audited: counters.audited.get(),
            audited_stale: counters.audited_stale.get(),
            unaudited: counters.unaudited.get(),
            entries,
            bytes,
            leased_dead_bytes,
        }
    }
}
