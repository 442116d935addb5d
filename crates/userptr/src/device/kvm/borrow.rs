// SPDX-License-Identifier: MIT OR Apache-2.0
//! A batch on borrowed memory: the device without `unsafe`.
//!
//! What the device may touch is borrowed from before the batch is submitted until the device is through with it, and
//! every command is held against the borrowed bytes, to the byte: what else is in their first and last page is
//! never touched.

use std::marker::PhantomData;

use interleave::MaySleep;
use mmu_notifier::{Access, Range, RangeError};

use super::context::{KvmContext, KvmMapping};
use crate::device::{Command, CommandError, DeviceAddr, DeviceError, Engine, Fence, FenceError, SubmitError};

/// Commands for a [`KvmContext`], with the memory that they are about. Dropped without [`run`](KvmBatch::run), it does
/// nothing.
///
/// ```no_run
/// # use userptr::device::{Command, kvm::{KvmDevice, Polling}};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = KvmDevice::open(Polling::default())?;
/// let context = device.context()?;
/// let (from, mut to) = (vec![1_u8; 10_000], vec![0_u8; 10_000]);
/// let mut batch = context.batch();
/// let src = batch.source(&from)?;
/// let dst = batch.target(&mut to)?;
/// batch.push(Command::Copy { dst, src, len: 10_000 })?;
/// batch.run()?;
/// assert_eq!(to, from);
/// # Ok(())
/// # }
/// ```
///
/// The memory stays borrowed until the batch is gone:
/// ```compile_fail,E0505
/// # fn f(context: &userptr::device::kvm::KvmContext) {
/// let mut to = vec![0_u8; 10];
/// let mut batch = context.batch();
/// let dst = batch.target(&mut to);
/// drop(to);
/// let _ = batch.run();
/// # }
/// ```
#[derive(Debug)]
pub struct KvmBatch<'c, 'm> {
    context: &'c KvmContext,
    buffers: Vec<Buffer>,
    commands: Vec<Command>,
    memory: PhantomData<&'m mut [u8]>,
}

/// Borrowed bytes and where the device has them.
#[derive(Debug)]
struct Buffer {
    at: DeviceAddr,
    len: u64,
    access: Access,
    /// Taken away on drop of the batch.
    mapping: Option<KvmMapping>,
}

/// Why a batch on borrowed memory did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// The bytes are nowhere that a device could reach.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The memory could not be mapped.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The command makes no sense.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The command reaches bytes that the batch has not borrowed, or not so.
    #[error("{command:?}: the batch has not borrowed {len} bytes at device address {addr} for {access:?}")]
    NotBorrowed {
        /// Which command.
        command: Command,
        /// The first of the bytes.
        addr: DeviceAddr,
        /// How many.
        len: u64,
        /// What for.
        access: Access,
    },
    /// The batch could not be handed over.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The batch did not come to its end.
    #[error(transparent)]
    Fence(#[from] FenceError),
}

impl KvmContext {
    /// An empty batch on memory to be borrowed.
    #[must_use]
    pub fn batch<'m>(&self) -> KvmBatch<'_, 'm> {
        KvmBatch { context: self, buffers: Vec::new(), commands: Vec::new(), memory: PhantomData }
    }
}

impl<'m> KvmBatch<'_, 'm> {
    /// Borrows `bytes` for reading. Where the device has the first of them. May sleep.
    ///
    /// # Errors
    /// [`BatchError::Range`] for no bytes, [`BatchError::Device`].
    pub fn source(&mut self, bytes: &'m [u8]) -> Result<DeviceAddr, BatchError> {
        self.borrow(bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64, Access::Read)
    }

    /// Borrows `bytes` for reading and writing. Where the device has the first of them. May sleep.
    ///
    /// # Errors
    /// [`BatchError::Range`] for no bytes, [`BatchError::Device`].
    pub fn target(&mut self, bytes: &'m mut [u8]) -> Result<DeviceAddr, BatchError> {
        self.borrow(bytes.as_mut_ptr().expose_provenance() as u64, bytes.len() as u64, Access::Write)
    }

    fn borrow(&mut self, start: u64, len: u64, access: Access) -> Result<DeviceAddr, BatchError> {
        let range = Range::enclosing(start, len)?;
        let mapping = MaySleep::enter(|cx| self.context.map_range(cx, range, access, None))?;
        let at = DeviceAddr(mapping.address().0 + (start - range.start()));
        self.buffers.push(Buffer { at, len, access, mapping: Some(mapping) });
        Ok(at)
    }

    /// Adds a command.
    ///
    /// # Errors
    /// [`BatchError::Command`]; [`BatchError::NotBorrowed`] unless all that it reads and writes is borrowed so. The
    /// command is not added then.
    pub fn push(&mut self, command: Command) -> Result<(), BatchError> {
        command.check()?;
        for (addr, len, access) in command.spans() {
            let covers = |buffer: &Buffer| {
                let offset = addr.0.checked_sub(buffer.at.0);
                let inside = offset.is_some_and(|offset| offset <= buffer.len && len <= buffer.len - offset);
                inside && (access == Access::Read || buffer.access == Access::Write)
            };
            if len != 0 && !self.buffers.iter().any(covers) {
                return Err(BatchError::NotBorrowed { command, addr, len, access });
            }
        }
        self.commands.push(command);
        Ok(())
    }

    /// Executes the commands in order, waits until they are done, and gives the memory back.
    ///
    /// # Errors
    /// [`BatchError::Submit`], [`BatchError::Fence`].
    pub fn run(self) -> Result<(), BatchError> {
        MaySleep::enter(|cx| {
            // SAFETY: the commands write bytes of which the batch has the only reference, and read bytes that nobody writes;
            // `self` holds these borrows until `drop`, which waits until the device is through.
            let fence = unsafe { self.context.submit(cx, &self.commands) }?;
            Ok(fence.wait(cx)?)
        })
    }
}

impl Drop for KvmBatch<'_, '_> {
    fn drop(&mut self) {
        MaySleep::enter(|cx| {
            for mapping in self.buffers.iter_mut().filter_map(|buffer| buffer.mapping.take()) {
                self.context.unmap_range(cx, mapping);
            }
        });
    }
}
