// SPDX-License-Identifier: MIT OR Apache-2.0
//! A software mm, heard as the live sources hear the kernel: what they count, when, what their `read_begin` waits for, and when
//! subscribers are called. The twins of `hostmm::kvm` and `hostmm::uffd` for exploration.
//!
//! | | [`How::WAITS`] (softmm) | [`How::KVM`] | [`How::UFFD`] |
//! |---|---|---|---|
//! | the sequence moves | in the callback | at the start of a change | at its end, before its system call returns |
//! | `read_begin` waits | until no change of the range is in flight | for mmap_lock, unless nothing moved since it last did | until no change is in flight |
//! | `read_retry` | has the sequence moved? | has the sequence moved? | is a change in flight, or has it? |
//! | `read_retry_ordered` | the same | the same | has the sequence moved? |
//! | `era` | no | yes | for ordered lookups |
//! | `count` | no | of a bucket | no |
//! | callbacks | the change waits for them | later, or never | later, or never |
//!
//! Who hears, and who works for the source:
//!
//! * [`Told::listening`]: the source hears the mm by itself, as an interval notifier (5.5), whose events must say what
//!   happens (5.2). A thread of its own ([`Told::start`]) reads events and calls. Over uffd a change is [`Told::munmap`], which
//!   returns when its event has been read, as munmap(2) does; copies are not heard.
//! * [`Told::fed`]: whoever holds the [`Events`] passes on what the mm says, all of it or less, and has callbacks delivered.
//!   Over uffd the change itself reads its event, at its end, and calls.
//!
//! What else userfaultfd does not hear is not modelled: the model is of when, and nothing is declared in `cannot_hear`.
//! [`Fault`]s are what a test must find.
//!
//! Lock order: locks of the mm > told_callee > locks of the callbacks; told_settled > mmap_lock; told_callees and
//! told_reading (spin) are leaves.

mod callees;
mod events;
mod how;
mod subscription;

pub use events::Events;
pub use how::{Fault, How, When};
pub use subscription::ToldSubscription;

use std::marker::PhantomData;
use std::panic::Location;
use std::sync::Arc;

use interleave::explore::{SiteKind, mutated};
use interleave::{MaySleep, Scope, Sleep};
use mmu_notifier::primary::{
    After, Delivery, Gone, GupError, IdentityError, Invalidate, PageIdentity, PrimaryMmu, SeqMoved, SetSeq,
    SubscribeError, Unheard,
};
use mmu_notifier::{Access, Event, Invalidation, PageAddr, Range, WouldBlock};

use crate::mm::Mm;
use crate::primary::{MmPin, MmSubscription};
use subscription::By;

/// softmm, heard through a source. `D` is what the type says of its delivery.
pub struct Told<D = After> {
    mm: Arc<Mm>,
    events: Arc<Events>,
    /// What it hears the mm with, where it does so by itself.
    ear: Option<MmSubscription>,
    delivery: PhantomData<fn() -> D>,
}

/// The callback of a source that hears the mm by itself.
struct Ear(Arc<Events>);

impl Invalidate for Ear {
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let Ear(events) = self;
        match (events.how.when, inv.event) {
            (_, Some(Event::Release)) => {
                let mut cx = cx;
                events.released(&mut cx);
            }
            // Copies are not heard: a pin makes one of the zero page.
            (When::Late, event) if event != Some(Event::Unmap) => {}
            _ => {
                events.started(cx, inv.range);
            }
        }
        events.wake();
        Ok(seq.set())
    }
}

/// Hears by itself; [`After`], the weakest promise, is true of every [`How`].
impl Told<After> {
    /// A source that hears `mm` by itself.
    ///
    /// # Errors
    /// [`SubscribeError`], if the mm is gone.
    pub fn listening(cx: &mut MaySleep<'_>, mm: &Arc<Mm>, how: How) -> Result<Arc<Self>, SubscribeError> {
        let mut told = Told::new(mm, how);
        if how.when != When::Waits && !how.is(Fault::Deaf) {
            let ear = Ear(Arc::clone(&told.events));
            told.ear = Some(mm.subscribe(cx, Range::ALL, Arc::new(ear))?);
        }
        Ok(Arc::new(told))
    }

    /// munmap(2), which over uffd returns when its event has been read: never, if nobody reads.
    pub fn munmap(&self, cx: &mut MaySleep<'_>, range: Range) {
        self.mm.munmap(cx, range);
        if self.ear.is_some() && self.events.is_late() {
            self.events.ended_elsewhere(cx, range);
        }
    }

    /// Starts the thread that reads events and calls until [`stop`](Told::stop), where the source has one.
    pub fn start<'s>(&'s self, threads: &Scope<'s, '_>) {
        if self.events.how.has_monitor() {
            threads.spawn("monitor", |cx| self.events.monitor(cx));
        }
    }

    /// Stops it. What is not delivered then never is.
    pub fn stop(&self) {
        self.events.stop();
    }
}

impl<D: Delivery> Told<D> {
    /// A source that hears `mm` through its [`events`](Told::events) alone, as `D` says.
    pub fn fed(mm: &Arc<Mm>) -> Self {
        Told::new(mm, How::of::<D>())
    }

    fn new(mm: &Arc<Mm>, how: How) -> Self {
        let events = Arc::new(Events::new(how));
        Told { mm: Arc::clone(mm), events, ear: None, delivery: PhantomData }
    }

    /// What it hears.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    fn is(&self, when: When) -> bool {
        self.events.how.when == when
    }
}

impl<D: Delivery> PrimaryMmu for Told<D> {
    type Delivery = D;
    type Subscription = ToldSubscription;
    type Pin = MmPin;

    fn subscribe(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<ToldSubscription, SubscribeError> {
        let told = if self.is(When::Waits) {
            By::Mm(self.mm.subscribe(cx, range, callback)?)
        } else if self.events.how.calls {
            By::Source(self.events.callees.listen(cx, range, callback))
        } else {
            By::Nobody
        };
        Ok(ToldSubscription::new(&self.mm, &self.events, range, told))
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

    fn settle(&self) -> Result<(), Gone> {
        if self.is(When::Late) && !self.events.how.is(Fault::NoProbe) {
            MaySleep::enter(|cx| self.events.quiet_epoch(cx));
        }
        Ok(())
    }

    fn era(&self) -> Option<u64> {
        if self.is(When::InTime) { self.events.era() } else { None }
    }

    #[track_caller]
    fn count(&self, key: u64) -> Option<u64> {
        if !self.is(When::InTime) {
            return None;
        }
        if mutated(SiteKind::Retry, Location::caller()) {
            return Some(self.events.given(key));
        }
        Some(self.events.count_of(key))
    }

    fn era_ordered(&self) -> Option<u64> {
        if self.is(When::Waits) { None } else { self.events.era() }
    }
}
