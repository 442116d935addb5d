// SPDX-License-Identifier: MIT OR Apache-2.0
//! The contract between a primary and a secondary MMU.

mod range;

pub use range::{PAGE_SHIFT, PAGE_SIZE, PageAddr, Range, RangeError, TASK_SIZE};
