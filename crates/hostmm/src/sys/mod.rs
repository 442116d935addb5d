// SPDX-License-Identifier: MIT OR Apache-2.0
//! Raw system interfaces: the crate's `unsafe` lives here, one file per interface.
pub(crate) mod probe;
pub(crate) mod procmap;
pub(crate) mod swap;
#[cfg(test)]
pub(crate) mod test_memory;
pub(crate) mod uring;
pub(crate) mod user;
