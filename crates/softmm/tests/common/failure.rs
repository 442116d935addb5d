// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which allocation an operation failed for, whatever it says it with.

use softmm::{
    AccessError, Allocation, ChangeError, FaultError, FileError, ForkError, OutOfMemory, Reclaim, UprobeError,
};

/// An error that may be for lack of memory.
pub(crate) trait Failure {
    /// `None`: it is for something else.
    fn allocation(&self) -> Option<Allocation>;
}

impl Failure for OutOfMemory {
    fn allocation(&self) -> Option<Allocation> {
        Some(match self {
            OutOfMemory::Frames => Allocation::Frame,
            OutOfMemory::Tables => Allocation::Table,
        })
    }
}

impl Failure for FaultError {
    fn allocation(&self) -> Option<Allocation> {
        if let FaultError::OutOfMemory(error) = self { error.allocation() } else { None }
    }
}

impl Failure for AccessError {
    fn allocation(&self) -> Option<Allocation> {
        if let AccessError::Fault(error) = self { error.allocation() } else { None }
    }
}

impl Failure for ChangeError {
    fn allocation(&self) -> Option<Allocation> {
        if let ChangeError::Fault(error) = self { error.allocation() } else { None }
    }
}

impl Failure for ForkError {
    fn allocation(&self) -> Option<Allocation> {
        if let ForkError::OutOfMemory(error) = self { error.allocation() } else { None }
    }
}

impl Failure for FileError {
    fn allocation(&self) -> Option<Allocation> {
        if let FileError::OutOfMemory(error) = self { error.allocation() } else { None }
    }
}

impl Failure for UprobeError {
    fn allocation(&self) -> Option<Allocation> {
        match self {
            UprobeError::OutOfMemory(error) => error.allocation(),
            UprobeError::File(error) => error.allocation(),
            _ => None,
        }
    }
}

impl Failure for Reclaim {
    fn allocation(&self) -> Option<Allocation> {
        (*self == Reclaim::NoSwap).then_some(Allocation::SwapSlot)
    }
}
