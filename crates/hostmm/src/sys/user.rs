// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing the user of this process.

use std::io;

/// Become `id`, user and group, in all threads and for good.
pub(crate) fn become_user(id: u32) -> io::Result<()> {
    let check = |rc| if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: no pointer is read for an empty list; glibc changes every thread.
    check(unsafe { libc::setgroups(0, std::ptr::null()) })?;
    // SAFETY: plain numbers.
    check(unsafe { libc::setresgid(id, id, id) })?;
    // SAFETY: plain numbers. Leaving uid 0 clears all capability sets.
    check(unsafe { libc::setresuid(id, id, id) })?;
    // A changed uid clears this, and the files in /proc/self would belong to root.
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) })
}
