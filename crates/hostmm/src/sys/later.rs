// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptors whose last close is slow, closed by the kernel when nobody waits for it any more.
//!
//! To close a VM, or the event that a BPF program hangs on, waits for grace periods: 10 to 100 ms that a command would
//! spend after its work is done, because exit closes synchronously too. A file that is registered with an io_uring is
//! held by the ring, and what a closed ring holds is put by a kernel worker (io_ring_exit_work). Where there is no
//! io_uring (it can be switched off) the close is the plain one.
//!
//! As the ring goes, the kernel interrupts the thread that made it, once: a call with a timeout that it sleeps in (poll(2),
//! a read from a socket that has one) returns EINTR, as after a signal; others are begun again (signal(7)).

use io_uring::IoUring;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// A descriptor that dropping closes later: its number is free at once, the file is gone some grace periods afterwards.
pub(crate) struct Later(Option<OwnedFd>);

impl Later {
    pub(crate) fn new(fd: OwnedFd) -> Later {
        Later(Some(fd))
    }
}

impl fmt::Debug for Later {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        close(self.0.take().into_iter().collect());
    }
}

/// Closes them later, all together.
pub(crate) fn close(files: Vec<OwnedFd>) {
    if files.is_empty() {
        return;
    }
    let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let ring = IoUring::new(1).ok().filter(|ring| ring.submitter().register_files(&numbers).is_ok());
    // The ring's reference must be the last one.
    drop(files);
    drop(ring);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::uring::uninterrupted;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_closed_later_is_closed() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
        drop(Later::new(there.into()));
        let read = uninterrupted(|| here.read(&mut [0]));
        assert_eq!(read.unwrap(), 0, "the other end is gone");
    }
}
