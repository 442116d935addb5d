// SPDX-License-Identifier: MIT OR Apache-2.0
//! A program in a process of its own, with a deadline, after which the machine is as it was before.
//!
//! A page fault on a userfaultfd without a reader, or an mm operation whose event nobody reads, sleeps for ever.
//! Whatever may do that runs in a child that can be killed from outside. A killed process drops no guard, so the
//! settings that it changed through [`Setting`](crate::setting::Setting) and
//! [`SwapSpace`](crate::setting::SwapSpace) are put back here.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use interleave::time;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::setting;

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With this exit code.
    Code(i32),
    /// By this signal, which was not ours.
    Signal(i32),
    /// It was not done in time, and was killed.
    Deadline,
}

/// What a child left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How it ended.
    pub end: End,
    /// What it wrote to standard output and, if they were asked for together, to standard error.
    pub output: Vec<u8>,
    /// What it wrote to standard error, if they were not.
    pub errors: Vec<u8>,
}

/// Where a child's standard error goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errors {
    /// To a file of its own.
    Apart,
    /// With its standard output, in the order in which it writes.
    WithOutput,
}

/// Why a child could not be run to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChildError {
    /// It could not be started. Nothing is left behind.
    #[error("the child process could not be started: {0}")]
    Start(io::Error),
    /// It could not be waited for. It was killed.
    #[error("the child process could not be waited for: {0}")]
    Wait(io::Error),
    /// It is dead and has left the machine changed.
    #[error("the child process ended ({how:?}) and left the machine changed; put it back by hand: {why}")]
    Restore {
        /// How it ended.
        how: End,
        /// What could not be put back, and why.
        why: io::Error,
    },
}

/// Run `command` as the leader of a process group of its own until it ends, at most for `deadline`; then kill whatever
/// is left in that group, and put back the settings that it had not put back itself. Sleeps meanwhile.
///
/// Its standard input is empty.
///
/// # Errors
/// [`ChildError`]. A child that fails is no error but an [`End`].
pub fn run(command: &mut Command, errors: Errors, deadline: Duration) -> Result<Ended, ChildError> {
    interleave::might_sleep();
    let start = time::now();
    // Files, not pipes: neither does a child wait for us to read, nor can a grandchild that lives on keep us waiting
    // for the end of a file.
    let memfd = |what| memfd_create(what, MemfdFlags::CLOEXEC).map(File::from).map_err(start_error);
    let (mut output, mut complaint) = (memfd("child output")?, memfd("child errors")?);
    let mut log = memfd("settings to restore")?;
    let stderr = if errors == Errors::Apart { &complaint } else { &output };
    let mut child = command
        .env(setting::LOG, format!("/proc/{}/fd/{}", std::process::id(), log.as_raw_fd()))
        .stdin(Stdio::null())
        .stderr(stderr.try_clone().map_err(ChildError::Start)?)
        .stdout(output.try_clone().map_err(ChildError::Start)?)
        .process_group(0)
        .spawn()
        .map_err(ChildError::Start)?;
    let pid = Pid::from_child(&child);
    let in_time = wait_until_exit(pid, deadline.saturating_sub(start.elapsed()));
    // The child is not reaped yet, so its process group cannot be anybody else's.
    let _ = kill_process_group(pid, Signal::KILL);
    let status = child.wait().map_err(ChildError::Wait)?;
    let end = end(status, in_time.map_err(ChildError::Wait)?);
    setting::restore(&mut log).map_err(|why| ChildError::Restore { how: end, why })?;
    let text = |file: &mut File| {
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(ChildError::Wait)?;
        Ok(bytes)
    };
    Ok(Ended { end, output: text(&mut output)?, errors: text(&mut complaint)? })
}

fn start_error(e: rustix::io::Errno) -> ChildError {
    ChildError::Start(e.into())
}

fn end(status: ExitStatus, in_time: bool) -> End {
    match (status.code(), status.signal()) {
        _ if !in_time => End::Deadline,
        (Some(code), _) => End::Code(code),
        (None, signal) => End::Signal(signal.unwrap_or_default()),
    }
}

/// Whether the process exited in time.
fn wait_until_exit(pid: Pid, patience: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let start = time::now();
    loop {
        let left = patience.saturating_sub(start.elapsed());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, errors: Errors, deadline: Duration) -> Ended {
        run(Command::new("sh").args(["-c", script]), errors, deadline).unwrap()
    }

    const SHORT: Duration = Duration::from_secs(20);

    #[test]
    fn what_it_says_and_how_it_ends_are_told() {
        let ended = sh("echo out; echo err >&2; exit 3", Errors::Apart, SHORT);
        assert_eq!(ended, Ended { end: End::Code(3), output: b"out\n".into(), errors: b"err\n".into() });
        let ended = sh("echo err >&2; echo out; kill -9 $$", Errors::WithOutput, SHORT);
        assert_eq!(ended, Ended { end: End::Signal(9), output: b"err\nout\n".into(), errors: Vec::new() });
    }

    #[test]
    fn a_deadline_ends_it_and_its_children_and_keeps_what_it_said() {
        // How long a shell takes to come to its first words is the machine's business.
        let sleeper = [1, 20].into_iter().find_map(|seconds| {
            let ended = sh("sleep 1000 & echo $!; wait", Errors::Apart, Duration::from_secs(seconds));
            assert_eq!(ended.end, End::Deadline);
            let sleeper = String::from_utf8(ended.output).unwrap();
            sleeper.ends_with('\n').then_some(sleeper)
        });
        let sleeper = sleeper.expect("what it said is lost");
        let stat = format!("/proc/{}/stat", sleeper.trim());
        // A killed process takes a moment to die.
        let lives = || std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z"));
        let pause = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        assert!((0..1000).any(|_| !lives() || poll(&mut [], Some(&pause)).is_err()), "the grandchild lives");
    }

    #[test]
    fn more_output_than_a_pipe_holds_blocks_nobody() {
        let ended = sh("head -c 1000000 /dev/zero", Errors::Apart, SHORT);
        assert_eq!((ended.end, ended.output.len()), (End::Code(0), 1_000_000));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let error = run(&mut Command::new("/nonexistent"), Errors::Apart, SHORT).unwrap_err();
        assert!(matches!(error, ChildError::Start(_)), "{error}");
    }
}
