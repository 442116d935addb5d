// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is submitted: slots, in jobs, of batches.
//!
//! A *job* is a run of positions of the ring that was submitted at once, in one address space. A *batch* is what
//! somebody waits for: one job or, if it is long, several. It fails as a whole.

use std::sync::Arc;

use interleave::{LockClass, MaySleep, Mutex};

use super::layout::Op;
use crate::device::Fault;

static FAILURE: LockClass = LockClass::new("kvm_device_failure");

/// One slot, without its ticket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) op: Op,
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) c: u64,
}

impl Slot {
    pub(super) const NOP: Slot = Slot { op: Op::Nop, dst: 0, src: 0, len: 0, a: 0, b: 0, c: 0 };
}

/// Why a batch did not come to its end.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    Fault(Fault),
    Killed(String),
    Lost(String),
}

/// What the jobs of one batch share.
#[derive(Debug)]
pub(super) struct Batch {
    /// The first one.
    failure: Mutex<Option<Failure>>,
    /// What happens when all of its jobs are done: a command that no job has names addresses that cannot be.
    planned: Option<Fault>,
    /// Address space of the context that submitted it. None has submitted changes of page tables: nobody kills them.
    owner: Option<u64>,
}

impl Batch {
    pub(super) fn new(owner: Option<u64>, planned: Option<Fault>) -> Arc<Batch> {
        Arc::new(Batch { failure: Mutex::new(&FAILURE, None), planned, owner })
    }

    pub(super) fn owner(&self) -> Option<u64> {
        self.owner
    }

    pub(super) fn planned(&self) -> Option<Fault> {
        self.planned
    }

    pub(super) fn fail(&self, cx: &mut MaySleep<'_>, failure: Failure) {
        self.failure.lock(cx).get_or_insert(failure);
    }

    pub(super) fn failure(&self, cx: &mut MaySleep<'_>) -> Option<Failure> {
        self.failure.lock(cx).clone()
    }
}

/// Positions `[start, end)`.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Position of its first command; before it the address space is switched.
    pub(super) first: u64,
    /// Index of that command in the batch.
    pub(super) index: usize,
    pub(super) root: u64,
    pub(super) batch: Arc<Batch>,
}

/// In which address space a job runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In this one.
    In(u64),
    /// In whichever is loaded: it touches the system's memory only.
    Any,
    /// Likewise, and if this one is loaded, what the processor has cached of it is flushed in the end. One that is not
    /// loaded needs no flush: to load it is one.
    AnyFlush(u64),
}
