// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases: the right to use a registration until they are dropped.

use mmu_notifier::Access;
use mmu_notifier::primary::{PrimaryMmu, Subscription};

use super::core::{Core, Leased, Registration, WRITE};
use crate::device::{Device, DeviceAddr};

/// A registration that contains the bytes asked for, until it is dropped. May be sent to and dropped in any thread.
///
/// It keeps pages registered, not mapped: the memory behind the addresses can still be given up, and then the device
/// goes on with the old pages until the lease is dropped ([`is_current`](Lease::is_current)).
#[must_use]
pub struct Lease<'c, M: PrimaryMmu, D: Device<M>> {
    /// Released first.
    held: Leased<'c, M, D>,
    end: End<'c, M, D>,
    addr: u64,
    len: u64,
}

impl<'c, M: PrimaryMmu, D: Device<M>> Lease<'c, M, D> {
    /// Of something that was found.
    #[inline(always)]
    pub(super) fn of_hit(core: &'c Core<M, D>, held: Leased<'c, M, D>, addr: u64, len: u64) -> Self {
        let end = End { core, index: held.index(), alone: false };
        Lease { held, end, addr, len }
    }

    /// Of something that may be for this lease only.
    pub(super) fn of_new(core: &'c Core<M, D>, held: Leased<'c, M, D>, addr: u64, len: u64) -> Self {
        let end = End { core, index: held.index(), alone: held.body().watched.is_none() };
        Lease { held, end, addr, len }
    }

    #[inline(always)]
    fn registration(&self) -> &Registration<M, D> {
        self.held.body()
    }

    pub(super) fn index(&self) -> u32 {
        self.held.index()
    }

    /// The first byte asked for.
    pub fn addr(&self) -> usize {
        self.addr as usize
    }

    /// How many were asked for.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// What the device may do with them: at least what was asked for.
    #[inline]
    pub fn rights(&self) -> Access {
        // A hit need not have looked at the registration; the mark says the same.
        let write = self.end.core.slab.state(self.held.index()).has(WRITE);
        if write { Access::Write } else { Access::Read }
    }

    /// What the device has mapped, which may be more than was asked for.
    pub fn mapping(&self) -> &D::Mapping {
        &self.registration().mapping
    }

    /// The pages that are registered.
    pub fn registered(&self) -> mmu_notifier::Range {
        self.registration().range
    }

    /// The device address of the first byte asked for.
    pub fn device_addr(&self) -> DeviceAddr {
        let base = self.end.core.device.address(self.mapping());
        DeviceAddr(base.0 + (self.addr - self.registration().range.start()))
    }

    /// Has the range not changed since it was registered? Of a registration for one lease nobody knows: false.
    pub fn is_current(&self) -> bool {
        self.registration().watched.as_ref().is_some_and(|w| !w.subscription.read_retry(w.seq))
    }

    /// Is it in the cache? If not, it was registered for this lease.
    pub fn is_cached(&self) -> bool {
        self.registration().watched.is_some()
    }
}

/// What is to be done when a lease has been released: apart, so that to drop a lease is inlined.
struct End<'c, M: PrimaryMmu, D: Device<M>> {
    core: &'c Core<M, D>,
    index: u32,
    /// The registration is for this lease and no more.
    alone: bool,
}

impl<M: PrimaryMmu, D: Device<M>> Drop for End<'_, M, D> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.alone {
            self.core.end_one_shot(self.index);
        } else {
            // After the release: a reaper that was faster than it must look again.
            self.core.ended(self.index);
        }
    }
}

/// A lease of bytes that are borrowed meanwhile.
#[must_use]
pub struct SliceLease<'c, 'b, M: PrimaryMmu, D: Device<M>> {
    lease: Lease<'c, M, D>,
    bytes: &'b [u8],
}

/// A lease of bytes that are borrowed mutably meanwhile.
#[must_use]
pub struct SliceMutLease<'c, 'b, M: PrimaryMmu, D: Device<M>> {
    lease: Lease<'c, M, D>,
    bytes: &'b mut [u8],
}

impl<'c, 'b, M: PrimaryMmu, D: Device<M>> SliceLease<'c, 'b, M, D> {
    pub(super) fn new(lease: Lease<'c, M, D>, bytes: &'b [u8]) -> Self {
        SliceLease { lease, bytes }
    }

    /// The bytes.
    pub fn bytes(&self) -> &'b [u8] {
        self.bytes
    }

    /// The lease.
    pub fn lease(&self) -> &Lease<'c, M, D> {
        &self.lease
    }
}

impl<'c, 'b, M: PrimaryMmu, D: Device<M>> SliceMutLease<'c, 'b, M, D> {
    pub(super) fn new(lease: Lease<'c, M, D>, bytes: &'b mut [u8]) -> Self {
        SliceMutLease { lease, bytes }
    }

    /// The bytes, between transfers.
    pub fn bytes(&self) -> &[u8] {
        self.bytes
    }

    /// The bytes, between transfers.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes
    }

    /// The lease.
    pub fn lease(&self) -> &Lease<'c, M, D> {
        &self.lease
    }
}

pub(super) mod sealed {
    pub trait Sealed {}
}

/// A lease with the only way to its bytes: what a device may write in safe code.
pub trait LeaseMut<M: PrimaryMmu, D: Device<M>>: sealed::Sealed {
    /// The lease.
    fn lease(&self) -> &Lease<'_, M, D>;

    /// The bytes, between transfers.
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl<M: PrimaryMmu, D: Device<M>> sealed::Sealed for SliceMutLease<'_, '_, M, D> {}

impl<M: PrimaryMmu, D: Device<M>> LeaseMut<M, D> for SliceMutLease<'_, '_, M, D> {
    fn lease(&self) -> &Lease<'_, M, D> {
        self.lease()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}
