// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM, x86, as of Linux 3.16, whose change_pte moves the guest along with the CPU; and what became of it by 5.13.
//!
//! Nothing is pinned. All of it under mmu_lock, a spin lock:
//! 1. invalidate_range_start: count++; drop the sptes of the range; flush the TLB of all vcpus.
//! 2. invalidate_range_end: **seq++**; then count--.
//! 3. invalidate_page: seq++; drop the spte; flush.
//! 4. change_pte: seq++; is the page mapped? The new pte is writable: drop the spte. Else the spte now leads to the new page, for reading.
//!    Flush.
//! 5. clear_flush_young: was the accessed bit set? Clear it. test_young: look.
//! 6. release: drop everything, flush.
//!
//! Fault of a vcpu: seq; get_user_pages with a reference, for writing too if that costs nothing; mmu_lock; count != 0 or seq has moved:
//! start again; write the spte; unlock; drop the reference.
//!
//! With the pair around change_pte (October 2012 to 6.9) its spte is always gone already: 4 is dead code (bug 17). Without the
//! pair it is all there is, and correct: it comes before the CPU's new pte, and seq stops a fault in flight.
//! In 5.13 it was changed to rely on the pair ([`ChangePte`]): it no longer moves seq, and does nothing outside of one. Without the pair
//! that is a use after free (bug 19).
//!
//! Lock order: mmap_lock > mmu_notifier_invalidate_range_start > mmu_lock > device TLB, and ptl > mmu_lock. slots_lock above all of KVM's.
//!
//! Not modelled: SRCU around the memslots; sptes without accessed bit; large sptes; async page faults.

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
use interleave::{Atomic, Context, LockClass, MaySleep, PageContext, Sleep, SpinLock};
use mmu_notifier::{Access, Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};
use softmm::Mm;
use std::sync::Arc;

static MMU_LOCK: LockClass = LockClass::new("kvm mmu_lock");

/// What it is.
pub static KIND: Kind = Kind {
    name: "kvm-3.16",
    kernel: "3.16",
    summary: "pins nothing; count, sequence and change_pte",
    holds: Holds::Nothing,
    callbacks: Callbacks::of(&[
        Callback::Start,
        Callback::End,
        Callback::Page,
        Callback::ChangePte,
        Callback::ClearFlushYoung,
        Callback::TestYoung,
        Callback::Release,
    ]),
    reads: true,
    open: |cx, mm, device, options| Ok(Kvm::open(cx, mm, device, options, &KIND, ChangePte::Bumps)?),
};

/// As of 5.13 to 6.9.
pub static KIND_5_13: Kind = Kind {
    name: "kvm-5.13",
    kernel: "5.13",
    summary: "as kvm-3.16; change_pte works inside a pair only",
    open: |cx, mm, device, options| {
        Ok(Kvm::open(cx, mm, device, options, &KIND_5_13, ChangePte::InsidePair)?)
    },
    ..KIND
};

/// Bug 19 alone: change_pte does its work and forgets the fault in flight.
pub static NO_BUMP: Kind = Kind {
    name: "kvm-no-bump",
    kernel: "none",
    summary: "as kvm-3.16; change_pte does not move the sequence",
    open: |cx, mm, device, options| Ok(Kvm::open(cx, mm, device, options, &NO_BUMP, ChangePte::NoBump)?),
    ..KIND
};

/// A fault installs what it got, whatever happened meanwhile.
pub static NO_RETRY: Kind = Kind {
    name: "kvm-no-retry",
    kernel: "none",
    summary: "as kvm-3.16; faults do not look at count and sequence again",
    open: |cx, mm, device, options| Ok(Kvm::open(cx, mm, device, options, &NO_RETRY, ChangePte::NoBump)?),
    ..KIND
};

/// What change_pte does about a fault in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangePte {
    /// Moves the sequence (until 5.12).
    Bumps,
    /// Does not.
    NoBump,
    /// Does not, and does nothing at all while no start is without its end (5.13 to 6.9).
    InsidePair,
}

/// See the module.
pub struct Kvm {
    kind: &'static Kind,
    change_pte: ChangePte,
    options: Options,
    context: DeviceContext,
    mmu_lock: SpinLock<Mmu>,
    registered: Registered,
}

/// Protected by mmu_lock.
#[derive(Default)]
struct Mmu {
    slots: Slots,
    /// mmu_notifier_count.
    count: u64,
    /// mmu_notifier_seq.
    seq: u64,
    /// Faults that have read the sequence and not yet looked at it again: a bump while there are any has an effect.
    faults: u64,
}

impl Mmu {
    fn slots_of(&self, page: PageAddr) -> impl Iterator<Item = (Binding, Slot)> {
        let hit = move |slot: &Slot| slot.range.contains_addr(page.get());
        self.slots.iter().filter(move |(_, slot)| hit(slot)).map(|(&binding, &slot)| (binding, slot))
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
        kind: &'static Kind,
        change_pte: ChangePte,
    ) -> Result<Arc<Kvm>, OpenError> {
        let kvm = Arc::new(Kvm {
            kind,
            change_pte,
            options,
            context: DeviceContext::open(cx, device, mm, kind.name, Root::Own),
            mmu_lock: SpinLock::new(&MMU_LOCK, Mmu::default()),
            registered: Registered::not_yet(),
        });
        kvm.registered.register(cx, &kvm, options)?;
        Ok(kvm)
    }

    /// Drops sptes and flushes; under mmu_lock. Whether there were any.
    fn zap(&self, cx: &mut Atomic<'_>, binding: Option<Binding>, range: Range) -> bool {
        let zapped = self.context.unmap(cx, binding, range);
        if !zapped.is_empty() {
            self.context.flush(cx, binding, range);
        }
        !zapped.is_empty()
    }

    fn slot(&self, cx: &mut impl Context, binding: Binding) -> Option<Slot> {
        self.mmu_lock.lock(cx).slots.get(&binding).copied()
    }

    fn zap_page(&self, cx: &mut impl Context, page: PageAddr) {
        let mut mmu = self.mmu_lock.lock(cx);
        let (mmu, cx) = mmu.split();
        bump(&mut mmu.seq);
        if self.zap(cx, None, Range::page(page)) || mmu.faults > 0 {
            self.context.effect(Callback::Page);
        }
    }

    fn age(&self, cx: &mut Atomic<'_>, range: Range, kind: Callback) -> bool {
        let mut mmu = self.mmu_lock.lock(cx);
        let (_, cx) = mmu.split();
        kvm::age(cx, &self.context, range, kind)
    }

    fn delete_slot(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Option<Slot> {
        let mut mmu = self.mmu_lock.lock(cx);
        let (mmu, cx) = mmu.split();
        let slot = mmu.slots.remove(&binding)?;
        self.zap(cx, Some(binding), slot.range);
        Some(slot)
    }

    /// tdp_page_fault.
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
        let seq = {
            let mut mmu = self.mmu_lock.lock(cx);
            mmu.faults += 1;
            mmu.seq
        };
        let got = kvm::gup(cx, self.context.mm(), self.options.cpu, page, access, slot.access);
        let mut mmu = self.mmu_lock.lock(cx);
        let (mmu, cx) = mmu.split();
        mmu.faults -= 1;
        let got = got?;
        if !mmu.slots.contains_key(&binding) {
            return Err(missing);
        }
        if changed(mmu.count > 0 || mmu.seq != seq) && *self.kind != NO_RETRY {
            self.context.counters().retried(1);
            return Ok(());
        }
        got.map(cx, &self.context, binding, page);
        Ok(())
    }
}

impl MmuNotifier for Kvm {
    fn ops(&self) -> Ops {
        Ops::START
            | Ops::END
            | Ops::PAGE
            | Ops::CHANGE_PTE
            | Ops::CLEAR_FLUSH_YOUNG
            | Ops::TEST_YOUNG
            | Ops::RELEASE
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let mut mmu = self.mmu_lock.lock(&mut cx);
        let (mmu, cx) = mmu.split();
        bump(&mut mmu.count);
        if self.zap(cx, None, inv.range) || mmu.faults > 0 {
            self.context.effect(Callback::Start);
        }
        Ok(())
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) {
        let mut mmu = self.mmu_lock.lock(&mut cx);
        bump(&mut mmu.seq);
        unbump(&mut mmu.count);
        if mmu.faults > 0 {
            self.context.effect(Callback::End);
        }
    }

    fn invalidate_page(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        self.zap_page(&mut cx, page);
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, pte: Pte) {
        let mut mmu = self.mmu_lock.lock(cx);
        let (mmu, cx) = mmu.split();
        if self.change_pte == ChangePte::InsidePair && mmu.count == 0 {
            return;
        }
        let mut effect = false;
        if self.change_pte == ChangePte::Bumps {
            bump(&mut mmu.seq);
            // Inside a pair its end moves the sequence all the same.
            effect = mmu.faults > 0 && mmu.count == 0;
        }
        let range = Range::page(page);
        for (binding, _) in mmu.slots_of(page) {
            let mapped = self.zap(cx, Some(binding), range);
            if mapped && !pte.writable {
                let frame = self.context.mm().machine().frames().id(pte.pfn);
                self.context.map(cx, binding, page, frame, false);
            }
            effect |= mapped;
        }
        if effect {
            self.context.effect(Callback::ChangePte);
        }
    }

    fn clear_flush_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.age(cx, range, Callback::ClearFlushYoung)
    }

    fn test_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.age(cx, range, Callback::TestYoung)
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        let mut mmu = self.mmu_lock.lock(cx);
        let (_, cx) = mmu.split();
        if self.zap(cx, None, Range::ALL) {
            self.context.effect(Callback::Release);
        }
    }
}

impl Driver for Kvm {
    fn kind(&self) -> &'static Kind {
        self.kind
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        Ok(self.mmu_lock.lock(cx).slots.add(Slot { range, access }))
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
