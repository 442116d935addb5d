// SPDX-License-Identifier: MIT OR Apache-2.0
//! The software mm beside the running kernel: the same operations on both, the same notifications, contents and faults.
//!
//! After each operation of a [`script`] three things must be equal: how it ended, the ranges that were announced to who
//! listens to the parent ([`step::Step::heard`]), and for every page of both processes whether it is present, which pages share its
//! frame, and its first word. A difference must show twice to count, since compaction and other machinery of the kernel change
//! memory at their own time; one that shows once is counted as passing.
//!
//! Swap space, ksmd, disks, probes and pins are used where the machine has them ([`script::Op::needs`]).
//!
//! Not compared: the end and the kind of an announcement, which the kernel's tracepoint does not tell; SIGSEGV against
//! SIGBUS; what is announced about the child.

pub mod model;
pub mod paths;
pub mod script;
pub mod shrink;
pub mod step;
pub mod subject;
pub mod text;

use model::ModelError;
use script::Op;
use softmm::KernelProfile;
use std::fmt;
use subject::{Subject, SubjectError};

/// How many scripts a difference may cost to shrink.
const SHRINK_TRIES: usize = 400;

/// Why the two could not be compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// The kernel could not be asked.
    #[error(transparent)]
    Subject(#[from] SubjectError),
    /// softmm could not be asked.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// A difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// A short script that shows it, in its last operation.
    pub script: Vec<Op>,
    /// What differs there.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.what)?;
        self.script.iter().try_for_each(|op| writeln!(f, "    {op}"))
    }
}

/// What came of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compared {
    /// Operations that were compared.
    pub operations: usize,
    /// Announced ranges that were equal.
    pub ranges: usize,
    /// Accesses that faulted on both sides.
    pub faults: usize,
    /// Copies and reuses that softmm was told, since the kernel may choose.
    pub told: usize,
    /// Pages that the kernel was asked to swap out or merge, and could have, and did not.
    pub unprovoked: usize,
    /// Differences that did not show again.
    pub passing: usize,
    /// The difference, if there is one.
    pub difference: Option<Difference>,
}

impl Compared {
    /// Adds the counts of another comparison, and takes its difference if there is none yet.
    pub fn add(&mut self, other: Compared) {
        self.operations += other.operations;
        self.ranges += other.ranges;
        self.faults += other.faults;
        self.told += other.told;
        self.unprovoked += other.unprovoked;
        self.passing += other.passing;
        self.difference = self.difference.take().or(other.difference);
    }
}

/// The first operation of `script` at which they differ, and how.
struct First {
    at: usize,
    what: String,
}

fn first_difference(
    subject: &mut Subject,
    profile: KernelProfile,
    script: &[Op],
    counts: &mut Compared,
) -> Result<Option<First>, DiffError> {
    let done = subject.run(script)?;
    let modelled = model::run(profile, script, &done)?;
    counts.told += modelled.told;
    counts.unprovoked += modelled.unprovoked;
    for (at, (kernel, soft)) in done.iter().zip(&modelled.steps).enumerate() {
        if let Some(what) = kernel.step.difference(soft) {
            return Ok(Some(First { at, what }));
        }
        counts.operations += 1;
        counts.ranges += soft.heard.len();
        counts.faults += usize::from(soft.answer == step::Answer::Fault);
    }
    Ok(None)
}

/// Does `script` on both sides. A difference is confirmed and shrunk. May sleep.
///
/// # Errors
/// [`DiffError`].
pub fn compare(subject: &mut Subject, profile: KernelProfile, script: &[Op]) -> Result<Compared, DiffError> {
    let mut counts = Compared::default();
    let Some(first) = first_difference(subject, profile, script, &mut counts)? else { return Ok(counts) };
    let mut quiet = Compared::default();
    let prefix = &script[..=first.at];
    if first_difference(subject, profile, prefix, &mut quiet)?.is_none() {
        counts.passing += 1;
        return Ok(counts);
    }
    let fails = |part: &[Op]| -> Result<bool, DiffError> {
        Ok(first_difference(subject, profile, part, &mut Compared::default())?.is_some())
    };
    let mut short = shrink::shrink(prefix.to_vec(), SHRINK_TRIES, fails)?;
    let last = first_difference(subject, profile, &short, &mut quiet)?.unwrap_or(first);
    short.truncate(last.at + 1);
    counts.difference = Some(Difference { script: short, what: last.what });
    Ok(counts)
}
