// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drivers that are wrong in a way that no real one is, around one that is right.

use drivers::{
    BindError, Binding, DeviceContext, DeviceFault, DeviceOp, Driver, Kind, RequestId, SubmitError,
};
use interleave::MaySleep;
use mmu_notifier::{Access, PageAddr, Range, Registration};
use std::sync::Arc;

/// What is done where the driver inside is closed.
type Close = fn(&mut MaySleep<'_>, &dyn Driver);

/// What is done before the driver inside binds.
type Bind = fn(&mut MaySleep<'_>, &dyn Driver, Range) -> Result<(), BindError>;

/// Nothing.
const BIND: Bind = |_, _, _| Ok(());

/// A driver around another.
pub(crate) struct Around {
    kind: &'static Kind,
    inside: Arc<dyn Driver>,
    bind: Bind,
    close: Close,
    _beside: Option<Registration>,
}

impl Driver for Around {
    fn kind(&self) -> &'static Kind {
        self.kind
    }

    fn context(&self) -> &DeviceContext {
        self.inside.context()
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        (self.bind)(cx, &*self.inside, range)?;
        self.inside.bind(cx, range, access)
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        self.inside.unbind(cx, binding)
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        self.inside.submit(cx, binding, ops)
    }

    fn device_fault(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        page: PageAddr,
        access: Access,
    ) -> Result<(), DeviceFault> {
        self.inside.device_fault(cx, binding, page, access)
    }

    fn run_work(&self, cx: &mut MaySleep<'_>) -> bool {
        self.inside.run_work(cx)
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        (self.close)(cx, &*self.inside);
    }
}

/// KVM, on an mm that has another notifier, which refuses what must not block.
pub(crate) mod beside_a_refuser {
    use super::*;
    use drivers::kvm_v3_16;
    use interleave::Sleep;
    use mmu_notifier::{Invalidation, MmuNotifier, Ops, WouldBlock};

    struct Refuser;

    impl MmuNotifier for Refuser {
        fn ops(&self) -> Ops {
            Ops::START
        }

        fn invalidate_range_start(&self, cx: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
            if matches!(cx, Sleep::May(_)) { Ok(()) } else { Err(WouldBlock) }
        }
    }

    pub(crate) static KIND: Kind = Kind {
        name: "kvm-beside-a-refuser",
        open: |cx, mm, device, options| {
            // The list is called from its newest entry on: KVM has started when this one refuses.
            let beside = Some(mm.notifiers().register(cx, Arc::new(Refuser))?);
            let inside = (kvm_v3_16::KIND.open)(cx, mm, device, options)?;
            let close: Close = |cx, driver| driver.close(cx);
            Ok(Arc::new(Around { kind: &KIND, inside, bind: BIND, close, _beside: beside }))
        },
        ..kvm_v3_16::KIND
    };
}

/// A design that is told to close and does not.
pub(crate) mod never_closed {
    use super::*;
    use drivers::design_drop_everything;

    pub(crate) static KIND: Kind = Kind {
        name: "never-closed",
        open: |cx, mm, device, options| {
            let inside = (design_drop_everything::KIND.open)(cx, mm, device, options)?;
            let close: Close = |cx, driver| {
                // It lets go of its pages, and stays registered.
                for (binding, ..) in driver.context().entries(cx) {
                    let _ = driver.unbind(cx, binding);
                }
            };
            Ok(Arc::new(Around { kind: &KIND, inside, bind: BIND, close, _beside: None }))
        },
        ..design_drop_everything::KIND
    };
}

/// A driver that looks at two pages before it binds the first, and forgets the one it has if it does not get the other.
pub(crate) mod leaks_on_error {
    use super::*;
    use drivers::vfio;
    use mmu_notifier::PAGE_SIZE;
    use softmm::Foll;

    pub(crate) static KIND: Kind = Kind {
        name: "leaks-on-error",
        open: |cx, mm, device, options| {
            let inside = (vfio::KIND.open)(cx, mm, device, options)?;
            let bind: Bind = |cx, driver, range| {
                let mm = driver.context().mm();
                let got = |cx: &mut MaySleep<'_>, page| {
                    let pages = mm.get_user_pages(cx, Range::page(page), Foll::GET.write());
                    pages.map_err(|source| BindError::Fault { range, source })
                };
                let first = got(cx, range.first_page())?;
                let Ok(next) = PageAddr::new(range.first_page().get() + PAGE_SIZE) else { return Ok(()) };
                got(cx, next).map(drop).inspect_err(|_| std::mem::forget(first))
            };
            let close: Close = |cx, driver| driver.close(cx);
            Ok(Arc::new(Around { kind: &KIND, inside, bind, close, _beside: None }))
        },
        ..vfio::KIND
    };
}
