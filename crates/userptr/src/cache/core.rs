// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a cache is made of, and the hit path: no lock, no allocation, no system call of ours.
//!
//! A hit is: candidate from the [table](super::table), lease, "is the entry as the caller wants it?", "has its
//! range changed since it was registered?" in this order. The last is the source's own check, asked after the lease, so
//! that what is checked is what will be used. The answer "unchanged" is a promise of the source about the moment of the
//! check; afterwards the range is the caller's, who holds the lease and does not give the memory back.

use std::sync::Arc;

use interleave::{AtomicBool, AtomicU64, AtomicWord, LockClass, Mutex, Ordering, WaitQueue};
use mmu_notifier::primary::{PrimaryMmu, Subscription};
use mmu_notifier::{Access, IntervalIndex, Key, Range};

use super::Options;
use super::audit::Audit;
use super::slab::{Held, Phase, Slab, State};
use super::stats::Counters;
use super::table::{Levels, Table};
use super::thread;
use crate::device::Device;

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

pub(super) struct Watched<M: PrimaryMmu> {
    pub(super) subscription: M::Subscription,
    pub(super) seq: SeqOf<M>,
}

pub(super) type SeqOf<M> = <<M as PrimaryMmu>::Subscription as Subscription>::Seq;

/// The mark of an entry that the device may write.
pub(super) const WRITE: u64 = 1;

/// What anybody may read of an entry at any time, beside its state in one cache line. Of a leased entry the range and
/// the stamp are its own: they are set before it comes alive, and again after it is taken apart.
pub(super) struct Head<'c, T> {
    slab: &'c Slab<T>,
    index: u32,
}

/// The words of a head.
const START: usize = 0;
const END: usize = 1;
/// The mm's era when its sequence last stood.
const STAMP: usize = 2;
/// Leased since the clock's hand passed.
const USED: usize = 3;
/// The next entry in the list of the dead, plus one.
const NEXT: usize = 4;

/// What the mm counts in the range while it has not changed.
const COUNT: usize = 5;

/// No era, and no count.
const NEVER: u64 = u64::MAX;

impl<'c, T> Head<'c, T> {
    #[inline(always)]
    fn word(&self, word: usize) -> AtomicWord<'c> {
        self.slab.user_word(self.index, word)
    }

    /// By the owner of an entry that is being built; `count`: see [`Subscription::count_at`].
    pub(super) fn set(&self, range: Range, count: Option<u64>) {
        self.word(COUNT).store(count.unwrap_or(NEVER), Ordering::Relaxed);
        self.word(START).store(range.start(), Ordering::Relaxed);
        self.word(END).store(range.end(), Ordering::Relaxed);
        self.word(STAMP).store(NEVER, Ordering::Relaxed);
        self.word(USED).store(1, Ordering::Relaxed);
    }

    pub(super) fn bytes(&self) -> u64 {
        self.word(END).load(Ordering::Relaxed) - self.word(START).load(Ordering::Relaxed)
    }

    fn range(&self) -> Option<Range> {
        Range::new(self.word(START).load(Ordering::Relaxed), self.bytes()).ok()
    }

    #[inline(always)]
    fn contains(&self, range: Range) -> bool {
        self.word(START).load(Ordering::Relaxed) <= range.start()
            && range.end() <= self.word(END).load(Ordering::Relaxed)
    }

    /// Written only if it changes: threads that use one entry share the line.
    #[inline(always)]
    pub(super) fn touch(&self) {
        if self.word(USED).load(Ordering::Relaxed) == 0 {
            self.word(USED).store(1, Ordering::Relaxed);
        }
    }

    /// Was it used since it was asked last?
    pub(super) fn take_used(&self) -> bool {
        self.word(USED).swap(0, Ordering::Relaxed) != 0
    }
}

pub(super) type Entries<M, D> = Slab<Registration<M, D>>;
pub(super) type Leased<'c, M, D> = Held<'c, Registration<M, D>>;

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
    pub(super) levels: Levels,
    pub(super) free: Vec<u32>,
    /// Dead entries that somebody leases.
    pub(super) leased: Vec<u32>,
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
    /// The reaper sleeps here.
    pub(super) reaper: WaitQueue,
    /// Who needs room sleeps here until somebody has let go of something.
    pub(super) room: WaitQueue,
    pub(super) stop: AtomicBool,
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
        let books = Books {
            ranges: IntervalIndex::new(),
            keys: vec![None; entries].into(),
            levels: Levels::default(),
            free: (0..entries as u32).rev().collect(),
            leased: Vec::with_capacity(entries),
            bytes: 0,
            going: 0,
            hand: 0,
            warning: None,
        };
        Core {
            mm,
            device,
            slab: Slab::new(entries, options.threads),
            table: Table::new(entries),
            books: Mutex::new(&BOOKS, books),
            dead: AtomicU64::new(0),
            reaper: WaitQueue::new(&REAPER),
            room: WaitQueue::new(&ROOM),
            stop: AtomicBool::new(false),
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
    pub(super) fn head(&self, index: u32) -> Head<'_, Registration<M, D>> {
        Head { slab: &self.slab, index }
    }

    /// A lease of a registration that contains `want`, allows `access`, and has not changed.
    #[inline(always)]
    pub(super) fn hit(&self, want: Range, access: Access, check: Check) -> Option<Leased<'_, M, D>> {
        let thread = thread::number();
        for index in self.table.candidates(want) {
            if let Some(held) = self.try_lease(index, want, access, thread, check) {
                return Some(held);
            }
        }
        None
    }

    #[inline(always)]
    pub(super) fn try_lease(
        &self,
        index: u32,
        want: Range,
        access: Access,
        thread: usize,
        check: Check,
    ) -> Option<Leased<'_, M, D>> {
        let (state, head) = (self.slab.state(index), self.head(index));
        if !state.is_live() || !head.contains(want) {
            return None;
        }
        if access == Access::Write && !state.has(WRITE) {
            return None;
        }
        let Some(held) = self.slab.lease(index, state, thread) else {
            self.counters.in_vain.add(1);
            return None;
        };
        // Before the lease it may have been another entry's.
        if !head.contains(want) {
            self.counters.in_vain.add(1);
            return None;
        }
        if self.has_changed(&held, check) {
            drop(held);
            self.stale(index, state);
            return None;
        }
        head.touch();
        Some(held)
    }

    /// The source's check, of an entry that is leased. Where nothing at all has changed since it was last in order, its
    /// registration need not be looked at.
    #[inline(always)]
    fn has_changed(&self, held: &Leased<'_, M, D>, check: Check) -> bool {
        let era = match check {
            Check::Strict => self.mm.era(),
            Check::Ordered => self.mm.era_ordered(),
        };
        match era {
            Some(era) if self.head(held.index()).word(STAMP).load(Ordering::Relaxed) == era => false,
            Some(era) if self.counts_as_before(held.index()) => {
                // The era was read before the count. The lease keeps the entry from being another.
                self.head(held.index()).word(STAMP).store(era, Ordering::Relaxed);
                false
            }
            _ => self.has_changed_since(held, check, era),
        }
    }

    /// Where the mm is busy elsewhere: still without a look at the registration.
    #[inline(never)]
    fn counts_as_before(&self, index: u32) -> bool {
        let head = self.head(index);
        let expected = head.word(COUNT).load(Ordering::Relaxed);
        expected != NEVER && head.range().is_some_and(|range| self.mm.count_in(range) == Some(expected))
    }

    #[inline(never)]
    fn has_changed_since(&self, held: &Leased<'_, M, D>, check: Check, era: Option<u64>) -> bool {
        let registration = held.body();
        let changed = registration.watched.as_ref().is_none_or(|w| match check {
            Check::Strict => w.subscription.read_retry(w.seq),
            Check::Ordered => w.subscription.read_retry_ordered(w.seq),
        });
        // The era was read before the sequence, as the mm wants it. The lease keeps the entry from being another.
        if let (false, Some(era)) = (changed, era) {
            self.head(held.index()).word(STAMP).store(era, Ordering::Relaxed);
        }
        changed
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
        let next = self.head(index).word(NEXT);
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
            next = self.head(index).word(NEXT).load(Ordering::Relaxed);
            Some(index)
        })
    }

    pub(super) fn has_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed) != 0
    }

    /// A lease has ended.
    #[inline(always)]
    pub(super) fn ended(&self, index: u32) {
        if self.slab.state(index).phase() == Phase::Dead {
            self.ended_of_the_dead();
        }
    }

    #[cold]
    fn ended_of_the_dead(&self) {
        if self.at_home() {
            self.kicked.store(true, Ordering::Release);
            self.reaper.wake_all();
        }
    }
}
