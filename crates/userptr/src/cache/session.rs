// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many lookups for the price of one question to the source.

use mmu_notifier::Access;
use mmu_notifier::primary::PrimaryMmu;

use super::{CacheError, Lease, RegistrationCache};
use crate::device::Device;

/// Lookups of memory that the caller had when the session began: each is as strict as
/// [`RegistrationCache::get`] about it, and costs a few loads whatever the source.
///
/// Memory that was mapped after it began needs another session: an address that this thread was given later may be
/// one that somebody else is only now giving back.
#[derive(Clone, Copy)]
pub struct Session<'c, M: PrimaryMmu + 'static, D: Device<M> + 'static> {
    cache: &'c RegistrationCache<M, D>,
}

impl<'c, M: PrimaryMmu + 'static, D: Device<M> + 'static> Session<'c, M, D> {
    pub(super) fn new(cache: &'c RegistrationCache<M, D>) -> Result<Self, CacheError> {
        cache.settle()?;
        Ok(Session { cache })
    }

    /// As [`RegistrationCache::get`].
    ///
    /// # Errors
    /// [`CacheError`].
    #[inline(always)]
    pub fn get(&self, addr: usize, len: usize, access: Access) -> Result<Lease<'c, M, D>, CacheError> {
        self.cache.get_ordered(addr, len, access)
    }
}
