// SPDX-License-Identifier: MIT OR Apache-2.0
//! A child process that waits for a word, does one thing and stays until it is dropped.
//!
//! Between fork and its end the child makes system calls and touches memory, nothing else: the parent has threads,
//! whose locks (malloc's for one) may be held for ever in the child.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{Via, mem};

/// What the child does when told. It must not allocate, free, lock or panic. Its answer is whether it succeeded.
pub(super) type Task<'a> = &'a dyn Fn() -> bool;

/// The parent's end. Dropping it kills and reaps the child.
pub(super) struct Child {
    pid: i32,
    command: OwnedFd,
    answer: OwnedFd,
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the array is for two descriptors, which are new and ours.
    unsafe {
        if libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

impl Child {
    /// Fork by libc or by the bare system call; the child waits.
    pub(super) fn fork(via: Via, task: Option<Task<'_>>) -> io::Result<Child> {
        let (theirs, command) = pipe()?;
        let (answer, reply) = pipe()?;
        // SAFETY: the child runs `serve` only, which keeps to what the module promises.
        let pid = unsafe { mem::call(via, libc::SYS_fork, [0; 6], || libc::fork().into()) }? as i32;
        if pid == 0 {
            serve(theirs.as_raw_fd(), reply.as_raw_fd(), command.as_raw_fd(), task);
        }
        Ok(Child { pid, command, answer })
    }

    /// Let the child do its task and wait for its answer.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut ok = [0_u8; 1];
        // SAFETY: one byte out, one byte in, on descriptors and memory of our own.
        let got = unsafe {
            libc::write(self.command.as_raw_fd(), ok.as_ptr().cast(), 1);
            libc::read(self.answer.as_raw_fd(), ok.as_mut_ptr().cast(), 1)
        };
        match (got, ok) {
            (1, [1]) => Ok(()),
            _ => Err(io::Error::other("the child could not do it")),
        }
    }

    /// Kill the child and wait until its memory is gone.
    pub(super) fn kill(&mut self) {
        if self.pid > 0 {
            // SAFETY: our own child, not reaped yet, so the number is still its.
            unsafe {
                libc::kill(self.pid, libc::SIGKILL);
                while libc::waitpid(self.pid, std::ptr::null_mut(), 0) == -1
                    && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
                {}
            }
            self.pid = 0;
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The child's life. Ends when the parent closes its end of the pipe, dead or alive.
fn serve(command: i32, reply: i32, parents_end: i32, task: Option<Task<'_>>) -> ! {
    let mut byte = [0_u8; 1];
    // SAFETY: system calls on our own descriptors and a byte of our own stack; _exit runs no handler.
    unsafe {
        // Inherited: with it open the child would never see the end of the pipe.
        libc::close(parents_end);
        if libc::read(command, byte.as_mut_ptr().cast(), 1) == 1 {
            byte[0] = task.is_some_and(|task| task()).into();
            libc::write(reply, byte.as_ptr().cast(), 1);
            libc::read(command, byte.as_mut_ptr().cast(), 1);
        }
        libc::_exit(0)
    }
}
