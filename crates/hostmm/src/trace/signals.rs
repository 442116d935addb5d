// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sleeping until a tracee has stopped or somebody wants an end.
//!
//! SIGCHLD, SIGINT, SIGQUIT, SIGTERM and SIGHUP are blocked, in the tracing thread and in those that it starts, and read from a
//! descriptor. A thread that is older may take them; should it take SIGCHLD, the bound of the sleep helps.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The longest sleep, in milliseconds.
const NAP: i32 = 50;

/// By what an end was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) signal: i32,
    /// Sent to this process by another one; else by the terminal, to every process in its foreground.
    pub(super) by_process: bool,
}

/// While it lives the signals are blocked in this thread.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks them in the calling thread, and so in every one that it starts from now on.
    ///
    /// # Errors
    /// No descriptor.
    pub fn block() -> io::Result<Signals> {
        // SAFETY: local sets; an all-zero sigset_t is valid; signalfd returns a new descriptor or -1.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            for signal in [libc::SIGCHLD, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGHUP] {
                libc::sigaddset(&raw mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before);
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                let error = io::Error::last_os_error();
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
                return Err(error);
            }
            Ok(Signals { fd: OwnedFd::from_raw_fd(fd), before })
        }
    }

    /// The mask that this thread had.
    pub(super) fn mask_before(&self) -> &libc::sigset_t {
        &self.before
    }

    /// Sleeps until something may have happened.
    pub(super) fn sleep(&self) -> Option<Asked> {
        let mut polled = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd.
        unsafe { libc::poll(&raw mut polled, 1, NAP) };
        let mut end = None;
        loop {
            let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
            let len = size_of::<libc::signalfd_siginfo>();
            // SAFETY: a buffer of that length; the kernel fills whole records.
            let got = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), len) };
            if got != len as isize {
                return end;
            }
            // SAFETY: filled.
            let info = unsafe { info.assume_init() };
            let signal = info.ssi_signo as i32;
            if signal != libc::SIGCHLD {
                // The terminal's come from the kernel, whose codes are positive.
                end = Some(Asked { signal, by_process: info.ssi_code <= 0 });
            }
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the mask that was there.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}
