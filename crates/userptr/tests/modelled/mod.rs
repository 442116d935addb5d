// SPDX-License-Identifier: MIT OR Apache-2.0
//! softmm, with its news delivered as the live sources deliver theirs: the twins of `hostmm::kvm` and `hostmm::uffd` for
//! exploration. A subscriber's own callback comes from a thread of the source, at any time after the counters, or never,
//! which is as late as it can be.
//!
//! ```text
//! kvm    start of a change: the buckets of its pages, then the total; the page tables change
//! uffd   start: "in flight"; the page tables change; the event can be read; its reader lets the changer return
//!        the reader: epoch odd, read, mark what the event is about, epoch even
//! ```
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::cell::Cell;
use std::sync::Arc;

use interleave::{
    AtomicBool, AtomicU64, LockClass, MaySleep, Mutex, Ordering, PerThread, Scope, Sleep, WaitQueue,
};
use mmu_notifier::primary::{
    After, Count, Gone, GupError, IdentityError, Invalidate, PageIdentity, PrimaryMmu, SeqMoved, SetSeq,
    SubscribeError, Subscription, Unheard,
};
use mmu_notifier::{
    Access, Event, InsideInvalidation, Invalidation, PAGE_SHIFT, PAGE_SIZE, PageAddr, Range, Seq, WouldBlock,
};
use softmm::{Machine, Mm, MmPin, MmSubscription, Placement, Prot};

/// How a change reaches a subscriber.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum How {
    /// As softmm does: the change waits for the callback.
    Blocks,
    /// The same, and `read_retry` says "nothing has changed": as if nobody asked.
    Unasked,
    /// As the kvm source, and nobody is called.
    Kvm,
    /// As the kvm source, with callbacks.
    KvmCalls,
    /// As the kvm source where a range is counted in many words: its eras are kept.
    KvmEras,
    /// A fault of that: the total moves before the bucket, so that an era can stand for a bucket of its past.
    KvmTotalFirst,
    /// As the uffd source, and nobody is called.
    Uffd,
    /// As the uffd source, with callbacks.
    UffdCalls,
    /// A fault of it: the event is read, and its changer let go, before the epoch says so.
    UffdReadsFirst,
    /// A fault of it: a strict check does not ask whether a change is in flight.
    UffdNoProbe,
    /// The control: nothing moves and nobody is called.
    Never,
}

impl How {
    fn is_kvm(self) -> bool {
        matches!(self, How::Kvm | How::KvmCalls | How::KvmEras | How::KvmTotalFirst)
    }

    fn is_uffd(self) -> bool {
        matches!(self, How::Uffd | How::UffdCalls | How::UffdReadsFirst | How::UffdNoProbe)
    }

    fn calls(self) -> bool {
        matches!(self, How::KvmCalls | How::UffdCalls)
    }

    /// Does the source have a thread?
    pub(crate) fn has_monitor(self) -> bool {
        self.is_uffd() || self.calls()
    }
}

/// Pages are told apart by the low bits of their number.
const BUCKETS: usize = 4;

fn buckets(range: Range) -> impl Iterator<Item = usize> {
    (range.start() >> PAGE_SHIFT..range.end() >> PAGE_SHIFT).map(|page| page as usize % BUCKETS).take(BUCKETS)
}

fn mask(range: Range) -> u64 {
    buckets(range).fold(0, |mask, bucket| mask | 1 << bucket)
}

static EVENTS: LockClass = LockClass::new("modelled_events");
static CALLEES: LockClass = LockClass::new("modelled_callees");
static CALLEE: LockClass = LockClass::new("modelled_callee");

/// The callee that the thread is in a callback of.
static CALLING: PerThread<Cell<*const Callee>> = PerThread::new(|| Cell::new(std::ptr::null()));

/// Whom to call back. Its lock is held while the callback runs, and taken to end it.
struct Callee {
    range: Range,
    callback: Mutex<Option<Arc<dyn Invalidate>>>,
}

/// What a source keeps.
struct News {
    how: How,
    /// kvm: changes of pages of each bucket. uffd: the epoch at which one was heard of last.
    of: [AtomicU64; BUCKETS],
    /// kvm: changes of any page.
    total: AtomicU64,
    /// uffd: odd while events are worked on.
    epoch: AtomicU64,
    /// uffd: buckets of which a change has begun and its event is not read (the kernel's `mmap_changing`).
    in_flight: AtomicU64,
    /// Buckets of which there are events to read (uffd), or records (kvm).
    events: AtomicU64,
    callees: Mutex<Vec<Arc<Callee>>>,
    stop: AtomicBool,
    wait: WaitQueue,
}

impl News {
    fn new(how: How) -> News {
        News {
            how,
            of: std::array::from_fn(|_| AtomicU64::new(0)),
            total: AtomicU64::new(0),
            epoch: AtomicU64::new(2),
            in_flight: AtomicU64::new(0),
            events: AtomicU64::new(0),
            callees: Mutex::new(&CALLEES, Vec::new()),
            stop: AtomicBool::new(false),
            wait: WaitQueue::new(&EVENTS),
        }
    }

    fn sum(&self, range: Range) -> u64 {
        buckets(range).map(|bucket| self.of[bucket].load(Ordering::SeqCst)).sum()
    }

    fn last(&self, range: Range) -> u64 {
        buckets(range).map(|bucket| self.of[bucket].load(Ordering::SeqCst)).max().unwrap_or(0)
    }

    fn even(&self) -> Option<u64> {
        let epoch = self.epoch.load(Ordering::SeqCst);
        epoch.is_multiple_of(2).then_some(epoch)
    }

    /// A change begins: the page tables have not changed yet.
    fn begins(&self, range: Range) {
        let count = |counter: &AtomicU64| {
            counter.fetch_add(1, Ordering::SeqCst);
        };
        match self.how {
            How::Kvm | How::KvmCalls | How::KvmEras => {
                buckets(range).for_each(|bucket| count(&self.of[bucket]));
                count(&self.total);
                if self.how.calls() {
                    self.events.fetch_or(mask(range), Ordering::SeqCst);
                    self.wait.wake_all();
                }
            }
            How::KvmTotalFirst => {
                count(&self.total);
                buckets(range).for_each(|bucket| count(&self.of[bucket]));
            }
            how if how.is_uffd() => {
                self.in_flight.fetch_or(mask(range), Ordering::SeqCst);
            }
            _ => {}
        }
    }

    /// Reads what there is. Of which buckets.
    fn read(&self) -> u64 {
        let read = self.events.swap(0, Ordering::SeqCst);
        self.wait.wake_all();
        read
    }

    /// One batch.
    fn hear(&self, cx: &mut MaySleep<'_>) {
        if !self.how.is_uffd() {
            let read = self.read();
            return self.call(cx, read);
        }
        let early = (self.how == How::UffdReadsFirst).then(|| self.read());
        let even = self.epoch.fetch_add(1, Ordering::SeqCst) + 2;
        let read = early.unwrap_or_else(|| self.read());
        for bucket in (0..BUCKETS).filter(|bucket| read >> bucket & 1 == 1) {
            self.of[bucket].store(even, Ordering::SeqCst);
        }
        self.epoch.store(even, Ordering::SeqCst);
        self.wait.wake_all();
        self.call(cx, read);
    }

    fn call(&self, cx: &mut MaySleep<'_>, read: u64) {
        let callees = if self.how.calls() { self.callees.lock(cx).clone() } else { Vec::new() };
        for callee in callees.iter().filter(|callee| mask(callee.range) & read != 0) {
            if let Some(callback) = &*callee.callback.lock(cx) {
                let inv = Invalidation::of_unknown_kind(callee.range);
                CALLING.with(|calling| calling.set(Arc::as_ptr(callee)));
                // A range that blocks cannot be refused.
                let _ = callback.invalidate(Sleep::May(cx), &inv, SetSeq::already_moved());
                CALLING.with(|calling| calling.set(std::ptr::null()));
            }
        }
    }
}

/// The callback of softmm: the source's own ear, or what is in place of a subscriber's callback that does not come.
struct Ear {
    how: How,
    news: Option<Arc<News>>,
}

impl Invalidate for Ear {
    fn invalidate(
        &self,
        _: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        // uffd hears of what is unmapped, and not of copies: a pin makes one of the zero page.
        if let Some(news) =
            self.news.as_ref().filter(|news| !news.how.is_uffd() || inv.event == Some(Event::Unmap))
        {
            news.begins(inv.range);
        }
        Ok(if self.how == How::Never { seq.skip_against_the_rules() } else { seq.set() })
    }
}

/// softmm, heard in one of these ways.
pub(crate) struct Told {
    mm: Arc<Mm>,
    how: How,
    news: Arc<News>,
    /// Of a live source.
    _ear: Option<MmSubscription>,
}

impl Told {
    pub(crate) fn new(cx: &mut MaySleep<'_>, mm: &Arc<Mm>, how: How) -> Arc<Told> {
        let news = Arc::new(News::new(how));
        let ear = Ear { how, news: Some(Arc::clone(&news)) };
        let ear =
            (how.is_kvm() || how.is_uffd()).then(|| mm.subscribe(cx, Range::ALL, Arc::new(ear)).unwrap());
        Arc::new(Told { mm: Arc::clone(mm), how, news, _ear: ear })
    }

    /// munmap(2), which over uffd returns when its event has been read.
    pub(crate) fn munmap(&self, cx: &mut MaySleep<'_>, range: Range) {
        self.mm.munmap(cx, range);
        if self.how.is_uffd() {
            let (news, mask) = (&self.news, mask(range));
            news.events.fetch_or(mask, Ordering::SeqCst);
            news.wait.wake_all();
            news.wait.wait_event(cx, || news.events.load(Ordering::SeqCst) & mask == 0);
            news.in_flight.fetch_and(!mask, Ordering::SeqCst);
            news.wait.wake_all();
        }
    }

    /// Starts the thread that reads events until [`stop`](Told::stop), where the source has one.
    pub(crate) fn start<'s>(&'s self, threads: &Scope<'s, '_>) {
        if self.how.has_monitor() {
            threads.spawn("monitor", |cx| self.monitor(cx));
        }
    }

    fn monitor(&self, cx: &mut MaySleep<'_>) {
        let news = &self.news;
        let stopped = || news.stop.load(Ordering::SeqCst);
        while !stopped() {
            news.wait.wait_event(cx, || stopped() || news.events.load(Ordering::SeqCst) != 0);
            if news.events.load(Ordering::SeqCst) != 0 {
                news.hear(cx);
            }
        }
    }

    pub(crate) fn stop(&self) {
        self.news.stop.store(true, Ordering::SeqCst);
        self.news.wait.wake_all();
    }
}

/// A range of [`Told`].
pub(crate) struct ToldSubscription {
    inner: MmSubscription,
    news: Arc<News>,
    callee: Option<Arc<Callee>>,
}

impl Drop for ToldSubscription {
    /// As a fence: a callback that runs has returned. In the callback itself, which cannot wait for itself, it makes sure
    /// that this call is the last.
    fn drop(&mut self) {
        if let Some(callee) = self.callee.take() {
            let inside = CALLING.with(|calling| calling.get() == Arc::as_ptr(&callee));
            MaySleep::enter(|cx| {
                if !inside {
                    *callee.callback.lock(cx) = None;
                }
                self.news.callees.lock(cx).retain(|other| !Arc::ptr_eq(other, &callee));
            });
        }
    }
}

/// A point in the life of a range: softmm's own, and what the source has counted of it (kvm) or its epoch (uffd).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ToldSeq {
    inner: Seq,
    heard: u64,
}

impl Subscription for ToldSubscription {
    type Seq = ToldSeq;

    fn range(&self) -> Range {
        self.inner.range()
    }

    /// The snapshot comes first and the wait for what is in flight, in place of a barrier, afterwards.
    fn read_begin(&self, cx: &mut MaySleep<'_>) -> Result<ToldSeq, Gone> {
        let (news, mut heard) = (&self.news, 0);
        if news.how.is_kvm() {
            heard = news.sum(self.range());
        } else if news.how.is_uffd() {
            let probes = news.how != How::UffdNoProbe;
            news.wait.wait_event(cx, || !probes || news.in_flight.load(Ordering::SeqCst) == 0);
            news.wait.wait_event(cx, || news.even().inspect(|even| heard = *even).is_some());
        }
        Ok(ToldSeq { inner: self.inner.read_begin(cx)?, heard })
    }

    /// The live uffd source waits for what is in flight, with patience; this one has none, and says "changed".
    fn read_retry(&self, seq: ToldSeq) -> bool {
        match self.news.how {
            How::Unasked => false,
            How::Uffd | How::UffdCalls | How::UffdReadsFirst
                if self.news.in_flight.load(Ordering::SeqCst) != 0 =>
            {
                true
            }
            _ => self.read_retry_ordered(seq),
        }
    }

    fn count_at(&self, seq: ToldSeq) -> Option<Count> {
        let range = self.range();
        let key = range.start() | range.pages();
        matches!(self.news.how, How::Kvm | How::KvmCalls).then_some(Count { key, value: seq.heard })
    }

    fn read_retry_ordered(&self, seq: ToldSeq) -> bool {
        let news = &self.news;
        match news.how {
            how if how.is_kvm() => news.sum(self.range()) != seq.heard,
            how if how.is_uffd() => match news.even() {
                Some(even) => even != seq.heard && news.last(self.range()) > seq.heard,
                None => true,
            },
            _ => self.inner.read_retry(seq.inner),
        }
    }

    fn unsubscribe(&self, cx: &mut MaySleep<'_>) -> Result<(), InsideInvalidation> {
        self.inner.unsubscribe(cx)
    }
}

impl PrimaryMmu for Told {
    /// The weakest of them.
    type Delivery = After;
    type Subscription = ToldSubscription;
    type Pin = MmPin;

    fn subscribe(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<ToldSubscription, SubscribeError> {
        let news = Arc::clone(&self.news);
        if matches!(self.how, How::Blocks | How::Unasked) {
            return Ok(ToldSubscription {
                inner: self.mm.subscribe(cx, range, callback)?,
                news,
                callee: None,
            });
        }
        let inner = self.mm.subscribe(cx, range, Arc::new(Ear { how: self.how, news: None }))?;
        let callee = self
            .how
            .calls()
            .then(|| Arc::new(Callee { range, callback: Mutex::new(&CALLEE, Some(callback)) }));
        self.news.callees.lock(cx).extend(callee.clone());
        Ok(ToldSubscription { inner, news, callee })
    }

    fn fault_in(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<(), GupError> {
        self.mm.fault_in(cx, range, access)
    }

    fn pin(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<MmPin, GupError> {
        self.mm.pin(cx, range, access)
    }

    fn page_identity(&self, cx: &mut MaySleep<'_>, page: PageAddr) -> Result<PageIdentity, IdentityError> {
        self.mm.page_identity(cx, page)
    }

    fn cannot_hear(&self) -> &'static [Unheard] {
        &[]
    }

    fn settle(&self) -> Result<(), Gone> {
        let news = &self.news;
        if news.how.is_uffd() && news.how != How::UffdNoProbe {
            let quiet = || news.in_flight.load(Ordering::SeqCst) == 0 && news.even().is_some();
            MaySleep::enter(|cx| news.wait.wait_event(cx, quiet));
        }
        Ok(())
    }

    fn era(&self) -> Option<u64> {
        self.how.is_kvm().then(|| self.news.total.load(Ordering::SeqCst))
    }

    fn count(&self, key: u64) -> Option<u64> {
        let (start, pages) = (key & !(PAGE_SIZE - 1), key % PAGE_SIZE);
        self.how.is_kvm().then(|| self.news.sum(Range::new(start, pages * PAGE_SIZE).unwrap()))
    }

    fn era_ordered(&self) -> Option<u64> {
        if self.how.is_uffd() { self.news.even() } else { self.era() }
    }
}

/// A machine of which little is made anew for each execution.
pub(crate) fn small_machine() -> Arc<Machine> {
    Machine::new(softmm::Config {
        frames: 8,
        tables: 8,
        swap_slots: 0,
        cpus: 1,
        words_per_page: 1,
        ..softmm::Config::default()
    })
}

/// Where the tests have their memory.
pub(crate) fn pages(first: u64, pages: u64) -> Range {
    Range::new((0x100 + first) * PAGE_SIZE, pages * PAGE_SIZE).unwrap()
}

/// Maps `range`, and has `value` in the first word of each page.
pub(crate) fn map(cx: &mut MaySleep<'_>, mm: &Mm, range: Range, value: u64) {
    mm.mmap(cx, Placement::Fixed(range), Prot::ReadWrite).unwrap();
    for page in range.iter_pages() {
        mm.machine().cpus()[0].store(cx, mm, page.get(), value).unwrap();
    }
}
