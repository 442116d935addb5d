// SPDX-License-Identifier: MIT OR Apache-2.0
//! The notifier sources of the running kernel, modelled over softmm with their delivery: what they count, when, and what
//! their `read_begin` waits for (hostmm's `primary` and `barrier`).
//!
//! | | [`InTime`] (kvm) | [`Late`] (uffd) |
//! |---|---|---|
//! | the sequence moves | at the start of a change | at its end |
//! | `read_begin` | takes and gives back mmap_lock for writing, unless nothing moved since it last did | waits until no change is in flight |
//! | `read_retry` | has the sequence moved? | is a change in flight, or has it? |
//! | `era` | yes | for ordered lookups |
//! | callbacks | when a monitor comes to it: only when all is over | at the end of the change |
//!
//! A change that has no pair (invalidate_page, change_pte) moves the sequence where it is told. Sequences are counted by bucket,
//! so that a change elsewhere can be taken for one's own, as live. Which changes userfaultfd does not hear is not modelled:
//! the model is of when, and hears all.
//!
//! Lock order: locks of the mm > delivering > locks of the callbacks; subscribed (spin) is a leaf.

use interleave::explore::{SiteKind, mutated};
use interleave::{
    AtomicBool, AtomicU64, Context, LockClass, MaySleep, Mutex, Ordering, Sleep, SpinLock, WaitQueue,
};
use mmu_notifier::primary::{
    After, Count, CountedBefore, Delivery, Gone, GupError, IdentityError, Invalidate, PageIdentity,
    PrimaryMmu, Seq, SetSeq, SubscribeError, Subscription, Unheard,
};
use mmu_notifier::{Access, InsideInvalidation, Invalidation, PAGE_SIZE, PageAddr, Range};
use softmm::{Mm, MmPin};
use std::collections::{BTreeMap, VecDeque};
use std::marker::PhantomData;
use std::panic::Location;
use std::sync::Arc;

static ENDED: LockClass = LockClass::new("modelled source");
static SUBSCRIBED: LockClass = LockClass::new("modelled source subscribed");
static DELIVERING: LockClass = LockClass::new("modelled source delivering");
static SETTLED: LockClass = LockClass::new("modelled source settled");

/// When a source tells.
pub(super) trait Timing: Send + Sync + 'static {
    /// Its name in the types of the contract.
    type Delivery: Delivery;
    /// The sequence moves at the end of a change.
    const LATE: bool;
}

/// Before the page tables change, as the kvm source.
pub(super) enum InTime {}

/// Before the system call returns, as userfaultfd.
pub(super) enum Late {}

impl Timing for InTime {
    type Delivery = CountedBefore;
    const LATE: bool = false;
}

impl Timing for Late {
    type Delivery = After;
    const LATE: bool = true;
}

/// Where nothing is mapped.
const HOLE: u64 = 0x7000_0000;
const BUCKETS: u64 = 2;

fn buckets(range: Range) -> impl Iterator<Item = usize> {
    let first = range.start() / PAGE_SIZE;
    let pages = (range.len() / PAGE_SIZE).min(BUCKETS);
    (first..first + pages).map(|page| (page % BUCKETS) as usize)
}

/// A bit for each bucket of the range.
fn key(range: Range) -> u64 {
    buckets(range).fold(0, |key, bucket| key | 1 << bucket)
}

#[derive(Default)]
struct Subscribed {
    next: u64,
    listening: BTreeMap<u64, (Range, Arc<dyn Invalidate>)>,
    untold: VecDeque<Range>,
}

/// What the source has seen of one mm.
pub(super) struct Events {
    pub(super) late: bool,
    counts: [AtomicU64; BUCKETS as usize],
    /// By key, what [`Subscription::count_at`] said last: what is found where nobody looks whether it has moved.
    given: [AtomicU64; 1 << BUCKETS],
    era: AtomicU64,
    in_flight: AtomicU64,
    /// Woken when `in_flight` falls.
    ended: WaitQueue,
    released: AtomicBool,
    subscribed: SpinLock<Subscribed>,
    /// Held while callbacks run; to take it is a fence.
    delivering: Mutex<()>,
}

impl Events {
    fn new(late: bool) -> Events {
        Events {
            late,
            counts: [AtomicU64::new(0), AtomicU64::new(0)],
            given: [0; 1 << BUCKETS].map(AtomicU64::new),
            era: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            ended: WaitQueue::new(&ENDED),
            released: AtomicBool::new(false),
            subscribed: SpinLock::new(&SUBSCRIBED, Subscribed::default()),
            delivering: Mutex::new(&DELIVERING, ()),
        }
    }

    fn count(&self, range: Range) -> u64 {
        self.count_of(key(range))
    }

    fn count_of(&self, key: u64) -> u64 {
        let counts = self.counts.iter().enumerate().filter(|(bucket, _)| key >> bucket & 1 != 0);
        counts.map(|(_, count)| count.load(Ordering::SeqCst)).sum()
    }

    fn moves(&self, range: Range) {
        for bucket in buckets(range) {
            self.counts[bucket].fetch_add(1, Ordering::SeqCst);
        }
        // Last: whoever has loaded the new era sees the counts.
        self.era.fetch_add(1, Ordering::SeqCst);
    }

    /// To be delivered later. Is anybody concerned?
    fn tell_later(&self, cx: &mut impl Context, range: Range) -> bool {
        let mut subscribed = self.subscribed.lock(cx);
        let concerned = subscribed.listening.values().any(|(listened, _)| listened.overlaps(range));
        if concerned {
            subscribed.untold.push_back(range);
        }
        concerned
    }

    /// invalidate_range_start. Is anybody concerned?
    pub(super) fn started(&self, mut cx: Sleep<'_, '_>, range: Range) -> bool {
        if self.late {
            self.in_flight.fetch_add(1, Ordering::SeqCst);
            return false;
        }
        self.moves(range);
        self.tell_later(&mut cx, range)
    }

    /// invalidate_range_end, which only the late one hears. Was anybody told?
    pub(super) fn ended(&self, mut cx: Sleep<'_, '_>, range: Range) -> bool {
        self.moves(range);
        self.tell_later(&mut cx, range);
        // The start may have been switched off.
        if self.in_flight.load(Ordering::SeqCst) > 0 {
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
        self.ended.wake_all();
        let Sleep::May(cx) = cx else { return false };
        let mut any = false;
        while self.deliver(cx) {
            any = true;
        }
        any
    }

    /// A change that has no pair. Is anybody concerned?
    pub(super) fn told(&self, cx: &mut impl Context, range: Range) -> bool {
        self.moves(range);
        self.tell_later(cx, range)
    }

    /// The mm is gone.
    pub(super) fn released(&self, cx: &mut impl Context) -> bool {
        self.released.store(true, Ordering::SeqCst);
        self.moves(Range::ALL);
        self.tell_later(cx, Range::ALL)
    }

    /// Runs the callbacks of one change; whether there was one.
    pub(super) fn deliver(&self, cx: &mut MaySleep<'_>) -> bool {
        let _delivering = self.delivering.lock(cx);
        let mut subscribed = self.subscribed.lock(cx);
        let Some(range) = subscribed.untold.pop_front() else { return false };
        let listening = subscribed.listening.values().filter(|(listened, _)| listened.overlaps(range));
        let callbacks: Vec<_> = listening.map(|(_, callback)| callback.clone()).collect();
        drop(subscribed);
        for callback in callbacks {
            let change = Invalidation::of_unknown_kind(range);
            // In a context that may sleep it does not refuse, and nobody would hear it.
            let _ = callback.invalidate(Sleep::May(cx), &change, SetSeq::already_moved());
        }
        true
    }
}

/// softmm, heard through a modelled source.
pub(super) struct Heard<T: Timing> {
    mm: Arc<Mm>,
    pub(super) events: Arc<Events>,
    timing: PhantomData<T>,
}

impl<T: Timing> Heard<T> {
    pub(super) fn new(mm: &Arc<Mm>) -> Heard<T> {
        Heard { mm: mm.clone(), events: Arc::new(Events::new(T::LATE)), timing: PhantomData }
    }
}

impl<T: Timing> PrimaryMmu for Heard<T> {
    type Delivery = T::Delivery;
    type Subscription = Watch;
    type Pin = MmPin;

    fn subscribe(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<Watch, SubscribeError> {
        let mut subscribed = self.events.subscribed.lock(cx);
        subscribed.next += 1;
        let number = subscribed.next;
        subscribed.listening.insert(number, (range, callback));
        drop(subscribed);
        let settled = Mutex::new(&SETTLED, None);
        Ok(Watch { mm: self.mm.clone(), events: self.events.clone(), number, range, settled })
    }

    fn fault_in(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<(), GupError> {
        self.mm.fault_in(cx, range, access)
    }

    fn pin(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<MmPin, GupError> {
        self.mm.pin_longterm(cx, range, access)
    }

    fn page_identity(&self, cx: &mut MaySleep<'_>, page: PageAddr) -> Result<PageIdentity, IdentityError> {
        self.mm.page_identity(cx, page)
    }

    fn cannot_hear(&self) -> &'static [Unheard] {
        &[]
    }

    fn era(&self) -> Option<u64> {
        if T::LATE { None } else { self.era_ordered() }
    }

    fn era_ordered(&self) -> Option<u64> {
        Some(self.events.era.load(Ordering::SeqCst))
    }

    #[track_caller]
    fn count(&self, key: u64) -> Option<u64> {
        if T::LATE {
            return None;
        }
        if mutated(SiteKind::Retry, Location::caller()) {
            return Some(self.events.given[key as usize].load(Ordering::SeqCst));
        }
        Some(self.events.count_of(key))
    }
}

/// One range that is listened to.
pub(super) struct Watch {
    mm: Arc<Mm>,
    events: Arc<Events>,
    number: u64,
    range: Range,
    /// The sequence after which read_begin has waited last.
    settled: Mutex<Option<Seq>>,
}

impl Watch {
    fn seq(&self) -> Seq {
        Seq::new(self.events.count(self.range))
    }

    fn stop_listening(&self, cx: &mut MaySleep<'_>) {
        let callback = self.events.subscribed.lock(cx).listening.remove(&self.number);
        if callback.is_some() {
            drop(self.events.delivering.lock(cx));
        }
    }
}

impl Subscription for Watch {
    type Seq = Seq;

    fn range(&self) -> Range {
        self.range
    }

    #[track_caller]
    fn read_begin(&self, cx: &mut MaySleep<'_>) -> Result<Seq, Gone> {
        if self.events.released.load(Ordering::SeqCst) {
            return Err(Gone::Released);
        }
        let waits = !mutated(SiteKind::Wait, Location::caller());
        if self.events.late {
            if waits {
                self.events.ended.wait_event(cx, || self.events.in_flight.load(Ordering::SeqCst) == 0);
            }
            return Ok(self.seq());
        }
        let seq = self.seq();
        let mut settled = self.settled.lock(cx);
        if waits
            && *settled != Some(seq)
            && let Ok(hole) = PageAddr::new(HOLE)
        {
            self.mm.munmap(cx, Range::page(hole));
        }
        *settled = Some(seq);
        Ok(seq)
    }

    #[track_caller]
    fn read_retry(&self, seq: Seq) -> bool {
        if mutated(SiteKind::Retry, Location::caller()) {
            return false;
        }
        // In this order: what ends in between has moved the sequence.
        (self.events.late && self.events.in_flight.load(Ordering::SeqCst) > 0) || self.seq() != seq
    }

    #[track_caller]
    fn read_retry_ordered(&self, seq: Seq) -> bool {
        !mutated(SiteKind::Retry, Location::caller()) && self.seq() != seq
    }

    fn count_at(&self, seq: Seq) -> Option<Count> {
        if self.events.late {
            return None;
        }
        let count = Count { key: key(self.range), value: seq.get() };
        self.events.given[count.key as usize].store(count.value, Ordering::SeqCst);
        Some(count)
    }

    fn unsubscribe(&self, cx: &mut MaySleep<'_>) -> Result<(), InsideInvalidation> {
        self.stop_listening(cx);
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Where nobody may sleep it goes on listening for whoever is gone.
        let _ = MaySleep::try_enter(|cx| self.stop_listening(cx));
    }
}
