// SPDX-License-Identifier: MIT OR Apache-2.0
//! A consumer of the library between the table and the models: it is bound, used and closed as any driver, and hears
//! the mm as its source would.

use drivers::{
    BindError, Binding, Callback, Callbacks, DeviceContext, DeviceFault, DeviceOp, Driver, Kind, OpenError,
    Options, Registered, RequestId, SubmitError, check_ops,
};
use interleave::explore::Ghost;
use interleave::{Atomic, MaySleep, PageContext, Sleep};
use mmu_notifier::{Access, Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};
use softmm::told::Events;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a source hears that tells in time.
pub(super) const IN_TIME: Callbacks =
    Callbacks::of(&[Callback::Start, Callback::Page, Callback::ChangePte, Callback::Release]);

/// What one hears that tells late.
pub(super) const LATE: Callbacks =
    Callbacks::of(&[Callback::Start, Callback::End, Callback::Page, Callback::ChangePte, Callback::Release]);

/// What is embedded. Dropped, it is closed.
pub(super) trait Consumer: Send + Sync + 'static {
    /// What it has of a range.
    type Bound: Send + Sync;

    /// Makes the range usable.
    fn bind(&self, range: Range, access: Access) -> Result<Self::Bound, BindError>;

    /// Takes it away.
    fn unbind(&self, range: Range, bound: &Self::Bound) -> Result<(), SubmitError>;

    /// Has the device do `ops` in `range`, and waits for it.
    fn operate(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        access: Access,
        bound: &Self::Bound,
        ops: &[DeviceOp],
    ) -> Result<Result<Vec<u64>, DeviceFault>, SubmitError>;

    /// Housekeeping, if there is any.
    fn work(&self) -> bool {
        false
    }
}

/// A consumer as a driver.
pub(super) struct Embedded<C: Consumer> {
    kind: &'static Kind,
    context: Arc<DeviceContext>,
    /// `None`: the mm calls the consumer itself.
    events: Option<Arc<Events>>,
    registered: Registered,
    state: Ghost<State<C>>,
}

/// Of whoever uses the consumer, and not of the consumer.
struct State<C: Consumer> {
    /// `None`: closed.
    consumer: Option<Arc<C>>,
    bindings: u32,
    bound: BTreeMap<Binding, Arc<Bound<C>>>,
}

struct Bound<C: Consumer> {
    range: Range,
    access: Access,
    of: C::Bound,
}

impl<C: Consumer> Embedded<C> {
    pub(super) fn open(
        cx: &mut MaySleep<'_>,
        kind: &'static Kind,
        context: Arc<DeviceContext>,
        events: Option<Arc<Events>>,
        consumer: Option<C>,
        options: Options,
    ) -> Result<Arc<Embedded<C>>, OpenError> {
        let heard = events.is_some();
        let state = State { consumer: consumer.map(Arc::new), bindings: 0, bound: BTreeMap::new() };
        let (registered, state) = (Registered::not_yet(), Ghost::new(state));
        let driver = Arc::new(Embedded { kind, context, events, registered, state });
        if heard {
            driver.registered.register(cx, &driver, options)?;
        }
        Ok(driver)
    }

    fn consumer(&self) -> Option<Arc<C>> {
        self.state.read(|state| state.consumer.clone())
    }

    /// Passes a callback on; whether it concerned anybody is counted.
    fn hears(&self, callback: Callback, tell: impl FnOnce(&Events) -> bool) {
        if self.events.as_deref().is_some_and(tell) {
            self.context.effect(callback);
        }
    }
}

impl<C: Consumer> Driver for Embedded<C> {
    fn kind(&self) -> &'static Kind {
        self.kind
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, _: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        let consumer = self.consumer().ok_or(BindError::Exited(range))?;
        let bound = Arc::new(Bound { range, access, of: consumer.bind(range, access)? });
        Ok(self.state.update(|state| {
            state.bindings += 1;
            state.bound.insert(Binding(state.bindings), bound);
            Binding(state.bindings)
        }))
    }

    fn unbind(&self, _: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        let bound = self.state.update(|state| state.bound.remove(&binding));
        let (bound, consumer) = bound.zip(self.consumer()).ok_or(SubmitError::NotBound(binding))?;
        consumer.unbind(bound.range, &bound.of)
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let bound = self.state.read(|state| state.bound.get(&binding).cloned());
        let (bound, consumer) = bound.zip(self.consumer()).ok_or(SubmitError::NotBound(binding))?;
        check_ops(self.context.mm(), bound.range, bound.access, ops)?;
        let done = consumer.operate(cx, bound.range, bound.access, &bound.of, ops)?;
        Ok(self.context.done(cx, binding, done))
    }

    fn run_work(&self, cx: &mut MaySleep<'_>) -> bool {
        self.events.as_ref().is_some_and(|events| events.deliver(cx))
            || self.consumer().is_some_and(|consumer| consumer.work())
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        let (bound, consumer) =
            self.state.update(|state| (std::mem::take(&mut state.bound), state.consumer.take()));
        drop(bound);
        drop(consumer);
        self.registered.unregister(cx);
        self.context.forget_requests(cx);
    }
}

impl<C: Consumer> Drop for Embedded<C> {
    /// An execution that a broken rule ends leaves its threads where they are: nobody may wait for one.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.state.update(|state| {
                std::mem::forget(std::mem::take(&mut state.bound));
                std::mem::forget(state.consumer.take());
            });
        }
    }
}

impl<C: Consumer> MmuNotifier for Embedded<C> {
    fn ops(&self) -> Ops {
        let heard = Ops::START | Ops::PAGE | Ops::CHANGE_PTE | Ops::RELEASE;
        if self.events.as_ref().is_some_and(|events| events.is_late()) { heard | Ops::END } else { heard }
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        self.hears(Callback::Start, |events| events.started(cx, inv.range));
        Ok(())
    }

    fn invalidate_range_end(&self, cx: Sleep<'_, '_>, inv: &Invalidation) {
        self.hears(Callback::End, |events| events.ended(cx, inv.range));
    }

    fn invalidate_page(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        self.hears(Callback::Page, |events| events.told(&mut cx, Range::page(page)));
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, _: Pte) {
        self.hears(Callback::ChangePte, |events| events.told(cx, Range::page(page)));
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.hears(Callback::Release, |events| events.released(cx));
    }
}
