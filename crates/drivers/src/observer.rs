// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who looks on: the oracle of a checker is told of every access of a device, at the moment that it happens.

use crate::op::Binding;
use interleave::Atomic;
use mmu_notifier::{Access, PageAddr};
use softmm::{FrameFreed, FrameId, Mm};

/// One access of a device.
#[derive(Clone, Copy)]
pub struct DeviceAccess<'a> {
    /// Whose device.
    pub driver: &'static str,
    /// Whose memory it is meant to be.
    pub mm: &'a Mm,
    /// Which of the driver's bindings.
    pub binding: Binding,
    /// The page of the address space.
    pub page: PageAddr,
    /// The word in it.
    pub word: usize,
    /// Where the device's translation leads.
    pub frame: FrameId,
    /// Read or write.
    pub access: Access,
    /// Does the translation allow writes?
    pub writable: bool,
    /// What the translation is meant to follow.
    pub follows: Follows,
}

/// What a translation is meant to follow when the program itself gives the memory up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follows {
    /// The address.
    Address,
    /// The pages, for as long as they are bound (VFIO).
    Pages,
    /// The pages, from this moment on: it was asked for then, and is for one use.
    PagesSince(Moment),
}

/// A moment in an execution, as its [`Observer`] counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

/// A rule that a driver broke against itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum DriverBug {
    /// A callback took a reference on an object whose count was zero already.
    #[error("a callback revived an object that was being freed")]
    RevivedObject,
    /// An object that was freed is used.
    #[error("a callback used an object after it was freed")]
    UsedFreedObject,
    /// References that were taken were not put.
    #[error("{pages} pages were pinned and never put")]
    LeakedPins {
        /// How many.
        pages: u32,
    },
    /// The device wrote and the page was not marked dirty when it was let go.
    #[error("{pages} pages that the device wrote were let go clean")]
    LostDirty {
        /// How many.
        pages: u32,
    },
    /// The frame that a driver let go of had been freed before.
    #[error("a driver marked a page dirty after it was freed")]
    DirtiedFreedPage,
    /// A device was told to use what is not mapped.
    #[error("a mapping was taken away from a device that was told to use it")]
    TookMappingInUse,
}

/// Is told what devices do. All methods have an empty default.
///
/// [`Observer::device_access`] runs under the lock that a flush of the device's TLB takes: until it returns and the access is done, no
/// flush completes, so what it sees of the page table is what holds at the access.
pub trait Observer: Send + Sync {
    /// The device is about to access a frame.
    fn device_access(&self, cx: &mut Atomic<'_>, access: &DeviceAccess<'_>) {
        let _ = (cx, access);
    }

    /// The access is done: the value read or written, or the frame had been freed.
    fn access_done(&self, cx: &mut Atomic<'_>, access: &DeviceAccess<'_>, result: Result<u64, FrameFreed>) {
        let _ = (cx, access, result);
    }

    /// The moment that it is now.
    fn now(&self) -> Moment {
        Moment(0)
    }

    /// A driver broke a rule of its own.
    fn driver_bug(&self, driver: &'static str, bug: DriverBug) {
        let _ = (driver, bug);
    }
}

/// Nobody looks.
impl Observer for () {}
