// SPDX-License-Identifier: MIT OR Apache-2.0
//! What maps memory: a device with a translation of its own, which must not outlive the program's.
//!
//! The layers are apart, as in a driver: *pages* are got from the primary MMU (pinned, or faulted in), and then *mapped*
//! at device addresses. Nothing here asks whether the pages are still those of the program: whoever calls
//! [`Device::get_pages`] brackets it with `read_begin` and `read_retry` ([`mmu_notifier::primary`]), and does not let
//! the device use a mapping before the check.
//!
//! A device belongs to one primary MMU type, so the same consumer runs over the running kernel and over softmm.

mod command;
pub mod cpu;
mod error;
pub mod io_uring;
pub mod kvm;
pub mod model;
pub mod pinned;
mod view;

use interleave::MaySleep;
use mmu_notifier::{Access, PrimaryMmu, Range};

pub use command::{
    Command, CommandError, DeviceAddr, Engine, Fault, Fence, FenceError, SubmitError, WaitError, checksum,
};
pub use error::DeviceError;
pub use view::View;

/// What a device's pages are worth after the primary MMU has changed the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// It holds references: a mapping that is out of date shows old pages, and nobody else's. Whoever asks
    /// `read_retry` before each use is right; to drop the mapping is housekeeping.
    Pinned,
    /// It walks the primary MMU's own tables or is told by it: a mapping is never out of date, it faults.
    Coherent,
}

/// What a device can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Mappings at a time.
    pub mappings: u32,
    /// Bytes in one mapping.
    pub bytes: u64,
}

/// Something that maps memory of the primary MMU `M`.
///
/// Context: everything may sleep, and is called without a lock of the caller's that a callback takes.
pub trait Device<M: PrimaryMmu>: Send + Sync {
    /// The pages of a range as the device holds them: a pin, or the mere knowledge that they were present.
    type Pages: Send + Sync;
    /// Pages that the device reaches.
    type Mapping: Send + Sync;
    /// What holds the pages.
    const HOLD: Hold;

    /// The limits.
    fn limits(&self) -> Limits;

    /// What a mapping for `access` allows: some devices can do nothing but write.
    fn rights(&self, access: Access) -> Access {
        access
    }

    /// Pins the pages of `range`, or faults them in.
    ///
    /// # Errors
    /// [`DeviceError`]; nothing is held then. Out of date as any look at the mm: ask `read_retry` before believing it.
    fn get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &M,
        range: Range,
        access: Access,
    ) -> Result<Self::Pages, DeviceError>;

    /// Gives pages back; `written`: the device may have written them.
    fn put_pages(&self, cx: &mut MaySleep<'_>, pages: Self::Pages, written: bool);

    /// Lets the device reach `pages`, from device address `at` on, or from an address of its choice: a device that
    /// can takes the program's own.
    ///
    /// # Errors
    /// [`DeviceError`], and the pages back.
    fn map(
        &self,
        cx: &mut MaySleep<'_>,
        pages: Self::Pages,
        at: Option<DeviceAddr>,
    ) -> Result<Self::Mapping, (DeviceError, Self::Pages)>;

    /// The device address of the first page.
    fn address(&self, mapping: &Self::Mapping) -> DeviceAddr;

    /// Does the device see, in the bytes `[addr, addr + len)` of a mapping that contains them, what the program sees
    /// there now? For audits: it may take long, and only a device that can read through its mappings answers.
    fn view(&self, _cx: &mut MaySleep<'_>, _mm: &M, _mapping: &Self::Mapping, _addr: u64, _len: u64) -> View {
        View::Unknown { why: "the device does not tell what it sees" }
    }

    /// Waits until no access through `mapping` is in flight. New ones can begin until it is unmapped.
    fn wait_idle(&self, cx: &mut MaySleep<'_>, mapping: &Self::Mapping);

    /// Takes the mapping away and waits until no access through it is in flight. The pages are still held.
    fn unmap(&self, cx: &mut MaySleep<'_>, mapping: Self::Mapping) -> Self::Pages;
}
