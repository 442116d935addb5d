// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drivers that are wrong in a way that no real one is, around one that is right.

use drivers::{
    BindError, Binding, DeviceContext, DeviceFault, DeviceOp, Driver, Kind, RequestId, SubmitError,
};
use interleave::MaySleep;
use mmu_notifier::{Access, PageAddr, Range, Registration};
use std::sync::Arc;

/// What is done where the driver inside is closed.
pub(crate) type Close = fn(&mut MaySleep<'_>, &dyn Driver);

/// What is done before the driver inside binds.
pub(crate) type Bind = fn(&mut MaySleep<'_>, &dyn Driver, Range) -> Result<(), BindError>;

/// Nothing.
pub(crate) const BIND: Bind = |_, _, _| Ok(());

/// A driver around another.
pub(crate) struct Around {
    pub(crate) kind: &'static Kind,
    pub(crate) inside: Arc<dyn Driver>,
    pub(crate) bind: Bind,
    pub(crate) close: Close,
    pub(crate) _beside: Option<Registration>,
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
