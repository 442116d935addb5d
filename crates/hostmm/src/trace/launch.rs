// SPDX-License-Identifier: MIT OR Apache-2.0
//! A program that is seized before its first instruction, and otherwise as our caller would have started it.
//!
//! fork; the child waits on a pipe until it is seized, then calls exec. Its descriptors, environment, working directory,
//! process group, signal actions and mask are what ours were. std's `Command` cannot do it: its spawn returns after the
//! exec, and its own pipe is in the child until then.

use super::ptrace::Tid;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::ptr::null;

/// A forked child that waits to be told to go on.
pub(super) struct Waiting {
    pub(super) pid: Tid,
    go: OwnedFd,
    failed: OwnedFd,
}

/// Forks. `mask` is the signal mask that the program is to start with, `files` its limit of open files, if not ours.
pub(super) fn fork(
    program: &[OsString],
    mask: &libc::sigset_t,
    files: Option<libc::rlimit>,
) -> io::Result<Waiting> {
    let args: Vec<CString> = program
        .iter()
        .map(|arg| CString::new(arg.clone().into_vec()).map_err(io::Error::other))
        .collect::<io::Result<_>>()?;
    if args.is_empty() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let pointers: Vec<*const libc::c_char> = args.iter().map(|arg| arg.as_ptr()).chain([null()]).collect();
    let (go_read, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (failed, failed_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: between fork and exec the child makes system calls and execvp (which allocates nothing in glibc and
    // musl), so locks that other threads held do not matter; pointers and strings live in its copy of our memory.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: as above: system calls on descriptors and strings that this copy of our memory holds, and no return.
        0 => unsafe {
            // A parent that is gone closes the pipe.
            libc::close(go.as_raw_fd());
            let mut byte = 0_u8;
            if libc::read(go_read.as_raw_fd(), (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(127);
            }
            // Rust's runtime ignores it in us; std's Command does the same for what it starts.
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            if let Some(files) = &files {
                libc::setrlimit(libc::RLIMIT_NOFILE, files);
            }
            libc::sigprocmask(libc::SIG_SETMASK, mask, std::ptr::null_mut());
            libc::execvp(pointers[0], pointers.as_ptr());
            let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
            libc::write(failed_write.as_raw_fd(), errno.as_ptr().cast(), errno.len());
            libc::_exit(127)
        },
        pid => Ok(Waiting { pid, go, failed }),
    }
}

impl Waiting {
    /// Lets it call exec. The pipe that says why it could not; empty and closed when it could.
    pub(super) fn go(self) -> io::Result<Exec> {
        File::from(self.go).write_all(&[1])?;
        Ok(Exec(File::from(self.failed)))
    }
}

/// How the exec went.
pub(super) struct Exec(File);

impl Exec {
    /// Why it failed; to be asked once the child is gone or has another program.
    pub(super) fn error(mut self) -> Option<io::Error> {
        let mut errno = [0; 4];
        self.0.read_exact(&mut errno).ok()?;
        Some(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
    }
}
