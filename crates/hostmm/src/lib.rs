// SPDX-License-Identifier: MIT OR Apache-2.0
//! hostmm.

pub mod capability;
pub mod disturb;
mod sys;
#[doc(hidden)]
pub mod testing;
