// SPDX-License-Identifier: MIT OR Apache-2.0
//! Waiting for a batch, and killing it.

use std::sync::Arc;
use std::time::Duration;

use interleave::MaySleep;

use super::Inner;
use super::error::KvmError;
use super::job::{Batch, Failure};
use super::queue::Waited;
use crate::device::{Fence, FenceError, WaitError};

/// A batch that was submitted to the kvm device. Dropped, it lets the batch run on.
#[derive(Debug)]
pub struct KvmFence {
    pub(super) device: Arc<Inner>,
    pub(super) batch: Arc<Batch>,
    /// Position after its last job.
    pub(super) end: u64,
}

impl KvmFence {
    /// Stops the batch: the command that runs is left where it is, and the rest is not begun. Batches of others go on.
    /// Does not wait. A batch that is done stays done.
    pub fn kill(&self, cx: &mut MaySleep<'_>, why: &str) {
        let shared = &self.device.shared;
        shared.queue.lock(cx).kills.push((Arc::clone(&self.batch), why.to_owned()));
        shared.kick();
    }

    fn outcome(&self, cx: &mut MaySleep<'_>) -> Result<(), FenceError> {
        let gone = |why: String| FenceError::Gone { source: Box::new(KvmError::Lost(why)) };
        match self.batch.failure(cx) {
            Some(Failure::Fault(fault)) => return Err(fault.into()),
            Some(Failure::Killed(why)) => return Err(FenceError::Killed { why }),
            Some(Failure::Lost(why)) => return Err(gone(why)),
            None => {}
        }
        match self.batch.planned() {
            Some(fault) => Err(fault.into()),
            None => Ok(()),
        }
    }
}

impl Fence for KvmFence {
    fn is_signaled(&self) -> bool {
        let shared = &self.device.shared;
        shared.queue.position() >= self.end || shared.tid.load(interleave::Ordering::SeqCst) == 0
    }

    fn wait(&self, cx: &mut MaySleep<'_>) -> Result<(), FenceError> {
        self.device.shared.queue.wait(cx, self.end, None, false);
        self.outcome(cx)
    }

    fn wait_interruptible(&self, cx: &mut MaySleep<'_>, timeout: Option<Duration>) -> Result<(), WaitError> {
        match self.device.shared.queue.wait(cx, self.end, timeout, true) {
            Waited::Reached => Ok(()),
            Waited::Interrupted => Err(WaitError::Interrupted),
            Waited::TimedOut => Err(WaitError::TimedOut(timeout.unwrap_or_default())),
        }
    }
}
