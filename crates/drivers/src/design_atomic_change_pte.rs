// SPDX-License-Identifier: MIT OR Apache-2.0
//! Design 4: unmap atomically, in change_pte too. It asks of the device what KVM asks of a CPU: that its page table may change
//! under it, that a TLB flush is synchronous, and that it faults and goes on.
//!
//! Pages are pinned one by one, when the device faults. Everything is under one spin lock:
//! 1. invalidate_range_start: count++; unmap the range; flush; drop its pins.
//! 2. invalidate_range_end: **seq++**, count--.
//! 3. change_pte: **seq++**; unmap the page; flush; drop its pin. The CPU's entry is cleared and its successor not yet stored: nobody can
//!    see the new page while the device uses the old one.
//! 4. Fault: seq; get_user_pages; spin lock; count != 0 or seq has moved: again; map the page, keep the pin.
//! 5. release: everything.
//!
//! With the pair around change_pte, 3 finds nothing to do. Without the pair it is all that is needed at the four call sites, and
//! neither waits for the device nor for a lock that sleeps.
//!
//! Lock order: ptl > design spin lock > device TLB.

use crate::bindings::Bindings;
use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{
    BindError, Driver, Holds, Kind, OpenError, Options, SubmitError, in_process, submit_checked,
};
use crate::engine::RequestId;
use crate::listener::Registered;
use crate::op::{Binding, DeviceFault, DeviceOp};
use crate::site::{bump, changed, unbump};
use interleave::{Atomic, Context, LockClass, MaySleep, Sleep, SpinLock};
use mmu_notifier::{Access, Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};
use softmm::{Foll, Mm, UserPages};
use std::collections::BTreeMap;
use std::sync::Arc;

static LOCK: LockClass = LockClass::new("design spin lock");

/// What it is.
pub static KIND: Kind = Kind {
    name: "design-atomic-change-pte",
    kernel: "design",
    summary: "unmaps under a spin lock, in change_pte too",
    holds: Holds::Pages,
    callbacks: Callbacks::of(&[Callback::Start, Callback::End, Callback::ChangePte, Callback::Release]),
    reads: true,
    open: |cx, mm, device, options| Ok(AtomicChangePte::open(cx, mm, device, options)?),
};

/// See the module.
pub struct AtomicChangePte {
    options: Options,
    context: DeviceContext,
    state: SpinLock<State>,
    registered: Registered,
}

#[derive(Default)]
struct State {
    bound: Bindings<(Range, Access)>,
    pins: BTreeMap<(Binding, PageAddr), Pinned>,
    count: u64,
    seq: u64,
    /// Faults between reading the sequence and looking at it again.
    faults: u64,
    released: bool,
}

struct Pinned {
    page: UserPages,
    writable: bool,
}

impl AtomicChangePte {
    /// Registers with `mm`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        cx: &mut MaySleep<'_>,
        mm: &Arc<Mm>,
        device: &Arc<Device>,
        options: Options,
    ) -> Result<Arc<AtomicChangePte>, OpenError> {
        let driver = Arc::new(AtomicChangePte {
            options,
            context: DeviceContext::open(cx, device, mm, KIND.name, Root::Own),
            state: SpinLock::new(&LOCK, State::default()),
            registered: Registered::not_yet(),
        });
        driver.registered.register(cx, &driver, options)?;
        Ok(driver)
    }

    /// Unmaps, flushes, unpins; under the lock. Whether there was anything.
    fn zap(&self, cx: &mut Atomic<'_>, state: &mut State, binding: Option<Binding>, range: Range) -> bool {
        let taken = self.context.unmap(cx, binding, range);
        if !taken.is_empty() {
            self.context.flush(cx, binding, range);
        }
        for (binding, page, entry) in &taken {
            if let Some(pinned) = state.pins.remove(&(*binding, *page))
                && entry.dirty
            {
                pinned.page.set_dirty();
            }
        }
        !taken.is_empty()
    }

    fn bound(&self, cx: &mut impl Context, binding: Binding) -> Result<(Range, Access), SubmitError> {
        let state = self.state.lock(cx);
        if state.released {
            return Err(SubmitError::Exited);
        }
        state.bound.get(&binding).copied().ok_or(SubmitError::NotBound(binding))
    }

    fn fault(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        page: PageAddr,
        access: Access,
    ) -> Result<(), DeviceFault> {
        let missing = DeviceFault::NoTranslation { page, access };
        self.bound(cx, binding).map_err(|_| missing)?;
        let seq = {
            let mut state = self.state.lock(cx);
            state.faults += 1;
            state.seq
        };
        let mm = self.context.mm();
        let cpu = &mm.machine().cpus()[self.options.cpu % mm.machine().cpus().len()];
        let foll = if access == Access::Write { Foll::GET.write() } else { Foll::GET };
        let got = mm.get_user_pages_fast(cx, cpu, Range::page(page), foll);
        let mut state = self.state.lock(cx);
        let (state, cx) = state.split();
        state.faults -= 1;
        let got = got.map_err(|source| DeviceFault::Refused { page, source })?;
        if state.released || !state.bound.contains_key(&binding) {
            return Err(missing);
        }
        if changed(state.count > 0 || state.seq != seq) {
            self.context.counters().retried(1);
            return Ok(());
        }
        let writable = access == Access::Write;
        if state.pins.get(&(binding, page)).is_some_and(|pinned| pinned.writable) {
            return Ok(()); // Another fault was faster, and got at least as much.
        }
        if let Some(frame) = got.frames().next() {
            // No flush: a TLB entry of this page that allows less walks again, and one of another page went with its pin.
            self.context.map(cx, binding, page, frame, writable);
        }
        state.pins.insert((binding, page), Pinned { page: got, writable });
        Ok(())
    }
}

impl MmuNotifier for AtomicChangePte {
    fn ops(&self) -> Ops {
        Ops::START | Ops::END | Ops::CHANGE_PTE | Ops::RELEASE
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let mut state = self.state.lock(&mut cx);
        let (state, cx) = state.split();
        bump(&mut state.count);
        if self.zap(cx, state, None, inv.range) || state.faults > 0 {
            self.context.effect(Callback::Start);
        }
        Ok(())
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) {
        let mut state = self.state.lock(&mut cx);
        bump(&mut state.seq);
        unbump(&mut state.count);
        if state.faults > 0 {
            self.context.effect(Callback::End);
        }
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, _: Pte) {
        let mut state = self.state.lock(cx);
        let (state, cx) = state.split();
        bump(&mut state.seq);
        if self.zap(cx, state, None, Range::page(page)) || state.faults > 0 {
            self.context.effect(Callback::ChangePte);
        }
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        let mut state = self.state.lock(cx);
        let (state, cx) = state.split();
        state.released = true;
        if self.zap(cx, state, None, Range::ALL) {
            self.context.effect(Callback::Release);
        }
    }
}

impl Driver for AtomicChangePte {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        let mut state = self.state.lock(cx);
        if state.released {
            return Err(BindError::Exited(range));
        }
        Ok(state.bound.add((range, access)))
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        let mut state = self.state.lock(cx);
        let (state, cx) = state.split();
        let (range, _) = state.bound.remove(&binding).ok_or(SubmitError::NotBound(binding))?;
        self.zap(cx, state, Some(binding), range);
        Ok(())
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let (range, access) = self.bound(cx, binding)?;
        submit_checked(cx, &self.context, binding, range, access, ops)
    }

    fn device_fault(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        page: PageAddr,
        access: Access,
    ) -> Result<(), DeviceFault> {
        let missing = DeviceFault::NoTranslation { page, access };
        let fault = |cx: &mut MaySleep<'_>| self.fault(cx, binding, page, access);
        in_process(cx, self.context.mm(), fault).unwrap_or(Err(missing))
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        {
            let mut state = self.state.lock(cx);
            let (state, cx) = state.split();
            state.bound.clear();
            self.zap(cx, state, None, Range::ALL);
        }
        self.registered.unregister(cx);
        self.context.forget_requests(cx);
    }
}
