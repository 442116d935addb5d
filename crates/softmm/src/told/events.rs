// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a source has heard of one mm: its sequences, what is in flight, and who is to be called.
//!
//! ```text
//! kvm    start of a change: the buckets of its pages, then the total; the page tables change
//! uffd   start: one more is in flight; the page tables change; the event can be read; when it is, one less is in flight
//!        who reads: epoch odd, read, mark what the events are about, epoch even
//! ```
//!
//! A sequence is what the buckets of its range have counted (kvm), or an epoch (uffd), out of date when a bucket of its
//! range was marked since. Pages share buckets, so that a change elsewhere can be taken for one's own, as live.
//!
//! Lock order: locks of the mm > reading (spin), which is a leaf; see [`callees`](super::callees) for theirs.

use interleave::{AtomicBool, AtomicU64, Context, LockClass, MaySleep, Ordering, Sleep, SpinLock, WaitQueue};
use mmu_notifier::{PAGE_SHIFT, Range};

use super::callees::Callees;
use super::how::{Fault, How, When};

static MOVED: LockClass = LockClass::new("told_moved");
static READING: LockClass = LockClass::new("told_reading");

/// Few, so that they are shared.
const BUCKETS: usize = 2;

fn buckets(range: Range) -> impl Iterator<Item = usize> {
    (range.start() >> PAGE_SHIFT..range.end() >> PAGE_SHIFT).map(|page| page as usize % BUCKETS).take(BUCKETS)
}

/// A bit for each bucket of the range.
pub(super) fn key(range: Range) -> u64 {
    buckets(range).fold(0, |key, bucket| key | 1 << bucket)
}

fn buckets_of(key: u64) -> impl Iterator<Item = usize> {
    (0..BUCKETS).filter(move |bucket| key >> bucket & 1 == 1)
}

/// What a source has heard of one mm. Whoever passes it on calls these functions where the mm would call the source's
/// callbacks.
pub struct Events {
    pub(super) how: How,
    /// kvm: changes of pages of each bucket. uffd: the epoch at which one was heard of last.
    of: [AtomicU64; BUCKETS],
    /// kvm: changes of any page. uffd: the epoch, odd while events are read.
    era: AtomicU64,
    /// By key, what was given away last: what is found where nobody looks whether it has moved.
    given: [AtomicU64; 1 << BUCKETS],
    /// uffd: changes that have begun and whose event is not read (the kernel's `mmap_changing`).
    in_flight: AtomicU64,
    /// uffd: buckets of which there are events to read.
    unread: AtomicU64,
    /// uffd: one at a time reads.
    reading: SpinLock<()>,
    released: AtomicBool,
    stopped: AtomicBool,
    /// Woken when something moves that anybody here waits for.
    moved: WaitQueue,
    pub(super) callees: Callees,
}

impl Events {
    pub(super) fn new(how: How) -> Events {
        Events {
            how,
            of: std::array::from_fn(|_| AtomicU64::new(0)),
            era: AtomicU64::new(0),
            given: std::array::from_fn(|_| AtomicU64::new(0)),
            in_flight: AtomicU64::new(0),
            unread: AtomicU64::new(0),
            reading: SpinLock::new(&READING, ()),
            released: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            moved: WaitQueue::new(&MOVED),
            callees: Callees::new(),
        }
    }

    /// Does the sequence move at the end of a change, so that the source must hear it?
    pub fn is_late(&self) -> bool {
        self.how.when == When::Late
    }

    /// invalidate_range_start. Is anybody concerned?
    pub fn started(&self, mut cx: Sleep<'_, '_>, range: Range) -> bool {
        if self.is_late() {
            self.in_flight.fetch_add(1, Ordering::SeqCst);
            return false;
        }
        self.told(&mut cx, range)
    }

    /// invalidate_range_end: here whoever makes the change reads the event, and calls, where it may sleep. Was anybody
    /// called?
    pub fn ended(&self, mut cx: Sleep<'_, '_>, range: Range) -> bool {
        if !self.is_late() {
            return false;
        }
        self.moves(&mut cx, range);
        self.lands(&mut cx, range);
        let Sleep::May(cx) = cx else { return false };
        let mut any = false;
        while self.deliver(cx) {
            any = true;
        }
        any
    }

    /// The same when the system call returns, by which its event must be read; others read it, and call.
    pub(super) fn ended_elsewhere(&self, cx: &mut MaySleep<'_>, range: Range) {
        let key = key(range);
        self.unread.fetch_or(key, Ordering::SeqCst);
        self.moved.wake_all();
        self.moved.wait_event(cx, || self.unread.load(Ordering::SeqCst) & key == 0);
        self.lands(cx, range);
    }

    /// A change that has no pair (invalidate_page, change_pte): it moves the sequence where it is told. Is anybody
    /// concerned?
    pub fn told(&self, cx: &mut impl Context, range: Range) -> bool {
        self.moves(cx, range);
        self.callees.tell_later(cx, range)
    }

    /// The mm is gone. Is anybody concerned?
    pub fn released(&self, cx: &mut impl Context) -> bool {
        self.released.store(true, Ordering::SeqCst);
        self.told(cx, Range::ALL)
    }

    /// Runs the callbacks of one change; whether there was one.
    pub fn deliver(&self, cx: &mut MaySleep<'_>) -> bool {
        self.callees.deliver(cx)
    }

    /// The thread of a source: reads events, and calls, until [`stop`](Self::stop).
    pub(super) fn monitor(&self, cx: &mut MaySleep<'_>) {
        let stopped = || self.stopped.load(Ordering::SeqCst);
        let unread = || self.unread.load(Ordering::SeqCst) != 0;
        while !stopped() {
            self.moved.wait_event_with(cx, |cx| stopped() || unread() || self.callees.are_untold(cx));
            if unread() {
                self.read(cx);
            }
            self.deliver(cx);
        }
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(super) fn wake(&self) {
        self.moved.wake_all();
    }

    pub(super) fn is_released(&self) -> bool {
        self.released.load(Ordering::SeqCst)
    }

    /// The sequence of `range` moves.
    fn moves(&self, cx: &mut impl Context, range: Range) {
        if self.is_late() {
            self.unread.fetch_or(key(range), Ordering::SeqCst);
            return self.read(cx);
        }
        let total = || self.era.fetch_add(1, Ordering::SeqCst);
        let total_first = self.how.is(Fault::TotalFirst);
        if total_first {
            total();
        }
        for bucket in buckets(range) {
            self.of[bucket].fetch_add(1, Ordering::SeqCst);
        }
        // Last: whoever has loaded the new total sees the buckets.
        if !total_first {
            total();
        }
    }

    /// Reads what events there are.
    fn read(&self, cx: &mut impl Context) {
        let _reading = self.reading.lock(cx);
        let early = self.how.is(Fault::ReadsFirst).then(|| self.take_unread());
        let even = self.era.fetch_add(1, Ordering::SeqCst) + 2;
        let read = early.unwrap_or_else(|| self.take_unread());
        for bucket in buckets_of(read) {
            self.of[bucket].store(even, Ordering::SeqCst);
        }
        self.era.store(even, Ordering::SeqCst);
        self.moved.wake_all();
    }

    /// The buckets of which there was something to read; their changers may return.
    fn take_unread(&self) -> u64 {
        let read = self.unread.swap(0, Ordering::SeqCst);
        self.moved.wake_all();
        read
    }

    /// One less is in flight.
    fn lands(&self, cx: &mut impl Context, range: Range) {
        self.callees.tell_later(cx, range);
        // The start may have been switched off.
        if self.in_flight.load(Ordering::SeqCst) > 0 {
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
        self.moved.wake_all();
    }

    fn is_in_flight(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) > 0
    }

    /// uffd: waits until no change is in flight and no event is being read; the epoch then.
    pub(super) fn quiet_epoch(&self, cx: &mut MaySleep<'_>) -> u64 {
        let mut epoch = None;
        self.moved.wait_event(cx, || {
            epoch = if self.is_in_flight() { None } else { self.era() };
            epoch.is_some()
        });
        epoch.unwrap_or_default()
    }

    /// Must a strict check say "changed"? Live it waits, with patience; this one has none.
    pub(super) fn probe(&self) -> bool {
        self.is_late() && !self.how.is(Fault::NoProbe) && self.is_in_flight()
    }

    /// `None` while events are read.
    pub(super) fn era(&self) -> Option<u64> {
        let era = self.era.load(Ordering::SeqCst);
        (!self.is_late() || era.is_multiple_of(2)).then_some(era)
    }

    /// kvm: what the buckets of `key` have counted.
    pub(super) fn count_of(&self, key: u64) -> u64 {
        buckets_of(key).map(|bucket| self.of[bucket].load(Ordering::SeqCst)).sum()
    }

    pub(super) fn give(&self, key: u64, count: u64) {
        self.given[key as usize].store(count, Ordering::SeqCst);
    }

    pub(super) fn given(&self, key: u64) -> u64 {
        self.given[key as usize].load(Ordering::SeqCst)
    }

    /// Has the sequence of the range of `key` moved since it was `seq`?
    pub(super) fn has_moved(&self, key: u64, seq: u64) -> bool {
        if !self.is_late() {
            return self.count_of(key) != seq;
        }
        let marked = || buckets_of(key).any(|bucket| self.of[bucket].load(Ordering::SeqCst) > seq);
        self.era().is_none_or(|epoch| epoch != seq && marked())
    }
}
