// SPDX-License-Identifier: MIT OR Apache-2.0
//! The signal mask of the calling thread, which a thread that it starts inherits.

/// Puts the mask back on drop, so that a panic does not leave the thread deaf.
struct Restore(libc::sigset_t);

impl Drop for Restore {
    fn drop(&mut self) {
        // SAFETY: the mask that was there; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// Runs `f` with every signal blocked in this thread, and in those that `f` starts.
pub(crate) fn blocking_signals<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are local, an all-zero sigset_t is valid, and the calls fail only for a wrong `how`.
    let _restore = unsafe {
        let mut all = std::mem::zeroed();
        let mut old = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
        Restore(old)
    };
    f()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Is SIGUSR1 blocked in this thread?
    fn blocked() -> bool {
        // SAFETY: a local set that the call fills in; nothing is changed.
        unsafe {
            let mut now = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut now);
            libc::sigismember(&raw const now, libc::SIGUSR1) == 1
        }
    }

    #[test]
    fn the_mask_comes_back_also_after_a_panic() {
        assert!(blocking_signals(blocked) && !blocked());
        assert!(std::panic::catch_unwind(|| blocking_signals(|| panic!("on purpose"))).is_err());
        assert!(!blocked());
    }
}
