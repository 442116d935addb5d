// SPDX-License-Identifier: MIT OR Apache-2.0
//! Raw system interfaces, one file each. Nothing here knows what it is used for.

pub(crate) mod bpf;
pub(crate) mod map;
pub(crate) mod perf;
pub(crate) mod ringbuf;
pub(crate) mod tracefs;
pub(crate) mod vm;
pub(crate) mod wipe;
