// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why an object, a binding or a batch is refused.

use mmu_notifier::primary::{Gone, SubscribeError};
use mmu_notifier::{Access, GupError, Range, RangeError};

use crate::device::{Command, CommandError, DeviceAddr, DeviceError, SubmitError};

/// Why an object, a binding or a batch is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// No bytes, or none of a program.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The pages cannot be got (EFAULT: a hole, a mapping that does not allow it), or the device does not take them.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Nobody would tell of changes.
    #[error(transparent)]
    Subscribe(#[from] SubscribeError),
    /// The address space or its source is gone.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// Each time the pages had been got they had changed again (EAGAIN).
    #[error("the pages of the batch changed {attempts} times while they were being got: try again")]
    Unsettled {
        /// How often.
        attempts: u32,
    },
    /// The device address is taken or does not exist.
    #[error("{range} cannot be bound at device address {at:?}: {why}")]
    Address {
        /// The object's pages.
        range: Range,
        /// Where it was to be.
        at: Option<DeviceAddr>,
        /// What is in the way.
        why: &'static str,
    },
    /// Nothing is bound there.
    #[error("no object is bound with its first byte at device address {at}")]
    NothingBound {
        /// Where.
        at: DeviceAddr,
    },
    /// The object is of another driver.
    #[error("the object belongs to another device: make one for each device over the same memory")]
    OtherDevice,
    /// The program forked: object, device and memory are the parent's.
    #[error("the object belongs to the parent process: make another in this one")]
    Forked,
    /// The command makes no sense.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The command reaches bytes that are in no object of the batch's list, or not for this.
    #[error(
        "{command:?}: {len} bytes at device address {addr} are not in one object of the batch's list for {access:?}"
    )]
    NotBound {
        /// Which command.
        command: Command,
        /// The first of the bytes.
        addr: DeviceAddr,
        /// How many.
        len: u64,
        /// What for.
        access: Access,
    },
    /// The engine did not take the batch.
    #[error(transparent)]
    Submit(#[from] SubmitError),
}

impl From<GupError> for ObjectError {
    fn from(error: GupError) -> ObjectError {
        ObjectError::Device(error.into())
    }
}
