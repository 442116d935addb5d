// SPDX-License-Identifier: MIT OR Apache-2.0
//! Raw system interfaces: the crate's `unsafe` lives here, one file per interface.

pub(crate) mod uffd;
