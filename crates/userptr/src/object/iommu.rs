// SPDX-License-Identifier: MIT OR Apache-2.0
//! The second layer: where a device meets pages that it was given. What the kernel's `dma_map_sg` does.
//!
//! Pages that the primary MMU has wherever it likes get *bus addresses*: either what the device chooses, or a place in a
//! window, as an IOMMU remaps them. A mapping is one run of bus addresses whatever the pages are, and with a window
//! no two mappings touch: who runs off the end of one meets nothing.
//!
//! Lock order: `userptr_iommu` is taken with no other lock, and not held while the device maps.

use std::collections::BTreeMap;

use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::primary::PrimaryMmu;
use mmu_notifier::{PAGE_SIZE, Range};

use crate::device::{Device, DeviceAddr, DeviceError};

static IOMMU: LockClass = LockClass::new("userptr_iommu");

/// How pages get bus addresses.
#[derive(Debug)]
pub struct Iommu {
    window: Option<(u64, u64)>,
    /// Bus addresses in use: start, end.
    used: Mutex<BTreeMap<u64, u64>>,
}

/// Pages that a device reaches at bus addresses.
pub(super) struct Remapped<T> {
    mapping: T,
    /// Of the first page.
    pub(super) bus: u64,
    /// To be given back.
    window: bool,
}

impl Iommu {
    /// The device chooses.
    #[must_use]
    pub fn passthrough() -> Iommu {
        Iommu { window: None, used: Mutex::new(&IOMMU, BTreeMap::new()) }
    }

    /// Places within `len` bytes from `base`, in whole pages, with a page between any two that nothing is mapped at.
    #[must_use]
    pub fn remapping(base: DeviceAddr, len: u64) -> Iommu {
        let start = base.0.next_multiple_of(PAGE_SIZE);
        let end = base.0.saturating_add(len) / PAGE_SIZE * PAGE_SIZE;
        Iommu { window: Some((start, end)), ..Iommu::passthrough() }
    }

    fn allocate(&self, cx: &mut MaySleep<'_>, window: (u64, u64), len: u64) -> Option<u64> {
        let mut used = self.used.lock(cx);
        let (mut at, guarded) = (window.0, len.checked_add(PAGE_SIZE)?);
        for (start, end) in &*used {
            if at.checked_add(guarded)? <= *start {
                break;
            }
            at = end + PAGE_SIZE;
        }
        let end = at.checked_add(len).filter(|end| *end <= window.1)?;
        used.insert(at, end);
        Some(at)
    }

    pub(super) fn map<M: PrimaryMmu, D: Device<M>>(
        &self,
        cx: &mut MaySleep<'_>,
        device: &D,
        range: Range,
        pages: D::Pages,
    ) -> Result<Remapped<D::Mapping>, (DeviceError, D::Pages)> {
        let at = match self.window {
            None => None,
            Some(window) => match self.allocate(cx, window, range.len()) {
                Some(at) => Some(at),
                None => {
                    let why =
                        "the IOMMU's window is used up: close objects, or give it a larger one".to_owned();
                    return Err((DeviceError::Full { range, why }, pages));
                }
            },
        };
        match device.map(cx, pages, at.map(DeviceAddr)) {
            Ok(mapping) => {
                let bus = device.address(&mapping).0;
                Ok(Remapped { mapping, bus, window: at.is_some() })
            }
            Err(refused) => {
                if let Some(at) = at {
                    self.used.lock(cx).remove(&at);
                }
                Err(refused)
            }
        }
    }

    /// Waits until no access is in flight.
    pub(super) fn unmap<M: PrimaryMmu, D: Device<M>>(
        &self,
        cx: &mut MaySleep<'_>,
        device: &D,
        remapped: Remapped<D::Mapping>,
    ) -> D::Pages {
        let pages = device.unmap(cx, remapped.mapping);
        if remapped.window {
            self.used.lock(cx).remove(&remapped.bus);
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_in_a_window_do_not_touch_and_places_are_used_again() {
        MaySleep::enter(|cx| {
            let iommu = Iommu::remapping(DeviceAddr(0x1001), 0xa000);
            let window = iommu.window.unwrap();
            assert_eq!(window, (0x2000, 0xb000));
            let mut take = |pages: u64| iommu.allocate(cx, window, pages * PAGE_SIZE);
            assert_eq!(
                (take(2), take(1), take(2), take(2)),
                (Some(0x2000), Some(0x5000), Some(0x7000), None)
            );
            iommu.used.lock(cx).remove(&0x5000);
            let mut take = |pages: u64| iommu.allocate(cx, window, pages * PAGE_SIZE);
            assert_eq!(
                (take(2), take(1)),
                (None, Some(0x5000)),
                "with the guard pages there is room for one"
            );
            assert_eq!(iommu.allocate(cx, window, u64::MAX - 4095), None);
        });
    }
}
