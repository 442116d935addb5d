// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a cache is made of, and how entries go out of use.

use std::sync::Arc;

use interleave::{
    AtomicBool, AtomicQuad, AtomicU64, AtomicWords, Here, LockClass, Mutex, Ordering, WaitQueue,
};
use mmu_notifier::primary::{PrimaryMmu, Subscription};
use mmu_notifier::{Access, IntervalIndex, Key, Range};

use super::Options;
use super::audit::Audit;
use super::head::{Head, WRITE};
use super::slab::{Dead, Held, Phase, Pin, Seen, Slab, State};
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

/// What an entry says of a registration with these rights.
pub(super) fn marks(rights: Access) -> u64 {
    if rights == Access::Write { WRITE } else { 0 }
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
