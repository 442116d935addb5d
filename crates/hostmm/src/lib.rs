// SPDX-License-Identifier: MIT OR Apache-2.0
//! hostmm.

pub mod kvm;
mod sys;
