// SPDX-License-Identifier: MIT OR Apache-2.0
//! hostmm.

pub mod capability;
pub mod race;
mod sys;
#[doc(hidden)]
pub mod testing;
pub mod uffd;
