// SPDX-License-Identifier: MIT OR Apache-2.0
//! Run a hidden subcommand of this very program in a process of its own, with a deadline.
//!
//! Every row of `live` changes the memory of the process that it runs in, and a userfaultfd without a reader would
//! hang it: a row that crashes or hangs must cost that row alone. The child prints one JSON value on standard output.

use std::process::Command;
use std::time::Duration;

use hostmm::child::{self, End, Ended, Errors};
use serde::de::DeserializeOwned;

/// Why a child gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChildError {
    /// It could not be run, or left the machine changed.
    #[error(transparent)]
    Run(#[from] child::ChildError),
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
/// [`ChildError`]; whatever the child left in its process group is killed in every case, and what it changed of the
/// machine is put back.
pub(crate) fn ask<T: DeserializeOwned>(args: &[&str], deadline: Duration) -> Result<T, ChildError> {
    let mut command = Command::new("/proc/self/exe");
    let Ended { end, output, errors } = child::run(command.args(args), Errors::Apart, deadline)?;
    let complaint = String::from_utf8_lossy(&errors).into_owned();
    match end {
        End::Code(0) => serde_json::from_slice(&output).map_err(ChildError::Answer),
        End::Code(code) => Err(ChildError::Exit(code, complaint)),
        End::Signal(signal) => Err(ChildError::Signal(signal, complaint)),
        End::Deadline => Err(ChildError::Deadline(deadline, complaint)),
    }
}
