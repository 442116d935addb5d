// SPDX-License-Identifier: MIT OR Apache-2.0
//! futex(2), for waits in which the waker may neither allocate nor lock.

use std::time::Duration;

/// A word that the kernel compares, by its address.
#[expect(
    clippy::disallowed_types,
    reason = "futex(2) reads the word itself, which interleave's atomics do not lend"
)]
pub(super) type Futex = std::sync::atomic::AtomicU32;

/// Waits while `word` is `value`, at most `timeout`. May return for no reason.
pub(super) fn wait(word: &Futex, value: u32, timeout: Duration) {
    let timeout =
        libc::timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() };
    let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel reads one aligned word that outlives the call, and the timeout.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, &raw const timeout) };
}

/// Wakes whoever waits on `word`.
pub(super) fn wake_all(word: &Futex) {
    let op = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel uses the address as a key and reads no memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, i32::MAX) };
}
