// SPDX-License-Identifier: MIT OR Apache-2.0
//! Swap space for the time of a scene: a zram device of its own, added, formatted, switched on, and taken away again.
//!
//! Nothing on a disk is touched, and swap space that the machine has already stays as it is.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use mmu_notifier::PAGE_SIZE;

use super::DisturbError;
use super::mem::pause_for;

const CONTROL: &str = "/sys/class/zram-control";
const SIZE: u64 = 64 << 20;

/// A zram swap device; dropping it swaps everything in and removes it.
pub(super) struct SwapSpace {
    number: u32,
    on: bool,
}

impl SwapSpace {
    pub(super) fn add() -> Result<SwapSpace, DisturbError> {
        let failed = |what| move |source| DisturbError::Call { what, range: None, source };
        let number = fs::read_to_string(format!("{CONTROL}/hot_add"))
            .and_then(|text| text.trim().parse().map_err(io::Error::other))
            .map_err(failed("zram-control/hot_add"))?;
        let mut swap = SwapSpace { number, on: false };
        fs::write(swap.sysfs("disksize"), SIZE.to_string()).map_err(failed("zram disksize"))?;
        swap.format().map_err(failed("format of the zram device"))?;
        let node = CString::new(swap.node()).map_err(|e| failed("zram node")(e.into()))?;
        // SAFETY: a path of our own device.
        if unsafe { libc::swapon(node.as_ptr(), 0) } == -1 {
            return Err(failed("swapon")(io::Error::last_os_error()));
        }
        swap.on = true;
        Ok(swap)
    }

    fn node(&self) -> String {
        format!("/dev/zram{}", self.number)
    }

    fn sysfs(&self, file: &str) -> String {
        format!("/sys/block/zram{}/{file}", self.number)
    }

    /// The one-page header of a swap area, version 1.
    fn format(&self) -> io::Result<()> {
        let mut page = [0_u8; PAGE_SIZE as usize];
        let last_page = (SIZE / PAGE_SIZE - 1) as u32;
        page[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
        page[1028..1032].copy_from_slice(&last_page.to_ne_bytes());
        page[PAGE_SIZE as usize - 10..].copy_from_slice(b"SWAPSPACE2");
        let device = File::options().write(true).open(self.node())?;
        device.write_all_at(&page, 0)?;
        device.sync_all()
    }
}

impl Drop for SwapSpace {
    fn drop(&mut self) {
        if self.on
            && let Ok(node) = CString::new(self.node())
        {
            // SAFETY: swaps everything in and changes no content.
            unsafe { libc::swapoff(node.as_ptr()) };
        }
        // The device is busy for a moment after swapoff.
        for _ in 0..50 {
            let _ = fs::write(self.sysfs("reset"), "1");
            if fs::write(format!("{CONTROL}/hot_remove"), self.number.to_string()).is_ok() {
                break;
            }
            pause_for(Duration::from_millis(10));
        }
    }
}
