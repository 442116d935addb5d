// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM, x86, as of Linux 6.13 to 6.18: nothing is pinned, a range and a sequence keep a fault in flight from installing
//! an old page.
//!
//! Memslot (`bind`): wait until no invalidation is active (`mn_active_invalidate_count`), then publish the slot.
//!
//! invalidate_range_start: mn_active_invalidate_count++. If a slot overlaps, under mmu_lock: in_progress++, the range in
//! progress grows to cover this one; drop the sptes; flush the TLB of all vcpus.
//! invalidate_range_end: if a slot overlaps, under mmu_lock: **seq++**, then in_progress--. Then
//! mn_active_invalidate_count--; the last one wakes who wants to change slots.
//!
//! Fault of a vcpu (`device_fault`):
//! 1. seq = the sequence.
//! 2. get_user_pages with a reference; for a read fault, again for writing if that costs no fault. May sleep, no lock held.
//! 3. mmu_lock. An invalidation in progress that covers the page, or seq has moved: drop the reference, start again.
//! 4. Write the spte; unlock; drop the reference (for a writable page, dirty).
//!
//! clear_flush_young: clear the accessed bits, flush; clear_young and test_young: the same without flush, and looking only.
//! release: drop everything. There is no change_pte (removed in 6.10).
//!
//! S and E must come in pairs over an unchanged set of slots, which is what mn_active_invalidate_count is for.
//!
//! Lock order: mmap_lock > mmu_notifier_invalidate_range_start > mmu_lock > device TLB; mn_invalidate_lock > mmu_lock. mmu_lock is a
//! spin lock: no callback sleeps, so a non-blockable range needs nothing special.
//!
//! Not modelled: slots_lock (a change of slots is one section here, and any number may wait for it);
//! gfn_to_pfn caches; more than one address space; huge sptes; yielding mmu_lock; the early, lockless look at
//! the range in progress before step 2, which saves work and decides nothing.

use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{
    BindError, Driver, Holds, Kind, OpenError, Options, SubmitError, in_process, submit_checked,
};
use crate::engine::RequestId;
use crate::kvm::{self, Slot, Slots};
use crate::listener::Registered;
use crate::op::{Binding, DeviceFault, DeviceOp};
use crate::site::{bump, changed, unbump};
use interleave::{Atomic, Context, LockClass, MaySleep, Sleep, SpinLock, WaitQueue};
use mmu_notifier::{Access, Invalidation, MmuNotifier, Ops, PageAddr, Range, WouldBlock};
use softmm::Mm;
use std::sync::Arc;

static MMU_LOCK: LockClass = LockClass::new("kvm mmu_lock");
static MN_INVALIDATE_LOCK: LockClass = LockClass::new("kvm mn_invalidate_lock");

/// What it is.
pub static KIND: Kind = Kind {
    name: "kvm-6.18",
    kernel: "6.13",
    summary: "pins nothing; range in progress and sequence",
    holds: Holds::Nothing,
    callbacks: Callbacks::of(&[
        Callback::Start,
        Callback::End,
        Callback::ClearFlushYoung,
        Callback::ClearYoung,
        Callback::TestYoung,
        Callback::Release,
    ]),
    reads: true,
    open: |cx, mm, device, options| Ok(Kvm::open(cx, mm, device, options)?),
};

/// See the module.
pub struct Kvm {
    options: Options,
    context: DeviceContext,
    mmu_lock: SpinLock<Mmu>,
    /// mn_active_invalidate_count.
    active: SpinLock<u64>,
    no_active: WaitQueue,
    registered: Registered,
}

/// Protected by mmu_lock.
#[derive(Default)]
struct Mmu {
    slots: Slots,
    in_progress: u64,
    range: Option<Range>,
    seq: u64,
}

impl Mmu {
    fn overlaps(&self, range: Range) -> bool {
        self.slots.values().any(|slot| slot.range.overlaps(range))
    }

    /// kvm_mmu_invalidate_begin and _range_add.
    fn begin(&mut self, range: Range) {
        bump(&mut self.in_progress);
        self.range = Some(match self.range.filter(|_| self.in_progress > 1) {
            None => range,
            Some(old) => {
                let start = old.start().min(range.start());
                Range::new(start, old.end().max(range.end()) - start).unwrap_or(Range::ALL)
            }
        });
    }

    /// kvm_mmu_invalidate_end.
    fn end(&mut self) {
        bump(&mut self.seq);
        unbump(&mut self.in_progress);
    }

    /// mmu_invalidate_retry_gfn.
    fn retry(&self, seq: u64, page: PageAddr) -> bool {
        let covered = self.range.is_some_and(|range| range.contains_addr(page.get()));
        (self.in_progress > 0 && covered) || self.seq != seq
    }
}

impl Kvm {
    /// A VM without memory; registers with `mm`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        cx: &mut MaySleep<'_>,
        mm: &Arc<Mm>,
        device: &Arc<Device>,
        options: Options,
    ) -> Result<Arc<Kvm>, OpenError> {
        let kvm = Arc::new(Kvm {
            options,
            context: DeviceContext::open(cx, device, mm, KIND.name, Root::Own),
            mmu_lock: SpinLock::new(&MMU_LOCK, Mmu::default()),
            active: SpinLock::new(&MN_INVALIDATE_LOCK, 0),
            no_active: WaitQueue::new(&MN_INVALIDATE_LOCK),
            registered: Registered::not_yet(),
        });
        kvm.registered.register(cx, &kvm, options)?;
        Ok(kvm)
    }

    /// Drops sptes and flushes; under mmu_lock. Whether there were any.
    fn zap(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        let zapped = self.context.unmap(cx, None, range);
        if !zapped.is_empty() {
            self.context.flush(cx, None, range);
        }
        !zapped.is_empty()
    }

    /// kvm_swap_active_memslots: `change` while no invalidation is active.
    fn change_slots<R>(&self, cx: &mut MaySleep<'_>, change: impl FnOnce(&mut Mmu) -> R) -> R {
        loop {
            self.no_active.wait_event_with(cx, |cx| *self.active.lock(cx) == 0);
            let mut active = self.active.lock(cx);
            let (active, cx) = active.split();
            if *active == 0 {
                return change(&mut self.mmu_lock.lock(cx));
            }
        }
    }

    fn age(&self, cx: &mut Atomic<'_>, range: Range, kind: Callback) -> bool {
        let mut mmu = self.mmu_lock.lock(cx);
        let (_, cx) = mmu.split();
        kvm::age(cx, &self.context, range, kind)
    }

    fn delete_slot(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Option<Slot> {
        let slot = self.change_slots(cx, |mmu| mmu.slots.remove(&binding))?;
        let mut mmu = self.mmu_lock.lock(cx);
        let (_, cx) = mmu.split();
        self.context.unmap(cx, Some(binding), slot.range);
        self.context.flush(cx, Some(binding), slot.range);
        Some(slot)
    }

    fn slot(&self, cx: &mut impl Context, binding: Binding) -> Option<Slot> {
        self.mmu_lock.lock(cx).slots.get(&binding).copied()
    }

    /// kvm_tdp_page_fault.
    fn fault(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        page: PageAddr,
        access: Access,
    ) -> Result<(), DeviceFault> {
        let missing = DeviceFault::NoTranslation { page, access };
        let slot =
            self.slot(cx, binding).filter(|slot| slot.range.contains_addr(page.get())).ok_or(missing)?;
        let seq = self.mmu_lock.lock(cx).seq;
        let got = kvm::gup(cx, self.context.mm(), self.options.cpu, page, access, slot.access)?;
        let mut mmu = self.mmu_lock.lock(cx);
        let (mmu, cx) = mmu.split();
        if !mmu.slots.contains_key(&binding) {
            return Err(missing);
        }
        if changed(mmu.retry(seq, page)) {
            self.context.counters().retried(1);
            return Ok(());
        }
        got.map(cx, &self.context, binding, page);
        Ok(())
    }
}

impl MmuNotifier for Kvm {
    fn ops(&self) -> Ops {
        Ops::START | Ops::END | Ops::CLEAR_FLUSH_YOUNG | Ops::CLEAR_YOUNG | Ops::TEST_YOUNG | Ops::RELEASE
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        bump(&mut self.active.lock(&mut cx));
        let mut mmu = self.mmu_lock.lock(&mut cx);
        let (mmu, cx) = mmu.split();
        if mmu.overlaps(inv.range) {
            mmu.begin(inv.range);
            if self.zap(cx, inv.range) {
                self.context.effect(Callback::Start);
            }
        }
        Ok(())
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) {
        let mut mmu = self.mmu_lock.lock(&mut cx);
        if mmu.overlaps(inv.range) {
            mmu.end();
            self.context.effect(Callback::End);
        }
        drop(mmu);
        let mut active = self.active.lock(&mut cx);
        unbump(&mut active);
        let last = *active == 0;
        drop(active);
        if last {
            self.no_active.wake_all();
        }
    }

    fn clear_flush_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.age(cx, range, Callback::ClearFlushYoung)
    }

    fn clear_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.age(cx, range, Callback::ClearYoung)
    }

    fn test_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.age(cx, range, Callback::TestYoung)
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        let mut mmu = self.mmu_lock.lock(cx);
        let (_, cx) = mmu.split();
        if self.zap(cx, Range::ALL) {
            self.context.effect(Callback::Release);
        }
    }
}

impl Driver for Kvm {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        Ok(self.change_slots(cx, |mmu| mmu.slots.add(Slot { range, access })))
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        self.delete_slot(cx, binding).map(drop).ok_or(SubmitError::NotBound(binding))
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let slot = self.slot(cx, binding).ok_or(SubmitError::NotBound(binding))?;
        submit_checked(cx, &self.context, binding, slot.range, slot.access, ops)
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
        let slots: Vec<_> = self.mmu_lock.lock(cx).slots.keys().copied().collect();
        for binding in slots {
            self.delete_slot(cx, binding);
        }
        self.registered.unregister(cx);
        self.context.forget_requests(cx);
    }
}
