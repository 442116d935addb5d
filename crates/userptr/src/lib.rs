// SPDX-License-Identifier: MIT OR Apache-2.0
//! Share ordinary memory with a device, and never let it touch a page that the program has given up.
//!
//! A device (an io_uring, a network card, a GPU) keeps a translation of the memory that it is given. The program unmaps,
//! moves or replaces the memory, its allocator does, another process truncates the file behind it, and the device goes
//! on with the old pages. This crate asks the kernel's own notifications before a translation is used again.
//!
//! ```no_run
//! use std::fs::File;
//! use userptr::cache::Options;
//! use userptr::device::io_uring::IoUring;
//! use userptr::{RegistrationCache, source};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let cache = RegistrationCache::new(source::open_mm(1)?, IoUring::new(1024)?, Options::default())?;
//! let mut buffer = vec![0_u8; 1 << 16]; // ordinary memory, from malloc
//! let file = File::open("data")?;
//! for block in 0..1000 {
//!     // Registered once; then some twenty nanoseconds. `buffer` cannot be freed or looked at meanwhile.
//!     let mut lease = cache.lease_mut(&mut buffer)?;
//!     let bytes = cache.device().read_at(&file, block << 16, &mut lease)?;
//!     drop(lease);
//!     println!("{bytes} bytes, the first is {}", buffer[0]);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | to do this | use |
//! |---|---|
//! | register memory again and again for nanoseconds | [`RegistrationCache`] |
//! | look up many ranges at once | [`cache::Session`] |
//! | hold a lease in a thread or a future | [`cache::OwnedLease`], [`cache::VecLease`] |
//! | have hits verified | [`cache::Options::audit`] |
//! | have the best source of changes | [`source::open_mm`] |
//! | bind memory in a device's address spaces, and run batches on it | [`object`] |
//! | give memory to an io_uring | [`device::io_uring`] |
//! | write a device | [`device::Device`] |
//!
//! Everything is generic over the primary MMU ([`mmu_notifier::PrimaryMmu`]), so that a checker runs the very same code
//! over a software mm.
//!
//! `unsafe` is in the device files, which talk to the kernel, in the leases of the cache, and where an object lends
//! its bytes or a batch is handed over.

pub mod cache;
pub mod device;
pub mod object;
pub mod source;
mod sync;

pub use cache::{CacheError, Lease, RegistrationCache};

/// The programs in these pages compile.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../../docs/cache.md")]
    struct Cache;
    #[doc = include_str!("../../../README.md")]
    struct Readme;
}
