// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is asked of a device, and what it answers.

use mmu_notifier::{Access, PageAddr};
use softmm::FrameFreed;

/// Names what a driver has bound (a GEM object, a memslot, a memory region) within its context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Binding(pub u32);

/// What a device does to one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceOp {
    /// Reads the word at this address.
    Read(u64),
    /// Writes a value to the word at this address.
    Write(u64, u64),
}

impl DeviceOp {
    /// Where: the address in the process, a multiple of 8.
    pub const fn addr(self) -> u64 {
        match self {
            DeviceOp::Read(addr) | DeviceOp::Write(addr, _) => addr,
        }
    }

    /// How.
    pub const fn access(self) -> Access {
        match self {
            DeviceOp::Read(_) => Access::Read,
            DeviceOp::Write(..) => Access::Write,
        }
    }
}

/// Why an access did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceFault {
    /// No translation, or one that does not allow the access.
    #[error(
        "the device has no translation of {page:?} for {access:?}: bind it, and do not use it after unbinding"
    )]
    NoTranslation {
        /// The page.
        page: PageAddr,
        /// The access.
        access: Access,
    },
    /// The translation led to a page that was freed: the driver is broken.
    #[error("the device used a freed page: {0}")]
    Freed(#[from] FrameFreed),
    /// The fault was resolved again and again, and each time the translation was gone.
    #[error(
        "the device gave up on {page:?} after {faults} faults: no progress between an invalidation's start and end?"
    )]
    GaveUp {
        /// The page.
        page: PageAddr,
        /// How often it faulted.
        faults: u32,
    },
    /// The driver could not resolve the fault: the process has no such memory.
    #[error("the device faulted on {page:?} and the process has no such memory: {source}")]
    Refused {
        /// The page.
        page: PageAddr,
        /// What get_user_pages said.
        source: softmm::FaultError,
    },
    /// No such request in this context.
    #[error("request {0} does not exist, or its result has been taken")]
    NoRequest(u64),
}
