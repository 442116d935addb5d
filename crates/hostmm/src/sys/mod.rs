// SPDX-License-Identifier: MIT OR Apache-2.0
//! Raw system interfaces: the crate's `unsafe` lives here, one file per interface.

pub(crate) mod bpf;
pub(crate) mod lab;
pub(crate) mod later;
pub(crate) mod map;
pub(crate) mod mm;
pub(crate) mod perf;
pub(crate) mod probe;
pub(crate) mod procmap;
pub(crate) mod ringbuf;
pub(crate) mod signal;
pub(crate) mod swap;
#[cfg(test)]
pub(crate) mod test_memory;
pub(crate) mod tracefs;
pub(crate) mod uffd;
pub(crate) mod uring;
pub(crate) mod user;
pub(crate) mod vm;
pub(crate) mod wipe;
