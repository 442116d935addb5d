// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr-objects`, `userptr-objects-exact`: [`userptr::object`] itself as a driver.
//!
//! Bind: an object of the range, bound in an address space at the program's own addresses. Each operation of the device is one
//! batch: a word is copied to memory of the device itself, or stored. Unbind: unbind; the object is closed with the last batch.
//!
//! What is promised, and judged: over softmm itself, where the change waits for the callback, that the device is never
//! parted from the process. Over a source that tells in time and is not waited for (kvm), that a batch has the pages
//! that were the program's when it was submitted, or later; what the program does to the address meanwhile leaves it there.
//!
//! Lock order: that of the objects, and of the modelled source ([`softmm::told`]).

use super::consumer::{Consumer, Embedded, IN_TIME};
use super::fault;
use super::hardware::{Hardware, status};
use drivers::{
    BindError, Callback, Callbacks, DeviceContext, DeviceFault, DeviceOp, Holds, Kind, SubmitError,
};
use interleave::explore::Ghost;
use interleave::{MaySleep, Sleep};
use mmu_notifier::primary::{
    CountedBefore, GupError, IdentityError, Invalidate, PageIdentity, PrimaryMmu, SeqMoved, SetSeq,
    SubscribeError, Unheard,
};
use mmu_notifier::{Access, Invalidation, PAGE_SIZE, PageAddr, Range, WouldBlock};
use softmm::told::Told;
use softmm::{Mm, MmPin};
use std::sync::Arc;
use userptr::device::{Command, DeviceAddr};
use userptr::object::{self, AddressSpace, Flags, Iommu, Object, ObjectError};

/// Over a source that counts before the change, as kvm.
pub static KIND: Kind = Kind {
    name: "userptr-objects",
    kernel: "userptr",
    summary: "our objects, told in time",
    holds: Holds::Pages,
    callbacks: IN_TIME,
    reads: true,
    open: |cx, mm, device, options| {
        let context = Arc::new(DeviceContext::new(cx, device, mm, KIND.name));
        let (told, hardware) = (Told::<CountedBefore>::fed(mm), Hardware::new(context.clone(), false));
        let events = told.events().clone();
        let gpu = Gpu::new(told, hardware).ok();
        Ok(Embedded::open(cx, &KIND, context, Some(events), gpu, options)?)
    },
};

/// Over interval notifiers (5.5): the change waits.
pub static EXACT: Kind = Kind {
    name: "userptr-objects-exact",
    summary: "our objects, waited for",
    callbacks: Callbacks::of(&[Callback::Invalidate]),
    open: |cx, mm, device, options| {
        let context = Arc::new(DeviceContext::new(cx, device, mm, EXACT.name));
        let on = options.callbacks.contains(Callback::Invalidate);
        let direct = Direct { mm: mm.clone(), context: context.clone(), on };
        let gpu = Gpu::new(direct, Hardware::new(context.clone(), true)).ok();
        Ok(Embedded::open(cx, &EXACT, context, None, gpu, options)?)
    },
    ..KIND
};

/// softmm itself, with callbacks that are counted and can be switched off.
struct Direct {
    mm: Arc<Mm>,
    context: Arc<DeviceContext>,
    on: bool,
}

struct Counted {
    context: Arc<DeviceContext>,
    on: bool,
    callback: Arc<dyn Invalidate>,
}

impl Invalidate for Counted {
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        // Switched off, it is as if there were no notifier: the sequence stands still too.
        if !self.on {
            return Ok(seq.skip_against_the_rules());
        }
        self.context.counters().called(Callback::Invalidate);
        self.context.effect(Callback::Invalidate);
        self.callback.invalidate(cx, inv, seq)
    }
}

impl PrimaryMmu for Direct {
    type Delivery = <Mm as PrimaryMmu>::Delivery;
    type Subscription = <Mm as PrimaryMmu>::Subscription;
    type Pin = MmPin;

    fn subscribe(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<Self::Subscription, SubscribeError> {
        let counted = Counted { context: self.context.clone(), on: self.on, callback };
        self.mm.subscribe(cx, range, Arc::new(counted))
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
        self.mm.cannot_hear()
    }
}

/// An address space on the device.
struct Gpu<M: PrimaryMmu + 'static> {
    driver: object::Driver<M, Hardware>,
    space: AddressSpace<M, Hardware>,
    hardware: Hardware,
    /// What is read goes there.
    status: Object<M, Hardware>,
    status_at: DeviceAddr,
    batches: Ghost<u64>,
}

/// An object, and where it is bound.
struct Bound<M: PrimaryMmu + 'static> {
    object: Object<M, Hardware>,
    at: DeviceAddr,
}

impl<M: PrimaryMmu + 'static> Gpu<M> {
    fn new(mm: M, hardware: Hardware) -> Result<Gpu<M>, ObjectError> {
        let driver = object::Driver::new(Arc::new(mm), hardware.clone(), Iommu::passthrough());
        let space = driver.space();
        let status = driver.object_of(status(), Flags::default())?;
        let status_at = space.bind(&status, None)?;
        Ok(Gpu { driver, space, hardware, status, status_at, batches: Ghost::new(0) })
    }

    fn bound(&self, range: Range, access: Access) -> Result<Bound<M>, ObjectError> {
        let flags = Flags { read_only: access == Access::Read, probe: false };
        let object = self.driver.object_of(range, flags)?;
        let at = self.space.bind(&object, Some(DeviceAddr(range.start())))?;
        Ok(Bound { object, at })
    }

    /// One operation at `at` as a batch; what was read or written.
    fn execute(&self, bound: &Bound<M>, at: DeviceAddr, op: DeviceOp) -> Result<u64, SubmitError> {
        let DeviceOp::Write(_, value) = op else {
            // Where others that run beside it do not read to.
            let slot = self.batches.update(|batches| {
                *batches += 1;
                *batches * 8 % PAGE_SIZE
            });
            let batch = [Command::Copy { src: at, dst: DeviceAddr(self.status_at.0 + slot), len: 8 }];
            let done = self.space.execute(&[&bound.object, &self.status], &batch).map_err(refused)?;
            done.wait().map_err(|_| SubmitError::Again)?;
            return Ok(self.hardware.take_read(status().start() + slot).unwrap_or_default());
        };
        let batch = [Command::StoreDword { dst: at, value: value as u32 }];
        let done = self.space.execute(&[&bound.object], &batch).map_err(refused)?;
        // A batch that fails has been told as a bug.
        done.wait().map_err(|_| SubmitError::Again)?;
        Ok(value)
    }
}

fn refused(error: ObjectError) -> SubmitError {
    match error {
        ObjectError::Device(error) => fault(&error),
        ObjectError::Unsettled { .. } => SubmitError::Again,
        _ => SubmitError::Exited,
    }
}

impl<M: PrimaryMmu + 'static> Consumer for Gpu<M> {
    type Bound = Bound<M>;

    fn bind(&self, range: Range, access: Access) -> Result<Bound<M>, BindError> {
        self.bound(range, access).map_err(|_| BindError::Overlaps(range))
    }

    fn unbind(&self, _: Range, bound: &Bound<M>) -> Result<(), SubmitError> {
        self.space.unbind(bound.at).map_err(refused)
    }

    fn operate(
        &self,
        _: &mut MaySleep<'_>,
        range: Range,
        _: Access,
        bound: &Bound<M>,
        ops: &[DeviceOp],
    ) -> Result<Result<Vec<u64>, DeviceFault>, SubmitError> {
        self.hardware.asked(range);
        let at = |op: &DeviceOp| DeviceAddr(bound.at.0 + (op.addr() - range.start()));
        let values = ops.iter().map(|op| self.execute(bound, at(op), *op));
        values.collect::<Result<Vec<u64>, _>>().map(Ok)
    }
}
