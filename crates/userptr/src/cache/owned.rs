// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases that borrow nothing: for threads that outlive their parent's stack frame, for futures, for queues of work.
//!
//! A [`Lease`] borrows the cache, and a [`SliceMutLease`](super::SliceMutLease) also the bytes. That is free, and the
//! compiler sees to it that neither goes while the device may use it:
//!
//! ```compile_fail,E0505
//! # use userptr::cache::Options;
//! # use userptr::device::io_uring::IoUring;
//! # use userptr::{RegistrationCache, source};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let cache = RegistrationCache::new(source::open_mm(1)?, IoUring::new(4)?, Options::default())?;
//! let mut bytes = vec![0_u8; 4096];
//! let lease = cache.lease_mut(&mut bytes)?;
//! drop(bytes); // error[E0505]: cannot move out of `bytes` because it is borrowed
//! drop(lease);
//! # Ok(())
//! # }
//! ```
//!
//! For the same reason it cannot be given away:
//!
//! ```compile_fail,E0597
//! # use userptr::cache::Options;
//! # use userptr::device::io_uring::IoUring;
//! # use userptr::{RegistrationCache, source};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let cache = RegistrationCache::new(source::open_mm(1)?, IoUring::new(4)?, Options::default())?;
//! let bytes = vec![0_u8; 4096];
//! let lease = cache.lease(&bytes)?;
//! std::thread::Builder::new().spawn(move || drop(lease))?; // error[E0597]: `cache` does not live long enough
//! # Ok(())
//! # }
//! ```
//!
//! An owned lease holds the cache by its `Arc`, and [`VecLease`] the bytes themselves:
//!
//! ```no_run
//! # use std::{fs::File, sync::Arc};
//! # use userptr::cache::Options;
//! # use userptr::device::io_uring::IoUring;
//! # use userptr::{RegistrationCache, source};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let cache = RegistrationCache::new(source::open_mm(1)?, IoUring::new(4)?, Options::default())?;
//! # let file = File::open("data")?;
//! let cache = Arc::new(cache);
//! let mut lease = cache.lease_vec(vec![0_u8; 4096])?;
//! let reader = std::thread::Builder::new().spawn(move || {
//!     let read = lease.cache().clone().device().read_at(&file, 0, &mut lease);
//!     (lease.into_bytes(), read)
//! })?;
//! let (bytes, read) = reader.join().expect("it does not panic");
//! println!("{} bytes of {}", read?, bytes.len());
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::sync::Arc;

use mmu_notifier::Access;
use mmu_notifier::primary::PrimaryMmu;

use super::lease::sealed::Sealed;
use super::{CacheError, Lease, LeaseMut, RegistrationCache};
use crate::device::Device;

/// A [`Lease`] that keeps its cache alive instead of borrowing it.
#[must_use]
pub struct OwnedLease<M: PrimaryMmu + 'static, D: Device<M> + 'static> {
    /// Dropped first. Of `cache`; never lent for longer than `self` is borrowed.
    lease: Lease<'static, M, D>,
    cache: Arc<RegistrationCache<M, D>>,
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> OwnedLease<M, D> {
    fn new(
        cache: Arc<RegistrationCache<M, D>>,
        addr: usize,
        len: usize,
        access: Access,
    ) -> Result<Self, CacheError> {
        // SAFETY: `cache` keeps what the reference is to where it is, and is dropped after the lease, which is all
        // that the reference is given to.
        let borrowed: &'static RegistrationCache<M, D> = unsafe { &*Arc::as_ptr(&cache) };
        Ok(OwnedLease { lease: borrowed.get(addr, len, access)?, cache })
    }

    /// The lease.
    pub fn lease(&self) -> &Lease<'_, M, D> {
        &self.lease
    }

    /// The cache that it is of.
    pub fn cache(&self) -> &Arc<RegistrationCache<M, D>> {
        &self.cache
    }
}

/// Bytes of its own that are leased for the device to write. [`into_bytes`](VecLease::into_bytes) gives them back.
#[must_use]
pub struct VecLease<M: PrimaryMmu + 'static, D: Device<M> + 'static> {
    /// Dropped first.
    lease: OwnedLease<M, D>,
    /// Never reallocated: what it holds stays where it is when the vector itself is moved.
    bytes: Vec<u8>,
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> VecLease<M, D> {
    /// The bytes, between transfers.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, between transfers.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The lease.
    pub fn lease(&self) -> &Lease<'_, M, D> {
        self.lease.lease()
    }

    /// The cache that it is of.
    pub fn cache(&self) -> &Arc<RegistrationCache<M, D>> {
        self.lease.cache()
    }

    /// Ends the lease.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        drop(self.lease);
        self.bytes
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> Sealed for VecLease<M, D> {}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> LeaseMut<M, D> for VecLease<M, D> {
    fn lease(&self) -> &Lease<'_, M, D> {
        self.lease()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}

/// Why bytes are not leased, and the bytes.
#[derive(thiserror::Error)]
#[error("{error}")]
pub struct NotLeased {
    /// Why.
    #[source]
    pub error: CacheError,
    /// As they were.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for NotLeased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NotLeased").field("error", &self.error).field("bytes", &self.bytes.len()).finish()
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> RegistrationCache<M, D> {
    /// As [`get`](Self::get), for longer than the cache is borrowed.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn get_owned(
        self: &Arc<Self>,
        addr: usize,
        len: usize,
        access: Access,
    ) -> Result<OwnedLease<M, D>, CacheError> {
        OwnedLease::new(Arc::clone(self), addr, len, access)
    }

    /// As [`lease_mut`](Self::lease_mut), of bytes that are given away meanwhile.
    ///
    /// # Errors
    /// [`NotLeased`], with the bytes.
    pub fn lease_vec(self: &Arc<Self>, mut bytes: Vec<u8>) -> Result<VecLease<M, D>, NotLeased> {
        let addr = bytes.as_mut_ptr().expose_provenance();
        match self.get_owned(addr, bytes.len(), Access::Write) {
            Ok(lease) => Ok(VecLease { lease, bytes }),
            Err(error) => Err(NotLeased { error, bytes }),
        }
    }
}
