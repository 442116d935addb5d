// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device that does nothing but hold pages: pins of the primary MMU itself, at the program's own addresses.
//!
//! Over softmm it is the device of the checker, which reads the pinned frames to see what a device would; over the
//! running kernel the pins are fixed buffers of the mm's own ring, to be read through in the same way.

use interleave::MaySleep;
use mmu_notifier::primary::{Pin, PrimaryMmu};
use mmu_notifier::{Access, Range};

use super::{Device, DeviceAddr, DeviceError, Hold, Limits, View};

/// Holds up to `mappings` pins.
#[derive(Debug, Clone, Copy)]
pub struct Pinned {
    /// Pins at a time, no more than the primary MMU has.
    pub mappings: u32,
}

impl<M: PrimaryMmu> Device<M> for Pinned {
    type Pages = M::Pin;
    type Mapping = M::Pin;
    const HOLD: Hold = Hold::Pinned;

    fn limits(&self) -> Limits {
        Limits { mappings: self.mappings, bytes: u64::MAX }
    }

    fn get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &M,
        range: Range,
        access: Access,
    ) -> Result<M::Pin, DeviceError> {
        Ok(mm.pin(cx, range, access)?)
    }

    fn put_pages(&self, cx: &mut MaySleep<'_>, pages: M::Pin, written: bool) {
        pages.unpin(cx, written);
    }

    fn map(
        &self,
        _: &mut MaySleep<'_>,
        pages: M::Pin,
        at: Option<DeviceAddr>,
    ) -> Result<M::Pin, (DeviceError, M::Pin)> {
        let range = pages.range();
        match at {
            Some(at) if at.0 != range.start() => {
                let why = "this device has the program's addresses".to_owned();
                Err((DeviceError::Address { range, at, why }, pages))
            }
            _ => Ok(pages),
        }
    }

    fn address(&self, mapping: &M::Pin) -> DeviceAddr {
        DeviceAddr(mapping.range().start())
    }

    /// By the page's identity, where the primary MMU tells it.
    fn view(&self, cx: &mut MaySleep<'_>, mm: &M, mapping: &M::Pin, addr: u64, len: u64) -> View {
        let Ok(range) = Range::enclosing(addr, len) else { return View::Same };
        for at in range.iter_pages() {
            let Some(pinned) = mapping.pfn(at) else {
                return View::Unknown { why: "the primary MMU does not tell which pages it has pinned" };
            };
            // What is paged out is still the pinned page, and says so when it is back.
            if mm.fault_in(cx, Range::page(at), mapping.access()).is_err() {
                return View::Other { at: at.get() };
            }
            match mm.page_identity(cx, at).map(|identity| identity.pfn) {
                Ok(Some(pfn)) if pfn == pinned => {}
                Ok(Some(_)) => return View::Other { at: at.get() },
                Ok(None) | Err(_) => {
                    return View::Unknown { why: "the primary MMU does not tell which page is mapped" };
                }
            }
        }
        View::Same
    }

    fn wait_idle(&self, _: &mut MaySleep<'_>, _: &M::Pin) {}

    fn unmap(&self, _: &mut MaySleep<'_>, mapping: M::Pin) -> M::Pin {
        mapping
    }
}
