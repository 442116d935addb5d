// SPDX-License-Identifier: MIT OR Apache-2.0
//! hostmm.

pub mod barrier;
pub mod capability;
pub mod child;
pub mod disturb;
pub mod kvm;
pub mod page;
pub mod pin;
pub mod primary;
pub mod race;
pub mod setting;
mod sys;
#[doc(hidden)]
pub mod testing;
pub mod uffd;
