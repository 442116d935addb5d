// SPDX-License-Identifier: MIT OR Apache-2.0
//! Objects, as their owner sees them.

use std::fmt;
use std::sync::Arc;

use interleave::MaySleep;
use mmu_notifier::primary::PrimaryMmu;
use mmu_notifier::{Access, Range};

use super::core::Core;
use super::error::ObjectError;
use super::memory::Buffer;
use crate::device::{Device, Engine};

/// How an object is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags {
    /// The device only reads it; memory that may not be written can then be had.
    pub read_only: bool,
    /// Fail now, and not at the first batch, if the memory is not there.
    pub probe: bool,
}

impl Flags {
    fn access(self) -> Access {
        if self.read_only { Access::Read } else { Access::Write }
    }
}

/// Ordinary memory that a device may be given. Closed when it is dropped: that waits until the device is through with it,
/// and for nothing else; a batch that hangs has to be killed first, by the device's own means.
///
/// Bytes that it owns cannot be freed or looked at behind the device's back:
/// ```compile_fail,E0382
/// # use userptr::object::{Driver, Flags};
/// # use userptr::device::{Engine, Device};
/// # use mmu_notifier::PrimaryMmu;
/// # fn f<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static>(driver: &Driver<M, D>) {
/// let bytes = vec![0_u8; 100];
/// let object = driver.object(bytes, Flags::default());
/// drop(bytes);
/// # }
/// ```
pub struct Object<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static> {
    core: Arc<Core<M, D>>,
    number: u64,
    range: Range,
    /// `None` if the memory is somebody else's.
    buffer: Option<Buffer>,
}

impl<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static> Object<M, D> {
    pub(super) fn new(
        core: &Arc<Core<M, D>>,
        bytes: (u64, u64),
        buffer: Option<Buffer>,
        flags: Flags,
    ) -> Result<Object<M, D>, ObjectError> {
        let range = Range::enclosing(bytes.0, bytes.1)?;
        if !core.at_home() {
            return Err(ObjectError::Forked);
        }
        let limit = core.device.limits().bytes;
        if range.len() > limit {
            return Err(crate::device::DeviceError::TooLong { range, limit }.into());
        }
        MaySleep::enter(|cx| {
            if flags.probe {
                core.mm.fault_in(cx, range, flags.access())?;
            }
            let number = core.open(cx, range, bytes, flags.access());
            Ok(Object { core: Arc::clone(core), number, range, buffer })
        })
    }

    /// The number, if it belongs there.
    pub(super) fn of(&self, core: &Arc<Core<M, D>>) -> Result<u64, ObjectError> {
        if Arc::ptr_eq(&self.core, core) { Ok(self.number) } else { Err(ObjectError::OtherDevice) }
    }

    /// The pages that its bytes are in.
    pub fn range(&self) -> Range {
        self.range
    }

    /// Gets the pages now, so that the first batch need not.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub fn get_pages(&self) -> Result<(), ObjectError> {
        if !self.core.at_home() {
            return Err(ObjectError::Forked);
        }
        MaySleep::enter(|cx| self.core.get_pages(cx, self.number))
    }

    /// Gives the pages back, once the device is through with them; the next batch gets them again. The bindings stay.
    pub fn put_pages(&self) {
        if self.core.at_home() {
            MaySleep::enter(|cx| {
                let detached = self.core.detach(cx, self.number, |_| true);
                self.core.let_go(cx, self.number, detached);
            });
        }
    }

    /// Has it pages now that are the program's? In the next moment that can be otherwise.
    pub fn has_pages(&self) -> bool {
        MaySleep::enter(|cx| {
            let books = self.core.lock(cx);
            let backing = books.objects.get(&self.number).and_then(|entry| entry.backing.as_ref());
            backing.is_some_and(super::core::Backing::is_current)
        })
    }

    /// Waits until the device is through with it.
    pub fn wait_idle(&self) {
        if self.core.at_home() {
            MaySleep::enter(|cx| self.core.wait_idle(cx, self.number));
        }
    }

    /// The bytes, once the device is through with them; until then it waits. `None` if they are not its own
    /// ([`Driver::object_at`](super::Driver::object_at)).
    pub fn bytes(&mut self) -> Option<&mut [u8]> {
        self.wait_idle();
        // SAFETY: the device is through with it, and no batch can name what is borrowed mutably.
        self.buffer.as_mut().map(|buffer| unsafe { buffer.lend() })
    }

    /// Closes it and gives its bytes back, if they are its own.
    pub fn into_bytes(mut self) -> Option<Box<[u8]>> {
        let buffer = self.buffer.take();
        if self.core.at_home() {
            MaySleep::enter(|cx| self.core.close(cx, self.number));
        }
        // SAFETY: it is closed: the device is through with it. In a forked child the device is the parent's, and so is the
        // memory that it reaches.
        buffer.map(|buffer| unsafe { buffer.take() })
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static> fmt::Debug for Object<M, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("number", &self.number)
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static> Drop for Object<M, D> {
    fn drop(&mut self) {
        let home = self.core.at_home();
        let closed = !home || MaySleep::try_enter(|cx| self.core.close(cx, self.number)).is_ok();
        // Where nobody may sleep, the device keeps the memory.
        if let (true, Some(buffer)) = (closed, self.buffer.take()) {
            // SAFETY: as in `into_bytes`.
            drop(unsafe { buffer.take() });
        }
    }
}
