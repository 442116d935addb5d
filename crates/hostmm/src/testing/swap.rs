// SPDX-License-Identifier: MIT OR Apache-2.0
//! Swap space while a test runs: what the machine has, else `/dev/zram0`.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use mmu_notifier::PAGE_SIZE;
use rustix::fs::{FlockOperation, flock};

use super::{note, skip, write_setting};
use crate::capability::{self, Capability, State};
use crate::sys::swap;

const DEVICE: &CStr = c"/dev/zram0";
const DISKSIZE: &str = "/sys/block/zram0/disksize";
const RESET: &str = "/sys/block/zram0/reset";
const BYTES: u64 = 64 << 20;

/// Swap space while this lives. One process at a time has it; others wait.
#[derive(Debug)]
pub struct Swap {
    ours: bool,
    /// Holds the flock on the zram device's size.
    _lock: Option<File>,
}

impl Swap {
    /// Swap space, or `None` and a `skipped:` line of [`Capability::Swap`] where there is none to be had.
    ///
    /// # Panics
    /// If the zram device looks fit but cannot be made swap space.
    #[must_use]
    pub fn require() -> Option<Swap> {
        // Locked before looking: another test's zram would go away under us.
        let lock = File::open(DISKSIZE).ok();
        if let Some(lock) = &lock {
            flock(lock, FlockOperation::LockExclusive).expect("flock");
        }
        if capability::probe(Capability::Swap).is_usable() {
            return Some(Swap { ours: false, _lock: lock });
        }
        if let State::Missing(why) = capability::probe(Capability::Zram) {
            skip(Capability::Swap, &format!("no swap area is active, and {why}"));
            return None;
        }
        let device = DEVICE.to_string_lossy();
        note("swap", Path::new(&*device), "").expect("tell the parent");
        let swap = Swap { ours: true, _lock: lock };
        make_area().and_then(|()| swap::on(DEVICE)).unwrap_or_else(|e| panic!("swap on {device}: {e}"));
        Some(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if self.ours && undo().is_ok() {
            let _ = note("done", Path::new(&*DEVICE.to_string_lossy()), "");
        }
    }
}

/// Size the device and give it the header of a swap area, version 1.
fn make_area() -> io::Result<()> {
    write_setting(Path::new(DISKSIZE), &BYTES.to_string())?;
    let mut header = vec![0; PAGE_SIZE as usize];
    let last_page = (BYTES / PAGE_SIZE - 1) as u32;
    header[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
    header[1028..1032].copy_from_slice(&last_page.to_ne_bytes());
    header[PAGE_SIZE as usize - 10..].copy_from_slice(b"SWAPSPACE2");
    let mut device = OpenOptions::new().write(true).open(&*DEVICE.to_string_lossy())?;
    device.seek(SeekFrom::Start(0))?;
    device.write_all(&header)?;
    device.sync_all()
}

/// Leave the device as it was: no area, no size. Also for a child that died at any point.
pub(super) fn undo() -> io::Result<()> {
    let active = fs::read_to_string("/proc/swaps")?.lines().any(|l| l.starts_with("/dev/zram0"));
    if active {
        swap::off(DEVICE)?;
    }
    write_setting(Path::new(RESET), "1")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::in_child;

    #[test]
    fn swap_comes_and_goes_also_when_the_test_dies() {
        let name = "testing::swap::tests::swap_comes_and_goes_also_when_the_test_dies";
        let swaps = || fs::read_to_string("/proc/swaps").unwrap();
        for case in ["#drop", "#kill"] {
            let child = std::panic::catch_unwind(|| {
                in_child(&format!("{name}{case}"), Duration::from_secs(60), || {
                    let Some(swap) = Swap::require() else { return };
                    assert!(swaps().lines().count() > 1);
                    let ours = swap.ours;
                    if case == "#kill" && ours {
                        use rustix::process::{Signal, getpid, kill_process};
                        kill_process(getpid(), Signal::KILL).unwrap();
                    }
                    drop(swap);
                });
            });
            assert!(case == "#kill" || child.is_ok());
            // Nobody else has it while we hold the lock.
            let lock = File::open(DISKSIZE);
            if let Ok(lock) = &lock {
                flock(lock, FlockOperation::LockExclusive).unwrap();
                assert!(!swaps().contains("zram0"), "after {case}: {}", swaps());
            }
        }
    }
}
