// SPDX-License-Identifier: MIT OR Apache-2.0
//! The contract between a primary and a secondary MMU.

mod event;
mod interval;
mod invalidation;
mod pte;
mod range;

pub use event::Event;
pub use interval::{Cursor, IntervalIndex, Key, Overlaps};
pub use invalidation::{Invalidation, Owner};
pub use pte::{Access, Pfn, Pte};
pub use range::{PAGE_SHIFT, PAGE_SIZE, PageAddr, Range, RangeError, TASK_SIZE};
