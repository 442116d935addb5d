// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device that the library's own consumers drive here: pins of softmm, mapped in the drivers' device model, which has
//! its own TLB, its dirty bits and its requests in flight, and shows each access to the judge.
//!
//! Each mapping is a binding of its own in the model, and its bus addresses carry the binding's number: a consumer that uses
//! a mapping after it was taken away meets nothing, and that is a bug that is told.

use drivers::{Binding, DeviceContext, DeviceFault, DeviceOp, DriverBug, Moment, RequestId, refuse};
use interleave::explore::Ghost;
use interleave::{AtomicBool, LockClass, MaySleep, Mutex, Ordering};
use mmu_notifier::primary::{Pin, PrimaryMmu};
use mmu_notifier::{Access, PageAddr, Range};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use userptr::device::model::Model;
use userptr::device::{
    Command, Device, DeviceAddr, DeviceError, Fault, Fence, FenceError, Hold, Limits, SubmitError, WaitError,
};

static RUNNING: LockClass = LockClass::new("modelled request");

/// Where the binding is in a bus address.
const BINDING: u32 = 40;

/// Memory of the device itself, at addresses where no process has any: what commands read goes there.
pub(super) fn status() -> Range {
    PageAddr::new(0x6000_0000).map_or(Range::ALL, Range::page)
}

#[derive(Default)]
struct State {
    bindings: u32,
    /// When a use of the page was asked for that has not been submitted yet.
    asked: BTreeMap<PageAddr, Moment>,
    /// What was read, by where it went.
    read: BTreeMap<u64, u64>,
}

/// See the module.
#[derive(Clone)]
pub(super) struct Hardware {
    context: Arc<DeviceContext>,
    state: Arc<Ghost<State>>,
    /// A mapping is for the address at every access, and not since it was asked for.
    exact: bool,
}

/// Pages that the device holds.
pub(super) struct Pages<P> {
    /// `None`: the device's own.
    pin: Option<P>,
    range: Range,
    /// By the device, through a mapping that is gone.
    written: bool,
}

/// Pages that the device reaches.
pub(super) struct Mapping<P> {
    pages: Pages<P>,
    /// In the device model.
    pub(super) binding: Binding,
}

impl Hardware {
    pub(super) fn new(context: Arc<DeviceContext>, exact: bool) -> Hardware {
        Hardware { context, state: Arc::new(Ghost::new(State::default())), exact }
    }

    /// A use of `range` is asked for now.
    pub(super) fn asked(&self, range: Range) {
        let now = self.context.now();
        self.state.update(|state| state.asked.extend(range.iter_pages().map(|page| (page, now))));
    }

    /// Gives the operations to the device, through `binding`.
    pub(super) fn start(&self, cx: &mut MaySleep<'_>, binding: Binding, ops: &[DeviceOp]) -> RequestId {
        let page = ops.first().and_then(|op| PageAddr::containing(op.addr()).ok());
        let asked = self.state.read(|state| page.and_then(|page| state.asked.get(&page).copied()));
        match asked.filter(|_| !self.exact) {
            Some(since) => self.context.submit_since(cx, binding, ops, since),
            None => self.context.submit(cx, binding, ops),
        }
    }

    /// Waits for them.
    pub(super) fn finish(&self, cx: &mut MaySleep<'_>, request: RequestId) -> Result<Vec<u64>, DeviceFault> {
        let done = self.context.run(cx, request, &refuse);
        if let Err(DeviceFault::NoTranslation { .. }) = done {
            self.context.bug(DriverBug::TookMappingInUse);
        }
        done
    }

    /// What a command read to `dst`.
    pub(super) fn take_read(&self, dst: u64) -> Option<u64> {
        self.state.update(|state| state.read.remove(&dst))
    }
}

impl<M: PrimaryMmu> Device<M> for Hardware {
    type Pages = Pages<M::Pin>;
    type Mapping = Mapping<M::Pin>;
    const HOLD: Hold = Hold::Pinned;

    fn limits(&self) -> Limits {
        Limits { mappings: u32::MAX, bytes: u64::MAX }
    }

    fn get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &M,
        range: Range,
        access: Access,
    ) -> Result<Pages<M::Pin>, DeviceError> {
        let pin = if range == status() { None } else { Some(mm.pin(cx, range, access)?) };
        Ok(Pages { pin, range, written: false })
    }

    fn put_pages(&self, cx: &mut MaySleep<'_>, pages: Pages<M::Pin>, written: bool) {
        if pages.written && !written {
            self.context.bug(DriverBug::LostDirty { pages: 1 });
        }
        if let Some(pin) = pages.pin {
            pin.unpin(cx, written);
        }
    }

    fn map(
        &self,
        cx: &mut MaySleep<'_>,
        pages: Pages<M::Pin>,
        _: Option<DeviceAddr>,
    ) -> Result<Mapping<M::Pin>, (DeviceError, Pages<M::Pin>)> {
        let binding = self.state.update(|state| {
            state.bindings += 1;
            Binding(state.bindings)
        });
        if let Some(pin) = &pages.pin {
            let writable = pin.access() == Access::Write;
            for page in pages.range.iter_pages() {
                if let Some(pfn) = pin.pfn(page) {
                    let frame = self.context.mm().machine().frames().id(pfn);
                    self.context.map(cx, binding, page, frame, writable);
                }
            }
        }
        Ok(Mapping { pages, binding })
    }

    fn address(&self, mapping: &Mapping<M::Pin>) -> DeviceAddr {
        DeviceAddr((u64::from(mapping.binding.0) << BINDING) + mapping.pages.range.start())
    }

    fn wait_idle(&self, cx: &mut MaySleep<'_>, mapping: &Mapping<M::Pin>) {
        self.context.wait_idle(cx, Some(mapping.binding));
    }

    /// Does not wait for requests: whoever calls it has no use for the mapping any more, or is wrong.
    fn unmap(&self, cx: &mut MaySleep<'_>, mapping: Mapping<M::Pin>) -> Pages<M::Pin> {
        let Mapping { mut pages, binding } = mapping;
        let taken = self.context.unmap(cx, Some(binding), pages.range);
        self.context.flush(cx, Some(binding), pages.range);
        pages.written |= taken.iter().any(|(.., translation)| translation.dirty);
        pages
    }
}

/// One command in the device model.
pub(super) struct Running {
    hardware: Hardware,
    request: RequestId,
    /// Where what is read goes.
    dst: Option<u64>,
    at: DeviceAddr,
    access: Access,
    /// Of whoever was the first to wait.
    outcome: Mutex<Option<Result<(), Fault>>>,
    done: AtomicBool,
}

impl Running {
    fn carry_out(&self, cx: &mut MaySleep<'_>) -> Result<(), Fault> {
        let fault = Fault { command: 0, addr: self.at, access: self.access };
        let values = self.hardware.finish(cx, self.request).map_err(|_| fault)?;
        if let (Some(dst), Some(value)) = (self.dst, values.first().copied()) {
            self.hardware.state.update(|state| state.read.insert(dst, value));
        }
        Ok(())
    }
}

impl Fence for Running {
    /// False if nobody has waited for it.
    fn is_signaled(&self) -> bool {
        self.done.load(Ordering::SeqCst)
    }

    fn wait(&self, cx: &mut MaySleep<'_>) -> Result<(), FenceError> {
        let mut outcome = self.outcome.lock(cx);
        let result = match *outcome {
            Some(result) => result,
            None => *outcome.insert(MaySleep::enter(|cx| self.carry_out(cx))),
        };
        self.done.store(true, Ordering::SeqCst);
        Ok(result?)
    }

    /// Whoever waits carries it out: nobody is kept waiting.
    fn wait_interruptible(&self, cx: &mut MaySleep<'_>, _: Option<Duration>) -> Result<(), WaitError> {
        let _ = self.wait(cx);
        Ok(())
    }
}

impl Model for Hardware {
    type Fence = Running;

    /// One command: a word that is read, a copy to the device's own memory; or a word that is stored.
    fn submit(&self, cx: &mut MaySleep<'_>, batch: &[Command]) -> Result<Running, SubmitError> {
        let here = |at: DeviceAddr| at.0 & ((1 << BINDING) - 1);
        let (at, dst, op) = match *batch {
            [Command::Copy { src, dst, .. }] => (src, Some(here(dst)), DeviceOp::Read(here(src))),
            [Command::StoreDword { dst, value }] => (dst, None, DeviceOp::Write(here(dst), u64::from(value))),
            _ => return Err(SubmitError::Broken { source: "the model knows two commands".into() }),
        };
        let binding = Binding((at.0 >> BINDING) as u32);
        let request = self.start(cx, binding, &[op]);
        let (outcome, done) = (Mutex::new(&RUNNING, None), AtomicBool::new(false));
        Ok(Running { hardware: self.clone(), request, dst, at, access: op.access(), outcome, done })
    }
}
