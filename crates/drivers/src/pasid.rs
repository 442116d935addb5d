// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the drivers have in common that let a device walk the page table of a process: the PASID's life, and the
//! answer to a page request.
//!
//! The hardware knows no ranges: a process gives it the whole address space. A binding here is what user space means to use, so that
//! scripts can say so, and decides nothing.
//!
//! Lock order: `bindings` is a leaf.

use crate::bindings::Bindings;
use crate::device::{DeviceContext, Root};
use crate::driver::{BindError, SubmitError, submit_checked};
use crate::engine::RequestId;
use crate::op::{Binding, DeviceFault, DeviceOp};
use interleave::{AtomicBool, Context, LockClass, MaySleep, Ordering, SpinLock};
use mmu_notifier::{Access, PageAddr, Range};

static BINDINGS: LockClass = LockClass::new("pasid bindings");

pub(crate) struct Pasid {
    bindings: SpinLock<Bindings<(Range, Access)>>,
    released: AtomicBool,
}

impl Pasid {
    pub(crate) fn new() -> Pasid {
        Pasid { bindings: SpinLock::new(&BINDINGS, Bindings::default()), released: AtomicBool::new(false) }
    }

    pub(crate) fn bind(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        access: Access,
    ) -> Result<Binding, BindError> {
        if self.is_released() {
            return Err(BindError::Exited(range));
        }
        Ok(self.bindings.lock(cx).add((range, access)))
    }

    fn bound(&self, cx: &mut impl Context, binding: Binding) -> Result<(Range, Access), SubmitError> {
        self.bindings.lock(cx).get(&binding).copied().ok_or(SubmitError::NotBound(binding))
    }

    pub(crate) fn unbind(
        &self,
        cx: &mut MaySleep<'_>,
        context: &DeviceContext,
        binding: Binding,
    ) -> Result<(), SubmitError> {
        let gone = self.bindings.lock(cx).remove(&binding);
        let (range, _) = gone.ok_or(SubmitError::NotBound(binding))?;
        context.flush(cx, Some(binding), range);
        Ok(())
    }

    pub(crate) fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        context: &DeviceContext,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let (range, access) = self.bound(cx, binding)?;
        submit_checked(cx, context, binding, range, access, ops)
    }

    /// handle_mm_fault for the device. It says nothing about what the device will find: it walks again.
    pub(crate) fn page_request(
        &self,
        cx: &mut MaySleep<'_>,
        context: &DeviceContext,
        binding: Binding,
        page: PageAddr,
        access: Access,
    ) -> Result<(), DeviceFault> {
        let missing = DeviceFault::NoTranslation { page, access };
        self.bound(cx, binding).map_err(|_| missing)?;
        // mmget_not_zero: nobody faults into an address space that is being torn down.
        let user = context.mm().mmget().filter(|_| !self.is_released()).ok_or(missing)?;
        let result = user.page_fault(cx, page, access);
        user.mmput(cx);
        result.map_err(|source| DeviceFault::Refused { page, source })
    }

    pub(crate) fn is_released(&self) -> bool {
        self.released.load(Ordering::SeqCst)
    }

    /// The PASID gets no page table any more; no translation is left when this returns.
    pub(crate) fn release(&self, cx: &mut MaySleep<'_>, context: &DeviceContext) {
        self.released.store(true, Ordering::SeqCst);
        context.set_root(cx, Root::Empty);
        context.flush(cx, None, Range::ALL);
    }
}
