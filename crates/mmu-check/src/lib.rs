// SPDX-License-Identifier: MIT OR Apache-2.0
//! Is a driver of a secondary MMU right, whatever the mm does and in whatever order? Computed, not argued.
#![forbid(unsafe_code)]

pub mod diff;
