// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work in flight: requests that a driver has given to its device and that the device carries out when it likes.
//!
//! A request is queued by the driver, under whatever locks make it valid, and runs without any of them. It runs in whichever
//! thread calls [`DeviceContext::run`] for it; whoever waits for the device to be idle runs what nobody has begun yet, as
//! hardware makes progress by itself. So a request runs at any moment between its submission and the end of the
//! wait, and no wait hangs because nobody plays the hardware.
//!
//! State of a request: queued -> running -> done, then its result is taken once. Protected by the engine's spin lock; a change to done wakes
//! `progress`.

use crate::device::DeviceContext;
use crate::observer::{Follows, Moment};
use crate::op::{Binding, DeviceFault, DeviceOp};
use interleave::explore::{SiteKind, mutated};
use interleave::{Context, MaySleep};
use mmu_notifier::{Access, PageAddr, Range};
use std::collections::BTreeMap;
use std::panic::Location;

/// Faults on one access after which the device gives up.
const MAX_FAULTS: u32 = 64;

/// Names a request within its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// Protected by `Device::engine`.
#[derive(Default)]
pub(crate) struct Engine {
    contexts: u32,
    next: u64,
    requests: BTreeMap<RequestId, Request>,
}

struct Request {
    context: u32,
    binding: Binding,
    follows: Follows,
    state: State,
}

enum State {
    Queued(Vec<DeviceOp>),
    Running,
    Done(Result<Vec<u64>, DeviceFault>),
}

/// How the driver answers a fault of its device: `Ok` lets the device try again.
pub type Resolve<'a> = dyn Fn(&mut MaySleep<'_>, Binding, PageAddr, Access) -> Result<(), DeviceFault> + 'a;

/// For devices that cannot fault.
pub fn refuse(_: &mut MaySleep<'_>, _: Binding, page: PageAddr, access: Access) -> Result<(), DeviceFault> {
    Err(DeviceFault::NoTranslation { page, access })
}

impl Engine {
    pub(crate) fn new_context(&mut self) -> u32 {
        self.contexts += 1;
        self.contexts
    }
}

impl DeviceContext {
    /// Gives work to the device. Any context.
    pub fn submit(&self, cx: &mut impl Context, binding: Binding, ops: &[DeviceOp]) -> RequestId {
        self.queue(cx, binding, self.follows(), State::Queued(ops.to_vec()))
    }

    /// As [`submit`](Self::submit), through a mapping that was asked for at a moment and is for this use.
    pub fn submit_since(
        &self,
        cx: &mut impl Context,
        binding: Binding,
        ops: &[DeviceOp],
        since: Moment,
    ) -> RequestId {
        self.queue(cx, binding, Follows::PagesSince(since), State::Queued(ops.to_vec()))
    }

    /// The result of a request that a driver has waited for already, for [`run`](Self::run) to take.
    pub fn done(
        &self,
        cx: &mut impl Context,
        binding: Binding,
        result: Result<Vec<u64>, DeviceFault>,
    ) -> RequestId {
        self.queue(cx, binding, self.follows(), State::Done(result))
    }

    fn queue(&self, cx: &mut impl Context, binding: Binding, follows: Follows, state: State) -> RequestId {
        let mut engine = self.device().engine.lock(cx);
        engine.next += 1;
        let id = RequestId(engine.next);
        let request = Request { context: self.id(), binding, follows, state };
        engine.requests.insert(id, request);
        id
    }

    /// Is the hardware: carries the request out, or waits for who does, and takes its result.
    pub fn run(
        &self,
        cx: &mut MaySleep<'_>,
        id: RequestId,
        resolve: &Resolve<'_>,
    ) -> Result<Vec<u64>, DeviceFault> {
        self.carry_out(cx, id, resolve);
        let device = self.device();
        device.progress.wait_event_with(cx, |cx| {
            let engine = device.engine.lock(cx);
            !matches!(engine.requests.get(&id), Some(Request { state: State::Running, .. }))
        });
        let request = device.engine.lock(cx).requests.remove(&id);
        match request.map(|request| request.state) {
            Some(State::Done(result)) => result,
            _ => Err(DeviceFault::NoRequest(id.0)),
        }
    }

    /// Waits until no request of this context, on `binding` or at all, is queued or running.
    #[track_caller]
    pub fn wait_idle(&self, cx: &mut MaySleep<'_>, binding: Option<Binding>) {
        if mutated(SiteKind::Wait, Location::caller()) {
            return;
        }
        let device = self.device();
        let ours = |request: &Request| {
            request.context == self.id() && binding.is_none_or(|wanted| wanted == request.binding)
        };
        loop {
            let engine = device.engine.lock(cx);
            let queued = |request: &Request| ours(request) && matches!(request.state, State::Queued(_));
            let next = engine.requests.iter().find(|(_, request)| queued(request)).map(|(&id, _)| id);
            drop(engine);
            if let Some(id) = next {
                self.carry_out(cx, id, &refuse);
                continue;
            }
            device.progress.wait_event_with(cx, |cx| {
                let engine = device.engine.lock(cx);
                !engine.requests.values().any(|r| ours(r) && matches!(r.state, State::Running))
            });
            let engine = device.engine.lock(cx);
            if !engine.requests.values().any(|r| ours(r) && !matches!(r.state, State::Done(_))) {
                return;
            }
        }
    }

    /// Runs one request that nobody has begun, if there is one: for a thread that plays the hardware.
    pub(crate) fn run_any(&self, cx: &mut MaySleep<'_>, resolve: &Resolve<'_>) -> bool {
        let engine = self.device().engine.lock(cx);
        let queued = |r: &Request| r.context == self.id() && matches!(r.state, State::Queued(_));
        let next = engine.requests.iter().find(|(_, request)| queued(request)).map(|(&id, _)| id);
        drop(engine);
        next.is_some_and(|id| self.carry_out(cx, id, resolve))
    }

    /// Carries the request out unless somebody has begun.
    fn carry_out(&self, cx: &mut MaySleep<'_>, id: RequestId, resolve: &Resolve<'_>) -> bool {
        let device = self.device();
        let mut engine = device.engine.lock(cx);
        let Some(request) = engine.requests.get_mut(&id).filter(|r| r.context == self.id()) else {
            return false;
        };
        let State::Queued(ops) = &mut request.state else { return false };
        let (binding, follows, ops) = (request.binding, request.follows, std::mem::take(ops));
        request.state = State::Running;
        drop(engine);
        if self.flushes_at_start {
            self.flush(cx, None, Range::ALL);
        }
        let result = ops.into_iter().map(|op| self.one(cx, (binding, follows), op, resolve)).collect();
        if let Some(request) = device.engine.lock(cx).requests.get_mut(&id) {
            request.state = State::Done(result);
        }
        device.progress.wake_all();
        true
    }

    fn one(
        &self,
        cx: &mut MaySleep<'_>,
        (binding, follows): (Binding, Follows),
        op: DeviceOp,
        resolve: &Resolve<'_>,
    ) -> Result<u64, DeviceFault> {
        for _ in 0..MAX_FAULTS {
            match self.access(cx, binding, op, follows) {
                Err(DeviceFault::NoTranslation { page, access }) => resolve(cx, binding, page, access)?,
                result => return result,
            }
        }
        let page = PageAddr::containing(op.addr()).unwrap_or(Range::ALL.last_page());
        Err(DeviceFault::GaveUp { page, faults: MAX_FAULTS })
    }

    /// Forgets the requests of this context, done or not.
    pub fn forget_requests(&self, cx: &mut impl Context) {
        self.device().engine.lock(cx).requests.retain(|_, request| request.context != self.id());
    }
}
