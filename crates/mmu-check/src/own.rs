// SPDX-License-Identifier: MIT OR Apache-2.0
//! All that a driver of one's own and its test need, in one `use mmu_check::own::*`; docs/tutorial.md goes through it.

pub use crate::check::{Check, Checked, check};
pub use crate::oracle::Rule;
pub use drivers::{Holds, Mirror, Port};
pub use interleave::{LockClass, MaySleep, Mutex, SpinLock};
pub use mmu_notifier::{Access, Invalidation, PageAddr, Range, Seq, SeqMoved, SetSeq};
pub use softmm::{FaultError, KernelProfile, UserPages};
