// SPDX-License-Identifier: MIT OR Apache-2.0
//! Swap space for a while: a zram device of its own, added, formatted, switched on, and taken away again.
//!
//! Nothing on a disk is touched, and swap space that the machine has already stays as it is.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use interleave::{MaySleep, time};
use mmu_notifier::PAGE_SIZE;

use super::{log, write};
use crate::sys::swap;

const CONTROL: &str = "/sys/class/zram-control";
const BYTES: u64 = 64 << 20;

/// A zram swap device of 64 MiB while this lives. Dropping it swaps everything in and removes the device.
#[derive(Debug)]
pub struct SwapSpace {
    number: u32,
}

impl SwapSpace {
    /// Add a device and swap to it, at a lower priority than whatever is swapped to already.
    ///
    /// # Errors
    /// What the kernel says, and of which step; then the device is gone again. Needs root and the module zram.
    pub fn add() -> io::Result<SwapSpace> {
        let step = |what: &'static str| move |e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"));
        // A read of this file adds a device.
        let number = fs::read_to_string(format!("{CONTROL}/hot_add"))
            .and_then(|text| text.trim().parse().map_err(io::Error::other))
            .map_err(step("zram-control/hot_add"))?;
        let space = SwapSpace { number };
        log::opened(log::ZRAM, &number.to_string(), "")?;
        write(Path::new(&format!("/sys/block/zram{number}/disksize")), &BYTES.to_string())
            .map_err(step("size of the zram device"))?;
        format_area(&space.node()).map_err(step("header of the swap area"))?;
        swap::on(&node(number)).map_err(step("swapon"))?;
        Ok(space)
    }

    /// The path of the device.
    #[must_use]
    pub fn node(&self) -> String {
        node(self.number).to_string_lossy().into_owned()
    }
}

impl Drop for SwapSpace {
    fn drop(&mut self) {
        match remove(self.number) {
            Ok(()) => log::closed(&self.number.to_string()),
            Err(e) => tracing::error!("{} could not be taken away: {e}", self.node()),
        }
    }
}

fn node(number: u32) -> CString {
    CString::new(format!("/dev/zram{number}")).unwrap_or_default()
}

/// The one-page header of a swap area, version 1.
fn format_area(node: &str) -> io::Result<()> {
    let mut page = [0_u8; PAGE_SIZE as usize];
    let last_page = (BYTES / PAGE_SIZE - 1) as u32;
    page[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
    page[1028..1032].copy_from_slice(&last_page.to_ne_bytes());
    page[PAGE_SIZE as usize - 10..].copy_from_slice(b"SWAPSPACE2");
    let device = File::options().write(true).open(node)?;
    device.write_all_at(&page, 0)?;
    device.sync_all()
}

/// Take a device away, however far its owner came with it.
pub(super) fn remove(number: u32) -> io::Result<()> {
    let dir = format!("/sys/block/zram{number}");
    // Refused (EINVAL) where nothing is swapped to it.
    let _ = swap::off(&node(number));
    let mut outcome = Ok(());
    for _ in 0..50 {
        if !Path::new(&dir).exists() {
            return Ok(());
        }
        let _ = write(Path::new(&format!("{dir}/reset")), "1");
        outcome = write(Path::new(&format!("{CONTROL}/hot_remove")), &number.to_string());
        if outcome.is_ok() {
            return outcome;
        }
        // The device is busy for a moment after swapoff.
        if MaySleep::try_enter(|cx| time::sleep(cx, Duration::from_millis(10))).is_err() {
            return outcome;
        }
    }
    outcome
}
