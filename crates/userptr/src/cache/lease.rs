// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases: the right to use a registration until they are dropped.

use interleave::Here;
use mmu_notifier::Access;
use mmu_notifier::primary::PrimaryMmu;

use super::core::{Core, Registration};
use super::head::{ONCE, WRITE};
use super::hit::Hit;
use super::slab::Claim;
use crate::device::{Device, DeviceAddr};

/// A registration that contains the bytes asked for, until it is dropped. May be sent to and dropped in any thread.
///
/// It keeps pages registered, not mapped: the memory behind the addresses can still be given up, and then the device
/// goes on with the old pages until the lease is dropped ([`is_current`](Lease::is_current)).
#[must_use]
pub struct Lease<'c, M: PrimaryMmu, D: Device<M>> {
    core: &'c Core<M, D>,
    /// `None` once it has ended.
    hit: Option<Hit<'c>>,
    addr: u64,
    len: u64,
}

impl<'c, M: PrimaryMmu, D: Device<M>> Lease<'c, M, D> {
    /// Of something that was found.
    #[inline(always)]
    pub(super) fn of_hit(core: &'c Core<M, D>, hit: Hit<'c>, addr: u64, len: u64) -> Self {
        Lease { core, hit: Some(hit), addr, len }
    }

    fn registration(&self) -> &Registration<M, D> {
        self.core.slab.body(&self.hit().claim)
    }

    #[inline(always)]
    fn hit(&self) -> &Hit<'c> {
        self.hit.as_ref().unwrap_or_else(|| unreachable!("it ends when it is dropped"))
    }

    pub(super) fn into_claim(mut self) -> Claim<'c> {
        self.hit.take().unwrap_or_else(|| unreachable!("it ends when it is dropped")).claim
    }

    pub(super) fn index(&self) -> u32 {
        self.hit().claim.index()
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
        if self.hit().state.has(WRITE) { Access::Write } else { Access::Read }
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
        self.registration().device_addr(&self.core.device, self.addr)
    }

    /// Has the range not changed since it was registered? Of a registration for one lease nobody knows: false.
    pub fn is_current(&self) -> bool {
        self.registration().is_current()
    }

    /// Is it in the cache? If not, it was registered for this lease.
    pub fn is_cached(&self) -> bool {
        self.registration().watched.is_some()
    }
}

impl<M: PrimaryMmu, D: Device<M>> Core<M, D> {
    #[inline(always)]
    fn end(&self, here: Here, hit: Hit<'_>) {
        let index = hit.claim.index();
        self.slab.end(here, hit.claim);
        if hit.state.has(ONCE) {
            self.end_one_shot(index);
        } else {
            // After the end: a reaper that was faster than it must look again.
            self.ended(here, hit.words);
        }
    }

    #[cold]
    #[inline(never)]
    fn end_explored(&self, hit: Hit<'_>) {
        self.end(Here::ask(), hit);
    }
}

impl<M: PrimaryMmu, D: Device<M>> Drop for Lease<'_, M, D> {
    /// Parts are given on, never `self`: what nobody has the address of need not be in memory.
    #[inline(always)]
    fn drop(&mut self) {
        let Some(hit) = self.hit.take() else { return };
        let here = Here::ask();
        if here.is_plain() {
            self.core.end(here, hit);
        } else {
            self.core.end_explored(hit);
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
