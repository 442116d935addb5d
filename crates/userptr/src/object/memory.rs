// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory in the hands of a device, and handing it a batch: all that is `unsafe` about objects.
//!
//! The argument, in one place. A batch reaches no byte but those of the objects in its list ([`super::submit`] leads each
//! address through them, [`Engine`] and [`Device`](crate::device::Device) promise to access nothing else). An object's
//! bytes are its own ([`Buffer`]), and nobody has a reference to them but who borrows the object mutably, which no
//! list can name meanwhile; or their owner has promised as much ([`super::Driver::object_at`]). A batch is attached to
//! its objects before it is submitted, and an object's bytes are lent or freed after its batches are done.

use std::ptr::NonNull;

use interleave::MaySleep;

use crate::device::{Command, Engine, SubmitError};

/// Bytes that are given to an object. Not a `Box`, which would claim that nobody else writes them.
pub(super) struct Buffer(NonNull<[u8]>);

// SAFETY: it owns plain bytes.
unsafe impl Send for Buffer {}
// SAFETY: shared, it lends nothing.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub(super) fn new(bytes: Box<[u8]>) -> Buffer {
        Buffer(NonNull::from(Box::leak(bytes)))
    }

    /// The first byte's address, and how many there are.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.0.as_ptr().expose_provenance() as u64, self.0.len() as u64)
    }

    /// The bytes, with no device at work on them.
    ///
    /// # Safety
    /// No batch that names their object is in flight, nor will be while they are lent.
    pub(super) unsafe fn lend(&mut self) -> &mut [u8] {
        // SAFETY: from a `Box` that is ours; the caller answers for the device.
        unsafe { self.0.as_mut() }
    }

    /// The bytes back.
    ///
    /// # Safety
    /// No batch that names their object is in flight, nor will be.
    pub(super) unsafe fn take(self) -> Box<[u8]> {
        // SAFETY: from `Box::leak`, and `self` is gone; the caller answers for the device.
        unsafe { Box::from_raw(self.0.as_ptr()) }
    }
}

/// Hands over a batch.
///
/// # Safety
/// It reaches bytes of objects alone, to which it is attached.
pub(super) unsafe fn submit<E: Engine>(
    cx: &mut MaySleep<'_>,
    engine: &E,
    batch: &[Command],
) -> Result<E::Fence, SubmitError> {
    // SAFETY: see the module; until the batch is done nobody has a reference to what it writes, nor writes what it reads.
    unsafe { engine.submit(cx, batch) }
}
