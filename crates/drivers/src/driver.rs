// SPDX-License-Identifier: MIT OR Apache-2.0
//! What every driver offers, so that a checker can run any of them against any path of the mm.

use crate::callbacks::Callbacks;
use crate::counters::Counts;
use crate::device::{Device, DeviceContext};
use crate::engine::{RequestId, refuse};
use crate::op::{Binding, DeviceFault, DeviceOp};
use crate::work::WorkMode;
use interleave::{MaySleep, yield_now};
use mmu_notifier::{Access, PAGE_SIZE, PageAddr, Range, RegisterError};
use softmm::{FaultError, Mm};
use std::fmt;
use std::sync::Arc;

/// Tries of [`Driver::access`] before it gives up: bounded, so that a livelock is an error and not a hang.
const MAX_TRIES: u32 = 1000;

/// How a driver is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Callbacks that are registered; of those that the driver has. One that is not here might as well not be written.
    pub callbacks: Callbacks,
    /// Who runs its work items.
    pub work: WorkMode,
    /// Take the time of callbacks. Not under exploration: it reads the clock.
    pub measure: bool,
    /// On which CPU of the machine its system calls run (get_user_pages_fast turns that one's interrupts off).
    pub cpu: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { callbacks: Callbacks::ALL, work: WorkMode::default(), measure: false, cpu: 0 }
    }
}

/// How a driver keeps the pages that its device uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// By reference, until it lets go.
    Pages,
    /// Not at all: notifications alone keep it right.
    Nothing,
    /// The device walks the page table of the process.
    ProcessTable,
}

/// Opens a driver for one address space on a device.
pub type Open = fn(&mut MaySleep<'_>, &Arc<Mm>, &Arc<Device>, Options) -> Result<Arc<dyn Driver>, OpenError>;

/// What there is to know of a driver before it is opened. One static for each.
pub struct Kind {
    /// A name for tables and the command line: `i915-3.16`.
    pub name: &'static str,
    /// The kernel that it is taken from, or "design" for one of our own.
    pub kernel: &'static str,
    /// In one line.
    pub summary: &'static str,
    /// How it keeps pages.
    pub holds: Holds,
    /// The callbacks that it has.
    pub callbacks: Callbacks,
    /// Does it bind memory for reading only, without write access?
    pub reads: bool,
    /// Opens it on an address space.
    pub open: Open,
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kind").field("name", &self.name).field("callbacks", &self.callbacks).finish()
    }
}

/// Why a driver was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The mm refused the notifier.
    #[error("the driver's notifier was refused: {0}")]
    Register(#[from] RegisterError),
}

/// Why memory was not bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The hardware cannot be kept from writing (-ENODEV).
    #[error(
        "{0} cannot be bound for reading only: this hardware cannot be kept from writing; bind it for writing"
    )]
    ReadOnly(Range),
    /// Something else of this driver is bound there (-EINVAL).
    #[error("{0} overlaps what is bound already: unbind that first")]
    Overlaps(Range),
    /// What was bound there is still being let go of (-EAGAIN).
    #[error("{0} overlaps something that is on its way out: try again")]
    Again(Range),
    /// The pages could not be pinned.
    #[error("{range} cannot be bound: {source}")]
    Fault {
        /// The range asked for.
        range: Range,
        /// Why.
        source: FaultError,
    },
    /// The mm refused the notifier of the range.
    #[error("{range} cannot be bound: {source}")]
    Register {
        /// The range asked for.
        range: Range,
        /// Why.
        source: RegisterError,
    },
    /// The address space is gone (-ESRCH).
    #[error("{0} cannot be bound: the address space is being torn down")]
    Exited(Range),
}

/// Why work was not given to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// Pages are still being got, or changed meanwhile (-EAGAIN).
    #[error("the pages are not there yet, or have changed meanwhile: submit again")]
    Again,
    /// The process has no such memory (-EFAULT).
    #[error("the pages cannot be got: {0}")]
    Fault(#[from] FaultError),
    /// Never bound, or unbound.
    #[error("{0:?} is not bound")]
    NotBound(Binding),
    /// The word is not in the binding, not aligned, or not stored by softmm.
    #[error("{0:#x} is not the address of a stored word in the binding")]
    Outside(u64),
    /// A write through a binding for reading.
    #[error("the binding is for reading only")]
    ReadOnly,
    /// The address space is gone (-ESRCH).
    #[error("the address space is being torn down")]
    Exited,
}

/// Why a device did not do what it was to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The driver did not give it to the device.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceFault),
}

/// A driver of a secondary MMU, open on one address space.
///
/// Bind memory, submit work, and the device reads and writes it. [`Driver::close`] it before it is dropped: the mm keeps its
/// notifier otherwise. All methods may sleep and none may be called from a callback.
pub trait Driver: Send + Sync {
    /// What it is.
    fn kind(&self) -> &'static Kind;

    /// Its context in the device, with the counters.
    fn context(&self) -> &DeviceContext;

    /// Makes `range` usable by the device (USERPTR ioctl, memslot, memory region).
    ///
    /// # Errors
    /// [`BindError`].
    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError>;

    /// Takes it away again, and waits for the device as far as the real driver does.
    ///
    /// # Errors
    /// [`SubmitError::NotBound`].
    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError>;

    /// Gives work to the device (execbuf, doorbell, vcpu entry). It may run from now on and has run when [`Driver::run`] returns.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing runs then.
    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError>;

    /// The device faulted: makes `page` present for it, or says why not. `Ok` is no promise: the device tries again.
    /// Only devices that can fault come here; the others fail the request.
    ///
    /// # Errors
    /// [`DeviceFault`].
    fn device_fault(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        page: PageAddr,
        access: Access,
    ) -> Result<(), DeviceFault> {
        refuse(cx, binding, page, access)
    }

    /// Runs one work item of the driver that nobody has begun, if there is one ([`WorkMode::Manual`]).
    fn run_work(&self, cx: &mut MaySleep<'_>) -> bool {
        let _ = cx;
        false
    }

    /// Unbinds everything, ends all work, unregisters. A second call does nothing.
    fn close(&self, cx: &mut MaySleep<'_>);

    /// Runs the request, or waits for who does; what was read and written.
    ///
    /// # Errors
    /// [`DeviceFault`].
    fn run(&self, cx: &mut MaySleep<'_>, request: RequestId) -> Result<Vec<u64>, DeviceFault> {
        self.context().run(cx, request, &|cx, b, page, access| self.device_fault(cx, b, page, access))
    }

    /// Plays the hardware for one request that nobody has begun; whether there was one.
    fn run_hardware(&self, cx: &mut MaySleep<'_>) -> bool {
        self.context().run_any(cx, &|cx, b, page, access| self.device_fault(cx, b, page, access))
    }

    /// Submits one operation and runs it, without trying again.
    ///
    /// # Errors
    /// [`DriverError`].
    fn try_access(&self, cx: &mut MaySleep<'_>, binding: Binding, op: DeviceOp) -> Result<u64, DriverError> {
        let request = self.submit(cx, binding, &[op])?;
        let done = self.run(cx, request)?;
        Ok(done.first().copied().unwrap_or_default())
    }

    /// As [`Driver::try_access`], as user space does it: again for as long as the driver says so, a thousand times at most.
    ///
    /// # Errors
    /// [`DriverError`]; [`SubmitError::Again`] if it never came to an end.
    fn access(&self, cx: &mut MaySleep<'_>, binding: Binding, op: DeviceOp) -> Result<u64, DriverError> {
        for _ in 0..MAX_TRIES {
            match self.try_access(cx, binding, op) {
                Err(DriverError::Submit(SubmitError::Again)) => {
                    if !self.run_work(cx) {
                        yield_now();
                    }
                }
                result => return result,
            }
        }
        Err(DriverError::Submit(SubmitError::Again))
    }

    /// The numbers now.
    fn counts(&self) -> Counts {
        self.context().counters().counts()
    }
}

/// Runs `f` as a thread of the process does that has made a system call: it is a user of the address space (mm_users), which is torn
/// down after it if it was the last. `None`: it is being torn down already, so no such thread is left.
///
/// Not with a lock held that a callback takes: the last user calls release.
pub(crate) fn in_process<R>(
    cx: &mut MaySleep<'_>,
    mm: &Arc<Mm>,
    f: impl FnOnce(&mut MaySleep<'_>) -> R,
) -> Option<R> {
    let user = mm.mmget()?;
    let result = f(cx);
    user.mmput(cx);
    Some(result)
}

/// Checks the operations of a request against the binding.
///
/// # Errors
/// [`SubmitError::Outside`], [`SubmitError::ReadOnly`].
pub fn check_ops(mm: &Mm, range: Range, access: Access, ops: &[DeviceOp]) -> Result<(), SubmitError> {
    let stored = mm.machine().frames().words_per_page() as u64;
    for op in ops {
        let addr = op.addr();
        if !range.contains_addr(addr) || !addr.is_multiple_of(8) || addr % PAGE_SIZE / 8 >= stored {
            return Err(SubmitError::Outside(addr));
        }
        if op.access() == Access::Write && access == Access::Read {
            return Err(SubmitError::ReadOnly);
        }
    }
    Ok(())
}

/// Gives `ops` to the device as they are, if the binding allows them.
pub(crate) fn submit_checked(
    cx: &mut MaySleep<'_>,
    context: &DeviceContext,
    binding: Binding,
    range: Range,
    access: Access,
    ops: &[DeviceOp],
) -> Result<RequestId, SubmitError> {
    check_ops(context.mm(), range, access, ops)?;
    Ok(context.submit(cx, binding, ops))
}
