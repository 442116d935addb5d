// SPDX-License-Identifier: MIT OR Apache-2.0
//! swapon and swapoff.

use std::ffi::CStr;
use std::io;

/// Begin to swap to the device, at the priority that the kernel chooses: below every area that is active already.
pub(crate) fn on(device: &CStr) -> io::Result<()> {
    // SAFETY: a string that ends in zero.
    if unsafe { libc::swapon(device.as_ptr(), 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Read everything back and stop swapping to the device.
pub(crate) fn off(device: &CStr) -> io::Result<()> {
    // SAFETY: a string that ends in zero.
    if unsafe { libc::swapoff(device.as_ptr()) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
