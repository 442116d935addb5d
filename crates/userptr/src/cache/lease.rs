// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases: the right to use a registration until they are dropped.

use interleave::{AtomicQuad, Here};
use mmu_notifier::Access;
use mmu_notifier::primary::PrimaryMmu;

use super::core::{Core, Leased, Registration};
use super::head::WRITE;
use super::slab::{Claim, State};
use crate::device::{Device, DeviceAddr};

/// A registration that contains the bytes asked for, until it is dropped. May be sent to and dropped in any thread.
///
/// It keeps pages registered, not mapped: the memory behind the addresses can still be given up, and then the device
/// goes on with the old pages until the lease is dropped ([`is_current`](Lease::is_current)).
#[must_use]
pub struct Lease<'c, M: PrimaryMmu, D: Device<M>> {
    core: &'c Core<M, D>,
    /// The words of the entry.
    words: AtomicQuad<'c>,
    /// `None` once it has ended.
    claim: Option<Claim<'c>>,
    addr: u64,
    len: u64,
    until: Until,
}

/// How long a registration stays. (A whole word, for the reason that the claim is made of such.)
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
enum Until {
    /// Something changes, or its place is wanted.
    Changed,
    /// This lease ends.
    Lease,
}

impl<'c, M: PrimaryMmu, D: Device<M>> Lease<'c, M, D> {
    /// Of something that was found.
    #[inline(always)]
    pub(super) fn of_hit(core: &'c Core<M, D>, found: Claim<'c>, addr: u64, len: u64) -> Self {
        Lease {
            core,
            words: core.slab.words(found.index()),
            claim: Some(found),
            addr,
            len,
            until: Until::Changed,
        }
    }

    /// Of something that may be for this lease only.
    pub(super) fn of_new(core: &'c Core<M, D>, held: Leased<'c, M, D>, addr: u64, len: u64) -> Self {
        let until = if held.body().watched.is_some() { Until::Changed } else { Until::Lease };
        let mut lease = Lease::of_hit(core, held.claim(), addr, len);
        lease.until = until;
        lease
    }

    fn registration(&self) -> &Registration<M, D> {
        self.core.slab.body(self.claim())
    }

    fn claim(&self) -> &Claim<'c> {
        self.claim.as_ref().unwrap_or_else(|| unreachable!("it ends when it is dropped"))
    }

    pub(super) fn into_claim(mut self) -> Claim<'c> {
        self.claim.take().unwrap_or_else(|| unreachable!("it ends when it is dropped"))
    }

    pub(super) fn index(&self) -> u32 {
        self.claim().index()
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
        let write = State::of(Here::ask(), self.words).has(WRITE);
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
    fn end(&self, here: Here, words: AtomicQuad<'_>, claim: Claim<'_>, until: Until) {
        let index = claim.index();
        self.slab.end(here, claim);
        match until {
            // After the end: a reaper that was faster than it must look again.
            Until::Changed => self.ended(here, words),
            Until::Lease => self.end_one_shot(index),
        }
    }

    #[cold]
    #[inline(never)]
    fn end_explored(&self, words: AtomicQuad<'_>, claim: Claim<'_>, until: Until) {
        self.end(Here::ask(), words, claim, until);
    }
}

impl<M: PrimaryMmu, D: Device<M>> Drop for Lease<'_, M, D> {
    /// Parts are given on, never `self`: what nobody has the address of need not be in memory.
    #[inline(always)]
    fn drop(&mut self) {
        let Some(claim) = self.claim.take() else { return };
        let here = Here::ask();
        if here.is_plain() {
            self.core.end(here, self.words, claim, self.until);
        } else {
            self.core.end_explored(self.words, claim, self.until);
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
