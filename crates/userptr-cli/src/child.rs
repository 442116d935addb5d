// SPDX-License-Identifier: MIT OR Apache-2.0
//! Run a hidden subcommand of this very program in a process of its own, with a deadline.
//!
//! Every row of `live` changes the memory of the process that it runs in, and a userfaultfd without a reader would
//! hang it: a row that crashes or hangs must cost that row alone. The child prints one JSON value on standard output.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::de::DeserializeOwned;

/// Why a child gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChildError {
    /// It could not be started.
    #[error("the child process could not be started: {0}")]
    Start(std::io::Error),
    /// The deadline passed; it was killed.
    #[error("hang: killed after {} s{}", .0.as_secs(), said(.1))]
    Deadline(Duration, String),
    /// It died of a signal.
    #[error("died of signal {0}{said}", said = said(.1))]
    Signal(i32, String),
    /// It ended without an answer.
    #[error("exit code {0}{said}", said = said(.1))]
    Exit(i32, String),
    /// It printed something that is not the answer.
    #[error("its answer could not be read: {0}")]
    Answer(serde_json::Error),
}

fn said(stderr: &str) -> String {
    let tail = stderr.trim().lines().last().unwrap_or_default();
    if tail.is_empty() { String::new() } else { format!(": {tail}") }
}

/// Run `userptr ARGS` and read its answer.
///
/// # Errors
/// [`ChildError`]; whatever the child left in its process group is killed in every case.
pub(crate) fn ask<T: DeserializeOwned>(args: &[&str], deadline: Duration) -> Result<T, ChildError> {
    let until = Instant::now() + deadline;
    let mut child = Command::new("/proc/self/exe")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(ChildError::Start)?;
    let group = Pid::from_child(&child);
    let mut out = child.stdout.take().expect("stdout is piped");
    let mut err = child.stderr.take().expect("stderr is piped");
    // An answer is far smaller than a pipe, so the child never waits for us to read.
    let in_time = wait(group, until).map_err(ChildError::Start)?;
    let _ = kill_process_group(group, Signal::KILL);
    let status = child.wait().map_err(ChildError::Start)?;
    let (mut answer, mut complaint) = (Vec::new(), String::new());
    let _ = out.read_to_end(&mut answer);
    let _ = err.read_to_string(&mut complaint);
    if !in_time {
        return Err(ChildError::Deadline(deadline, complaint));
    }
    match (status.code(), status.signal()) {
        (Some(0), _) => serde_json::from_slice(&answer).map_err(ChildError::Answer),
        (Some(code), _) => Err(ChildError::Exit(code, complaint)),
        (None, signal) => Err(ChildError::Signal(signal.unwrap_or_default(), complaint)),
    }
}

/// Did the process end before `until`?
fn wait(pid: Pid, until: Instant) -> std::io::Result<bool> {
    let fd = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
