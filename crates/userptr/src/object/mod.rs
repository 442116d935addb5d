// SPDX-License-Identifier: MIT OR Apache-2.0
//! Userptr objects: ordinary memory in address spaces of a device, after the GPU driver i915.
//!
//! An [`Object`] is a run of bytes of the program, a [`Driver`] a device and the primary MMU whose memory it uses. An
//! object is bound at device addresses in [`AddressSpace`]s, and batches of commands are executed there on a list of
//! objects. The program stays free to unmap, replace or fork the memory: then the object's pages are given back
//! after the device is through with them, and the next batch gets those that are there by then, or is refused.
//!
//! ```no_run
//! use userptr::device::{Command, cpu::Cpu};
//! use userptr::object::{Driver, Flags, Iommu};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let driver = Driver::new(userptr::source::open_mm(1)?, Cpu::new(), Iommu::passthrough());
//! let space = driver.space();
//! let from = driver.object(vec![7_u8; 100], Flags { read_only: true, ..Flags::default() })?;
//! let mut to = driver.object(vec![0_u8; 100], Flags::default())?;
//! let (src, dst) = (space.bind(&from, None)?, space.bind(&to, None)?);
//! space.execute(&[&from, &to], &[Command::Copy { dst, src, len: 100 }])?.wait()?;
//! assert_eq!(to.bytes().unwrap(), [7; 100]);
//! # Ok(())
//! # }
//! ```
//!
//! # Layers
//!
//! | layer | from | to | where |
//! |---|---|---|---|
//! | pages | an object's range | what the primary MMU has there, at a sequence | `core` over [`Device::get_pages`] |
//! | remapping | pages | bus addresses, one run for each object | [`Iommu`] over [`Device::map`] |
//! | device page table | addresses of a space | objects and offsets | `table` |
//!
//! The first two exist once for each object, however often it is bound, and come and go with its pages. The third
//! stays. All addresses of a batch are led through it before the engine sees them, and held against the objects to
//! the byte: mappings are of whole pages, but what else is in an object's first and last page is never touched.
//! Spaces of one driver share the engine and its bus addresses; devices whose contexts have page tables of their own (the
//! kvm device) keep drivers apart in hardware.
//!
//! # Execution and invalidation
//!
//! [`AddressSpace::execute`] gets the pages of its objects, checks under one lock that none of them has changed, attaches the
//! batch to its objects and hands it over; if one has changed it starts over. An invalidation takes the same lock, moves the
//! sequence, waits for the batches that are attached to exactly the objects it overlaps, unmaps them and gives the pages
//! back, dirty if a batch may have written them.
//!
//! A wait can end before the batch does: [`Execution::wait_interruptible`] returns when a signal was handled or the time is
//! up, and changes nothing for the batch, its objects and whoever else waits. What hangs is killed through the device.
//!
//! Over a source that tells late (the running kernel) the change does not wait. A batch that was in flight, or handed over
//! at that moment, has the pages that were the program's when it was submitted, or faults ([`Hold`]).
//!
//! # Lock order
//!
//! ```text
//! locks of the primary MMU      where the change waits for the callback
//!   userptr_objects             objects, bindings; never held over the device, the mm, or a wait
//!     userptr_job               one batch
//! userptr_iommu                 leaf
//! ```
//!
//! [`Device::get_pages`]: crate::device::Device::get_pages
//! [`Device::map`]: crate::device::Device::map
//! [`Hold`]: crate::device::Hold

mod core;
mod error;
mod handle;
mod invalidate;
mod iommu;
mod job;
mod memory;
mod space;
mod submit;
mod table;

use std::fmt;
use std::sync::Arc;

use interleave::Ordering;
use mmu_notifier::Range;
use mmu_notifier::primary::PrimaryMmu;

use self::core::Core;
use crate::device::model::Model;
use crate::device::{Device, Engine};

pub use error::ObjectError;
pub use handle::{Flags, Object};
pub use iommu::Iommu;
pub use space::AddressSpace;
pub use submit::Execution;

/// A device and the primary MMU whose memory it uses. A handle; objects and spaces keep what it stands for.
pub struct Driver<M: PrimaryMmu, D: Device<M> + Engine> {
    core: Arc<Core<M, D>>,
}

/// What a driver has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Times that an object's pages were got.
    pub got: u64,
    /// Times that getting or submitting started over because something changed.
    pub retried: u64,
    /// Times that a callback took an object's pages away.
    pub invalidated: u64,
}

impl<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static> Driver<M, D> {
    /// A driver for `device` on the memory of `mm`.
    pub fn new(mm: Arc<M>, device: D, iommu: Iommu) -> Driver<M, D> {
        Driver { core: Arc::new(Core::new(mm, device, iommu)) }
    }

    /// An object that owns its bytes. Nothing is got or mapped yet.
    ///
    /// # Errors
    /// [`ObjectError`], for no bytes, for more than the device takes, and with [`Flags::probe`] if they are not there.
    pub fn object(&self, bytes: impl Into<Box<[u8]>>, flags: Flags) -> Result<Object<M, D>, ObjectError> {
        let buffer = memory::Buffer::new(bytes.into());
        Object::new(&self.core, buffer.bytes(), Some(buffer), flags)
    }

    /// An object of whatever is, or will be, at these `len` bytes from `addr` on: any kind of memory, unaligned, a hole,
    /// overlapping other objects.
    ///
    /// # Errors
    /// As for [`object`](Self::object).
    ///
    /// # Safety
    /// While a batch that names the object is in flight, no reference may exist to those of the bytes that it writes, and
    /// nobody may write those that it reads. (Whether they are mapped does not matter.)
    pub unsafe fn object_at(
        &self,
        addr: usize,
        len: usize,
        flags: Flags,
    ) -> Result<Object<M, D>, ObjectError> {
        Object::new(&self.core, (addr as u64, len as u64), None, flags)
    }

    /// A new, empty address space.
    #[must_use]
    pub fn space(&self) -> AddressSpace<M, D> {
        AddressSpace::new(Arc::clone(&self.core))
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.core.device
    }

    /// The primary MMU.
    #[must_use]
    pub fn mm(&self) -> &M {
        &self.core.mm
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let counters = &self.core.counters;
        Stats {
            got: counters.got.load(Ordering::Relaxed),
            retried: counters.retried.load(Ordering::Relaxed),
            invalidated: counters.invalidated.load(Ordering::Relaxed),
        }
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + Model + 'static> Driver<M, D> {
    /// As [`object_at`](Self::object_at), of memory that a model has: no reference can be in the way.
    ///
    /// # Errors
    /// As for [`object`](Self::object).
    pub fn object_of(&self, range: Range, flags: Flags) -> Result<Object<M, D>, ObjectError> {
        Object::new(&self.core, (range.start(), range.len()), None, flags)
    }
}

impl<M: PrimaryMmu, D: Device<M> + Engine> Clone for Driver<M, D> {
    fn clone(&self) -> Self {
        Driver { core: Arc::clone(&self.core) }
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static> fmt::Debug for Driver<M, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
