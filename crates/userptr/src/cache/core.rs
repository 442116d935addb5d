// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a cache is made of, and the hit path: no lock, no allocation, no system call of ours.
//!
//! A hit is: candidate from the [table](super::table), lease, "is the entry as the caller wants it?", "has its
//! range changed since it was registered?" in this order. The last is the source's own check, asked after the lease, so
//! that what is checked is what will be used. The answer "unchanged" is a promise of the source about the moment of the
//! check; afterwards the range is the caller's, who holds the lease and does not give the memory back.

use std::sync::Arc;

use interleave::{
    AtomicBool, AtomicQuad, AtomicU64, AtomicWords, Here, LockClass, Mutex, Ordering, WaitQueue,
};
use mmu_notifier::primary::{PrimaryMmu, Subscription};
use mmu_notifier::{Access, IntervalIndex, Key, Range};

use super::Options;
use super::audit::Audit;
use super::head::{Head, NEVER, NO_STAMP, WRITE};
use super::slab::{Claim, Dead, Held, Phase, Pin, Seen, Slab, State};
use super::stats::Counters;
use super::table::{Listed, Table};
use crate::device::{Device, DeviceAddr};

pub(super) static BOOKS: LockClass = LockClass::new("userptr_books");
static REAPER: LockClass = LockClass::new("userptr_reaper");
static ROOM: LockClass = LockClass::new("userptr_room");

/// A registration: what the device has of a range, and what tells whether it is still good.
pub(super) struct Registration<M: PrimaryMmu, D: Device<M>> {
    pub(super) range: Range,
    /// What the device may do with it.
    pub(super) rights: Access,
    pub(super) mapping: D::Mapping,
    /// `None`: one lease and no more.
    pub(super) watched: Option<Watched<M>>,
}

impl<M: PrimaryMmu, D: Device<M>> Registration<M, D> {
    /// Of a byte of the range.
    pub(super) fn device_addr(&self, device: &D, addr: u64) -> DeviceAddr {
        DeviceAddr(device.address(&self.mapping).0 + (addr - self.range.start()))
    }

    /// Has the range not changed since it was registered? Of a registration for one lease nobody knows: false.
    pub(super) fn is_current(&self) -> bool {
        self.watched.as_ref().is_some_and(|w| !w.subscription.read_retry(w.seq))
    }
}

pub(super) struct Watched<M: PrimaryMmu> {
    pub(super) subscription: M::Subscription,
    pub(super) seq: SeqOf<M>,
}

pub(super) type SeqOf<M> = <<M as PrimaryMmu>::Subscription as Subscription>::Seq;

pub(super) type Entries<M, D> = Slab<Registration<M, D>>;
pub(super) type Leased<'c, M, D> = Held<'c, Registration<M, D>>;
pub(super) type Pinned<'c, M, D> = Pin<'c, Registration<M, D>>;
pub(super) type Glance<'p, M, D> = Seen<'p, Registration<M, D>>;

/// Which changes a lookup may not miss.
#[derive(Clone, Copy)]
pub(super) enum Check {
    /// Those that anybody can have seen: [`Subscription::read_retry`].
    Strict,
    /// Those that returned before: [`Subscription::read_retry_ordered`].
    Ordered,
}

/// Who has what. Its lock is a leaf and is not held while the mm, a source or the device is called, so a thread may be
/// in munmap, or in a callback, with any lock of the application's.
pub(super) struct Books {
    /// The entries that are listed, by range.
    pub(super) ranges: IntervalIndex<u32>,
    /// Their names there, by entry.
    pub(super) keys: Box<[Option<(Key, Range)>]>,
    pub(super) listed: Listed,
    /// Dead entries that somebody leases.
    pub(super) leased: Vec<Dead>,
    /// Of these at least one is kept by nothing but batches.
    pub(super) batched: bool,
    /// Held or about to be held by the device, whatever has become of the memory.
    pub(super) bytes: u64,
    /// Dead entries that somebody is letting go at this moment.
    pub(super) going: usize,
    /// The clock's.
    pub(super) hand: usize,
    /// Why the last range that nobody would hear of was not cached.
    pub(super) warning: Option<String>,
}

pub(super) struct Core<M: PrimaryMmu, D: Device<M>> {
    pub(super) mm: Arc<M>,
    pub(super) device: D,
    pub(super) options: Options,
    pub(super) slab: Entries<M, D>,
    pub(super) table: Table,
    pub(super) books: Mutex<Books>,
    /// The first in the list of the dead, plus one: those that nobody has looked after yet.
    dead: AtomicU64,
    /// The next in that list of each, plus one.
    next_dead: AtomicWords,
    /// The reaper sleeps here.
    pub(super) reaper: WaitQueue,
    /// Who needs room sleeps here until somebody has let go of something.
    pub(super) room: WaitQueue,
    pub(super) stop: AtomicBool,
    /// Callbacks that hold a lease, or have taken an entry out of use and not listed it yet: the end waits for them.
    pub(super) callbacks: AtomicU64,
    /// A lease of a dead entry has ended.
    pub(super) kicked: AtomicBool,
    pub(super) counters: Counters,
    pub(super) admission: super::admission::Recent,
    pub(super) audit: Audit,
    /// The process that the cache is of.
    process: u32,
}

impl<M: PrimaryMmu, D: Device<M>> Core<M, D> {
    pub(super) fn new(mm: Arc<M>, device: D, options: Options) -> Core<M, D> {
        let entries = options.entries;
        let (table, listed) = Table::new(entries);
        let books = Books {
            ranges: IntervalIndex::new(),
            keys: vec![None; entries].into(),
            listed,
            leased: Vec::with_capacity(entries),
            batched: false,
            bytes: 0,
            going: 0,
            hand: 0,
            warning: None,
        };
        Core {
            mm,
            device,
            slab: Slab::new(entries, options.threads),
            table,
            books: Mutex::new(&BOOKS, books),
            dead: AtomicU64::new(0),
            next_dead: AtomicWords::new(entries, 0),
            reaper: WaitQueue::new(&REAPER),
            room: WaitQueue::new(&ROOM),
            stop: AtomicBool::new(false),
            callbacks: AtomicU64::new(0),
            kicked: AtomicBool::new(false),
            counters: Counters::new(),
            admission: super::admission::Recent::new(),
            audit: Audit::new(options.audit),
            process: std::process::id(),
            options,
        }
    }

    /// Is this the process that the cache is of? A system call. In a forked child every lock may be held for ever.
    pub(super) fn at_home(&self) -> bool {
        std::process::id() == self.process
    }

    /// The words of an entry that anybody may read.
    #[inline(always)]
    pub(super) fn head(&self, index: u32) -> Head<'_> {
        Head(self.slab.words(index))
    }

    /// A lease of a registration that contains `want`, allows `access`, and has not changed.
    #[inline(always)]
    pub(super) fn hit(&self, want: Range, access: Access, check: Check) -> Option<Claim<'_>> {
        let here = Here::ask();
        if !here.is_plain() {
            return self.hit_among(want, access, check);
        }
        // Once more from the beginning if it is another: so that nothing must be kept for that.
        let index = self.table.candidate(here, want)?;
        let found = self.try_claim(here, index, want, access, check);
        if found.is_some() { found } else { self.hit_among(want, access, check) }
    }

    #[cold]
    #[inline(never)]
    fn hit_among(&self, want: Range, access: Access, check: Check) -> Option<Claim<'_>> {
        let here = Here::ask();
        let mut candidates = self.table.candidates(here, want);
        candidates.find_map(|index| self.try_claim(here, index, want, access, check))
    }

    /// A lease of this very entry.
    pub(super) fn try_lease(
        &self,
        index: u32,
        want: Range,
        access: Access,
        check: Check,
    ) -> Option<Leased<'_, M, D>> {
        self.try_claim(Here::ask(), index, want, access, check).map(|claim| self.slab.keep(claim))
    }

    /// As [`hit`](Self::hit), of what is pinned, with the first entry that could contain `want`, as of when `era` was the
    /// [ordered era](PrimaryMmu::era_ordered).
    #[inline(always)]
    pub(super) fn look<'p>(
        &'p self,
        here: Here,
        pin: &'p Pinned<'_, M, D>,
        index: u32,
        want: Range,
        access: Access,
        era: Option<u64>,
    ) -> Option<Glance<'p, M, D>> {
        let seen = pin.see(here, index);
        let (state, head) = (seen.state(), Head(seen.words()));
        if state.is_live()
            && head.pages(here).contain(want)
            && (access == Access::Read || state.has(WRITE))
            && self.stands(here, head, || era)
        {
            head.touch(here);
            return Some(seen);
        }
        let seen = pin.see(here, self.look_again(want, access)?);
        seen.state().is_live().then_some(seen)
    }

    /// The entry that a lookup hits.
    #[cold]
    #[inline(never)]
    fn look_again(&self, want: Range, access: Access) -> Option<u32> {
        let found = self.hit(want, access, Check::Ordered)?;
        self.counters.in_vain.add(1);
        let (here, index) = (Here::ask(), found.index());
        self.slab.end(here, found);
        self.ended(here, self.slab.words(index));
        Some(index)
    }

    #[inline(always)]
    fn try_claim(
        &self,
        here: Here,
        index: u32,
        want: Range,
        access: Access,
        check: Check,
    ) -> Option<Claim<'_>> {
        let words = self.slab.words(index);
        let (state, head) = (State::of(here, words), Head(words));
        if !head.pages(here).contain(want) || !state.is_live() {
            return None;
        }
        if access == Access::Write && !state.has(WRITE) {
            return None;
        }
        // The state is looked at once more, so that the pages were this life's.
        let Some(found) = self.slab.claim(here, index, words, state) else {
            self.in_vain();
            return None;
        };
        if self.stands(here, head, || self.era(check)) {
            head.touch(here);
            return Some(found);
        }
        self.doubted(found, state, check)
    }

    /// A lease was taken and is no hit.
    #[cold]
    #[inline(never)]
    fn in_vain(&self) {
        self.counters.in_vain.add(1);
    }

    /// Has an entry that is leased not changed, as far as can be said without its registration? As long as the mm counts
    /// of the range what it counted when that was registered. Where it does not count so, as long as nothing at all has
    /// changed since the range was last found in order, which must be written down in the entry, whose line threads
    /// share, after every change anywhere.
    #[inline(always)]
    fn stands(&self, here: Here, head: Head<'_>, era: impl FnOnce() -> Option<u64>) -> bool {
        let key = head.key(here);
        let stamp = head.stamp(here);
        if key != NEVER {
            return self.mm.count(key) == Some(stamp);
        }
        stamp != NO_STAMP && era() == Some(stamp)
    }

    #[inline(always)]
    fn era(&self, check: Check) -> Option<u64> {
        match check {
            Check::Strict => self.mm.era(),
            Check::Ordered => self.mm.era_ordered(),
        }
    }

    /// The source's own check, of an entry that is leased.
    #[inline(never)]
    fn doubted<'c>(&'c self, found: Claim<'c>, seen: State, check: Check) -> Option<Claim<'c>> {
        let index = found.index();
        let era = self.era(check);
        let changed = self.slab.body(&found).watched.as_ref().is_none_or(|w| match check {
            Check::Strict => w.subscription.read_retry(w.seq),
            Check::Ordered => w.subscription.read_retry_ordered(w.seq),
        });
        if changed {
            self.slab.end(Here::ask(), found);
            self.stale(index, seen);
            return None;
        }
        let head = self.head(index);
        // The era was read before the sequence, as the mm wants it. The lease keeps the entry from being another.
        if let Some(era) = era
            && head.key(Here::ask()) == NEVER
        {
            head.set_stamp(era);
        }
        head.touch(Here::ask());
        Some(found)
    }

    /// Found to be out of date at a lookup.
    #[cold]
    fn stale(&self, index: u32, state: State) {
        self.counters.in_vain.add(1);
        // A forked child finds everything out of date, and wakes nobody: the reaper is its parent's.
        if self.at_home() && self.kill(index, state) {
            self.counters.stale.add(1);
        }
    }

    /// Takes an entry out of use, if it is still as `seen`. Whoever holds a lease keeps it. Any context; takes no lock.
    pub(super) fn kill(&self, index: u32, seen: State) -> bool {
        if !self.slab.kill(index, seen) {
            return false;
        }
        let next = self.next_dead.word(index as usize);
        let mut first = self.dead.load(Ordering::Relaxed);
        loop {
            next.store(first, Ordering::Relaxed);
            // Release: whoever takes the list sees `next`. It is only ever taken whole, so an entry that comes back is
            // no danger.
            match self.dead.compare_exchange(
                first,
                u64::from(index) + 1,
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => break,
                Err(other) => first = other,
            }
        }
        self.reaper.wake_all();
        true
    }

    /// The list of the dead.
    pub(super) fn take_dead(&self) -> impl Iterator<Item = u32> {
        let mut next = self.dead.swap(0, Ordering::Acquire);
        std::iter::from_fn(move || {
            let index = u32::try_from(next.checked_sub(1)?).ok()?;
            next = self.next_dead.word(index as usize).load(Ordering::Relaxed);
            Some(index)
        })
    }

    pub(super) fn has_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed) != 0
    }

    /// A lease has ended, of the entry with these words.
    #[inline(always)]
    pub(super) fn ended(&self, here: Here, words: AtomicQuad<'_>) {
        if State::of(here, words).phase() == Phase::Dead {
            self.ended_of_the_dead();
        }
    }

    #[cold]
    #[inline(never)]
    fn ended_of_the_dead(&self) {
        if self.at_home() {
            self.kicked.store(true, Ordering::Release);
            self.reaper.wake_all();
        }
    }
}
