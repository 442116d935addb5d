// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a range cannot be leased, or a cache not be made.

use interleave::AtomicContext;
use mmu_notifier::{Gone, Range, RangeError};

use crate::device::DeviceError;

/// Why there is no lease. Nothing is held then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// No byte, or not in user space.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// This is a forked child: registrations are of the parent's memory.
    #[error("the cache was made before fork and is of the parent's memory: make another in the child")]
    Forked,
    /// Every entry, or the bytes allowed, are taken by registrations that are leased.
    #[error(
        "no room for {range}: {bytes} of {limit} bytes and {entries} of {max} entries are held, and what is not \
         leased was let go: drop leases, or make a cache with more"
    )]
    Full {
        /// What was to be registered.
        range: Range,
        /// Held by the device now.
        bytes: u64,
        /// [`Options::bytes`](super::Options::bytes).
        limit: u64,
        /// Held by the device now.
        entries: usize,
        /// [`Options::entries`](super::Options::entries).
        max: usize,
    },
    /// An audit found that the device sees something else than the program, and the source told of no change. The
    /// registration is out of use now.
    #[error(
        "a hit is stale: at {at:#x} of {range} the device sees another page than the program, and the source told of \
         no change. If the program changes memory in a way that the source cannot hear, it must call invalidate"
    )]
    Stale {
        /// What is registered.
        range: Range,
        /// The first address found different.
        at: u64,
    },
    /// The device does not take it: nothing mapped there, no memory, too long.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The source of changes is gone.
    #[error(transparent)]
    Source(#[from] Gone),
    /// What is not in the cache takes system calls to register.
    #[error("the range is not in the cache, and to register it sleeps: {0}")]
    Atomic(#[from] AtomicContext),
}

/// Why a cache is not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Room for nothing.
    #[error(
        "a cache of {entries} entries and {bytes} bytes holds nothing: allow at least one page in one entry"
    )]
    Empty {
        /// Entries, no more than the device has.
        entries: usize,
        /// Bytes.
        bytes: u64,
    },
    /// No thread for the reaper.
    #[error("the reaper thread cannot be started: {0}; or use Reaper::Manual")]
    Thread(#[source] std::io::Error),
}
