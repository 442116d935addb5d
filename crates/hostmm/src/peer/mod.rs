// SPDX-License-Identifier: MIT OR Apache-2.0
//! What others have built for the same purpose, to be measured beside ours. Nothing here is needed by anybody else.
//!
//! A peer is loaded at run time, in a process of its own: it may patch the C library of the process that it is in.

mod memory;
pub mod ucx;

pub use memory::Anonymous;
