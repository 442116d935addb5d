// SPDX-License-Identifier: MIT OR Apache-2.0
//! What stands between the mm and a driver: it leaves out the callbacks that are switched off and counts the others.
//!
//! It holds the driver weakly: a driver that is dropped unclosed goes deaf instead of living for ever.

use crate::callbacks::Callback;
use crate::counters::Counters;
use crate::driver::{Driver, Options};
use interleave::{Atomic, LockClass, MaySleep, PageContext, Sleep, SpinLock, time};
use mmu_notifier::{
    Invalidate, Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, RegisterError, Registration, SeqMoved,
    SetSeq, WouldBlock,
};
use std::sync::{Arc, Weak};

/// Between the mm and a list notifier.
pub(crate) struct Listener<D> {
    driver: Weak<D>,
    ops: Ops,
    measure: bool,
}

static REGISTRATION: LockClass = LockClass::new("driver registration");

/// The place of a driver's registration, filled once after the driver has an address.
pub struct Registered(SpinLock<Option<Registration>>);

impl Registered {
    /// Empty.
    pub fn not_yet() -> Registered {
        Registered(SpinLock::new(&REGISTRATION, None))
    }

    /// mmu_notifier_register, with the callbacks that `options` leaves of those that the driver has.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn register<D: MmuNotifier + Driver + 'static>(
        &self,
        cx: &mut MaySleep<'_>,
        driver: &Arc<D>,
        options: Options,
    ) -> Result<(), RegisterError> {
        let ops = options.callbacks.mask(driver.ops());
        let listener = Listener { driver: Arc::downgrade(driver), ops, measure: options.measure };
        let registration = driver.context().mm().notifiers().register(cx, Arc::new(listener))?;
        *self.0.lock(cx) = Some(registration);
        Ok(())
    }

    /// mmu_notifier_unregister. Not from a callback, nor with a lock that a callback takes.
    pub fn unregister(&self, cx: &mut MaySleep<'_>) {
        let registration = self.0.lock(cx).take();
        if let Some(registration) = registration {
            // Refused in a callback of the driver alone; dropping it, which does not wait, is all that is left then.
            let _ = registration.unregister(cx);
        }
    }
}

impl<D: MmuNotifier + Driver> Listener<D> {
    fn call<R: Default>(&self, kind: Callback, f: impl FnOnce(&D) -> R) -> R {
        let Some(driver) = self.driver.upgrade() else { return R::default() };
        counted(driver.context().counters(), kind, self.measure, || f(&driver))
    }
}

fn counted<R>(counters: &Counters, kind: Callback, measure: bool, f: impl FnOnce() -> R) -> R {
    counters.called(kind);
    if !measure {
        return f();
    }
    let start = time::now();
    let result = f();
    counters.took(kind, start.elapsed());
    result
}

impl<D: MmuNotifier + Driver> MmuNotifier for Listener<D> {
    fn ops(&self) -> Ops {
        self.ops
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let Some(driver) = self.driver.upgrade() else { return Ok(()) };
        let counters = driver.context().counters();
        let start = || driver.invalidate_range_start(cx, inv);
        counted(counters, Callback::Start, self.measure, start).inspect_err(|_| counters.refused(1))
    }

    fn invalidate_range_end(&self, cx: Sleep<'_, '_>, inv: &Invalidation) {
        self.call(Callback::End, |driver| driver.invalidate_range_end(cx, inv));
    }

    fn invalidate_page(&self, cx: PageContext<'_, '_>, page: PageAddr) {
        self.call(Callback::Page, |driver| driver.invalidate_page(cx, page));
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, pte: Pte) {
        self.call(Callback::ChangePte, |driver| driver.change_pte(cx, page, pte));
    }

    fn arch_invalidate_secondary_tlbs(&self, cx: &mut Atomic<'_>, range: Range) {
        self.call(Callback::SecondaryTlbs, |driver| driver.arch_invalidate_secondary_tlbs(cx, range));
    }

    fn clear_flush_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.call(Callback::ClearFlushYoung, |driver| driver.clear_flush_young(cx, range))
    }

    fn clear_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.call(Callback::ClearYoung, |driver| driver.clear_young(cx, range))
    }

    fn test_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.call(Callback::TestYoung, |driver| driver.test_young(cx, range))
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.call(Callback::Release, |driver| driver.release(cx));
    }
}

/// A driver that has one interval notifier for each binding.
pub(crate) trait IntervalDriver: Driver {
    /// What hangs on one notifier.
    type Object: Send + Sync;

    /// `mmu_interval_notifier_ops.invalidate` for `object`.
    fn invalidate(
        &self,
        object: &Self::Object,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock>;
}

/// Between the mm and an interval notifier.
pub(crate) struct IntervalListener<D: IntervalDriver> {
    driver: Weak<D>,
    object: Arc<D::Object>,
    on: bool,
    measure: bool,
}

impl<D: IntervalDriver> IntervalListener<D> {
    pub(crate) fn new(driver: Weak<D>, object: Arc<D::Object>, options: Options) -> Arc<IntervalListener<D>> {
        let on = options.callbacks.contains(Callback::Invalidate);
        Arc::new(IntervalListener { driver, object, on, measure: options.measure })
    }
}

impl<D: IntervalDriver> Invalidate for IntervalListener<D> {
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        // Switched off, it is as if there were no notifier: the sequence stands still too.
        let Some(driver) = self.driver.upgrade().filter(|_| self.on) else {
            return Ok(seq.skip_against_the_rules());
        };
        counted(driver.context().counters(), Callback::Invalidate, self.measure, || {
            driver.invalidate(&self.object, cx, inv, seq)
        })
    }
}
