// SPDX-License-Identifier: MIT OR Apache-2.0
//! futex(2), for waits in which the waker may neither allocate nor lock.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Waits while `word` is `value`, at most `timeout`. May return for no reason.
pub(super) fn wait(word: &AtomicU32, value: u32, timeout: Duration) {
    let timeout =
        libc::timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() };
    let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel reads one aligned word that outlives the call, and the timeout.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, &raw const timeout) };
}

/// Wakes whoever waits on `word`.
pub(super) fn wake_all(word: &AtomicU32) {
    let op = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel uses the address as a key and reads no memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, i32::MAX) };
}
