// SPDX-License-Identifier: MIT OR Apache-2.0
//! Share ordinary memory with a device, and never let it touch a page that the program has given up.
pub mod cache;
pub mod device;
mod sync;

pub use cache::{CacheError, Lease, Options, RegistrationCache};
