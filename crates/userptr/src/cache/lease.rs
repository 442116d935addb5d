// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases: the right to use a registration until they are dropped.

use mmu_notifier::Access;
use mmu_notifier::primary::{PrimaryMmu, Subscription};

use super::core::{Core, Leased, Registration};
use crate::device::{Device, DeviceAddr};

/// A registration that contains the bytes asked for, until it is dropped. May be sent to and dropped in any thread.
///
/// It keeps pages registered, not mapped: the memory behind the addresses can still be given up, and then the device
/// goes on with the old pages until the lease is dropped ([`is_current`](Lease::is_current)).
#[must_use]
pub struct Lease<'c, M: PrimaryMmu, D: Device<M>> {
    core: &'c Core<M, D>,
    /// `None` only while it is dropped.
    held: Option<Leased<'c, M, D>>,
    addr: u64,
    len: u64,
}

impl<'c, M: PrimaryMmu, D: Device<M>> Lease<'c, M, D> {
    #[inline(always)]
    pub(super) fn new(core: &'c Core<M, D>, held: Leased<'c, M, D>, addr: u64, len: u64) -> Self {
        Lease { core, held: Some(held), addr, len }
    }

    #[inline(always)]
    fn registration(&self) -> &Registration<M, D> {
        match &self.held {
            Some(held) => held.body(),
            None => unreachable!("a lease that is being dropped is not asked"),
        }
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
    pub fn rights(&self) -> Access {
        self.registration().rights
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
        let base = self.core.device.address(self.mapping());
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

impl<M: PrimaryMmu, D: Device<M>> Drop for Lease<'_, M, D> {
    #[inline(always)]
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        let index = held.index();
        if held.body().watched.is_none() {
            return self.core.end_one_shot(held);
        }
        drop(held);
        // After the release: a reaper that was faster than it must look again.
        self.core.ended(index);
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
