// SPDX-License-Identifier: MIT OR Apache-2.0
//! i915 userptr of Linux 3.16 with one callback more, in which it sleeps where it must not: the mutex in change_pte that the exchange asks
//! about, and the mutex in invalidate_page that kernels 4.11 to 4.13 made wrong (bug 24).
//!
//! The callback does for its page what invalidate_range_start does for a range: struct_mutex, cancel, wait for the GPU, unbind, put.
//! change_pte always runs under the ptl; invalidate_page does from 4.11 on, and in the proposal that puts it in change_pte's place.
//! Under a spin lock a mutex can wait for its owner for ever, if that one waits for the spin lock: here for the ptl, in get_user_pages.
//!
//! The types refuse this: a mutex wants `MaySleep`, and these callbacks get `Atomic`. So the right to sleep is forged, in the one way
//! there is, and the run-time check reports each mutex that is taken with it.
//!
//! Lock order: that of [`crate::i915_v3_16`], and ptl > struct_mutex, which is the fault.

use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext};
use crate::driver::{BindError, Driver, Kind, OpenError, Options, SubmitError};
use crate::engine::RequestId;
use crate::i915_v3_16::{Config, I915};
use crate::listener::Registered;
use crate::op::{Binding, DeviceOp};
use crate::{i915_v3_16, i915_v3_16_ro};
use interleave::{Atomic, MaySleep, PageContext, Sleep, forge_may_sleep_against_the_rules};
use mmu_notifier::{Access, Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};
use softmm::Mm;
use std::sync::Arc;

/// With change_pte.
pub static CHANGE_PTE: Kind = Kind {
    name: "i915-sleeping-change-pte",
    kernel: "none",
    summary: "as i915-3.16-ro, with a mutex in change_pte",
    callbacks: Callbacks::of(&[Callback::Start, Callback::ChangePte]),
    open: |cx, mm, device, options| Ok(Sleeping::open(cx, mm, device, options, &CHANGE_PTE)?),
    ..i915_v3_16_ro::KIND
};

/// With invalidate_page.
pub static INVALIDATE_PAGE: Kind = Kind {
    name: "i915-sleeping-invalidate-page",
    kernel: "4.11 to 4.13, in effect",
    summary: "as i915-3.16-ro, with a mutex in invalidate_page",
    callbacks: Callbacks::of(&[Callback::Start, Callback::Page]),
    open: |cx, mm, device, options| Ok(Sleeping::open(cx, mm, device, options, &INVALIDATE_PAGE)?),
    ..i915_v3_16_ro::KIND
};

/// See the module.
pub struct Sleeping {
    kind: &'static Kind,
    i915: Arc<I915>,
    registered: Registered,
}

impl Sleeping {
    /// Registers with `mm`. `kind`: one of this module's.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        cx: &mut MaySleep<'_>,
        mm: &Arc<Mm>,
        device: &Arc<Device>,
        options: Options,
        kind: &'static Kind,
    ) -> Result<Arc<Sleeping>, OpenError> {
        let config = Config { kind, read_only: i915_v3_16::ReadOnly::Enforced, ..Config::MENDED };
        let i915 = I915::unregistered(cx, mm, device, options, config);
        let driver = Arc::new(Sleeping { kind, i915, registered: Registered::not_yet() });
        driver.registered.register(cx, &driver, options)?;
        Ok(driver)
    }
}

impl MmuNotifier for Sleeping {
    fn ops(&self) -> Ops {
        Ops::START | if self.kind.callbacks.contains(Callback::Page) { Ops::PAGE } else { Ops::CHANGE_PTE }
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        self.i915.invalidate_range_start(cx, inv)
    }

    fn invalidate_page(&self, cx: PageContext<'_, '_>, page: PageAddr) {
        let range = Range::page(page);
        match cx {
            PageContext::May(cx) => self.i915.invalidate(cx, range, Callback::Page),
            PageContext::Atomic(cx) => forge_may_sleep_against_the_rules(cx, |cx| {
                self.i915.invalidate(cx, range, Callback::Page);
            }),
        }
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, _: Pte) {
        forge_may_sleep_against_the_rules(cx, |cx| {
            self.i915.invalidate(cx, Range::page(page), Callback::ChangePte);
        });
    }
}

impl Driver for Sleeping {
    fn kind(&self) -> &'static Kind {
        self.kind
    }

    fn context(&self) -> &DeviceContext {
        self.i915.context()
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        self.i915.bind(cx, range, access)
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        self.i915.unbind(cx, binding)
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        self.i915.submit(cx, binding, ops)
    }

    fn run_work(&self, cx: &mut MaySleep<'_>) -> bool {
        self.i915.run_work(cx)
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        self.i915.close(cx);
        self.registered.unregister(cx);
    }
}
