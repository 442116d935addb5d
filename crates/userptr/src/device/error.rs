// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a device does not take a range.

use mmu_notifier::{GupError, Range};

use super::DeviceAddr;

/// Why a device does not take a range.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The pages cannot be got.
    #[error(transparent)]
    Pages(#[from] GupError),
    /// Longer than a mapping may be.
    #[error(
        "{range} is longer than the {limit} bytes that one mapping of the device can hold: map it in parts"
    )]
    TooLong {
        /// What was to be mapped.
        range: Range,
        /// Bytes.
        limit: u64,
    },
    /// Every mapping that the device can have is taken.
    #[error("the device has no room for {range}: {why}")]
    Full {
        /// What was to be mapped.
        range: Range,
        /// Which resource, and how to get more.
        why: String,
    },
    /// The device addresses are taken or do not exist.
    #[error("{range} cannot be mapped at device address {at}: {why}")]
    Address {
        /// What was to be mapped.
        range: Range,
        /// Where.
        at: DeviceAddr,
        /// What is in the way.
        why: String,
    },
    /// The device is of the parent process.
    #[error("the device was opened before fork and serves the parent's memory: open another in the child")]
    Forked,
    /// The device does not work (any more).
    #[error("the device failed on {range}: {source}")]
    Broken {
        /// What was to be mapped.
        range: Range,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
