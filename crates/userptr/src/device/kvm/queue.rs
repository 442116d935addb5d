// SPDX-License-Identifier: MIT OR Apache-2.0
//! Submission: the ring, what is in flight in it, and its two ends' handshakes.
//!
//! Positions count slots and never wrap; the slot of position p is p modulo the ring's length. The guest executes a
//! slot once its ticket is p + 1, and then moves POSITION to p + 1.
//!
//! Invariants:
//! * a slot is written after POSITION has moved beyond its last use;
//! * after the last slot of a job, CR3 is the job's address space, whether the job was executed or skipped: so the
//!   next job knows whether it must switch;
//! * a failure is recorded before POSITION moves beyond the job.
//!
//! Lock order: `kvm_device_queue`, then `kvm_device_failure`. The processor's thread takes both, so nobody waits
//! for the device with one of them held.
//!
//! Sleeping and waking are Dekker's: the one stores what it wants and reads the other's word, the other stores its
//! progress and reads what is wanted, each with a full barrier between.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use interleave::{AtomicU32, LockClass, MaySleep, Mutex, MutexGuard, time};
use rustix::io::Errno;
use rustix::thread::futex;

use super::job::{Batch, Job, Place, Slot};
use super::layout::{LAST, MAILBOX, Op, RING, RING_SLOTS, SLOT_LEN, mailbox, slot};
use super::memory::{SystemMemory, Word};

#[expect(clippy::disallowed_types, reason = "a word that futex(2) waits for")]
type FutexWord = std::sync::atomic::AtomicU32;

static QUEUE: LockClass = LockClass::new("kvm_device_queue");

/// Longest job: a quarter of the ring, so that long batches flow.
pub(super) const JOB_SLOTS: usize = RING_SLOTS as usize / 4;
/// How long at most a waiter looks at the position before it sleeps, if the device polls too.
const PATIENCE_US: u32 = 50;

#[derive(Debug)]
pub(super) struct State {
    /// Position of the next job.
    pub(super) next: u64,
    /// CR3 after the last job.
    pub(super) root: u64,
    /// Oldest first. Those that are done are taken out by the next submission.
    pub(super) jobs: VecDeque<Job>,
    /// Batches to be killed.
    pub(super) kills: Vec<(Arc<Batch>, String)>,
    /// Set once the processor's thread has ended.
    pub(super) lost: Option<String>,
}

/// The ring and its words.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) memory: SystemMemory,
    state: Mutex<State>,
    /// Moved to call the processor's thread, which sleeps on it.
    doorbell: FutexWord,
    /// Is the processor's thread about to sleep?
    idle: FutexWord,
    /// Moved when a position that somebody awaits has been reached.
    wakes: FutexWord,
    /// How long the next waiter looks, in microseconds: less after each time that it was in vain, as it is where the
    /// waiter and the guest share a core.
    patience: AtomicU32,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waited {
    Reached,
    TimedOut,
    Interrupted,
}

impl Queue {
    pub(super) fn new(memory: SystemMemory, root: u64) -> Queue {
        let state = State { next: 0, root, jobs: VecDeque::new(), kills: Vec::new(), lost: None };
        Queue {
            memory,
            state: Mutex::new(&QUEUE, state),
            doorbell: FutexWord::new(0),
            idle: FutexWord::new(0),
            wakes: FutexWord::new(0),
            patience: AtomicU32::new(PATIENCE_US),
        }
    }

    pub(super) fn lock(&self, cx: &mut MaySleep<'_>) -> MutexGuard<'_, State> {
        self.state.lock(cx)
    }

    fn mailbox(&self, word: u64) -> &Word {
        self.memory.word(MAILBOX + word)
    }

    /// Slots executed so far. What they wrote is visible to the caller.
    #[inline]
    pub(super) fn position(&self) -> u64 {
        self.mailbox(mailbox::POSITION).load(Ordering::Acquire)
    }

    /// While the guest is stopped.
    pub(super) fn set_position(&self, position: u64) {
        self.mailbox(mailbox::POSITION).store(position, Ordering::SeqCst);
    }

    pub(super) fn set_spins(&self, spins: u64) {
        self.mailbox(mailbox::SPINS).store(spins, Ordering::Relaxed);
    }

    pub(super) fn spins(&self) -> u64 {
        self.mailbox(mailbox::SPINS).load(Ordering::Relaxed)
    }

    fn at(position: u64, word: u64) -> u64 {
        RING + position % RING_SLOTS * SLOT_LEN + word
    }

    /// A word of the slot at `position`.
    pub(super) fn slot_word(&self, position: u64, word: u64) -> &Word {
        self.memory.word(Queue::at(position, word))
    }

    /// Submits one job of at most [`JOB_SLOTS`] commands. Returns the position after it, or `None` if its batch has
    /// failed already.
    ///
    /// Sleeps while the ring is full.
    pub(super) fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        place: Place,
        batch: &Arc<Batch>,
        index: usize,
        slots: impl ExactSizeIterator<Item = Slot>,
    ) -> Result<Option<u64>, String> {
        let most = slots.len() as u64 + 2;
        let mut state = self.lock(cx);
        loop {
            if let Some(why) = &state.lost {
                return Err(why.clone());
            }
            let position = self.position();
            while state.jobs.front().is_some_and(|job| job.end <= position) {
                state.jobs.pop_front();
            }
            if state.next + most <= position + RING_SLOTS {
                break;
            }
            let enough = state.next + most - RING_SLOTS;
            drop(state);
            self.wait(cx, enough, None, false);
            state = self.lock(cx);
        }
        if batch.failure(cx).is_some() {
            return Ok(None);
        }
        let start = state.next;
        let mut position = start;
        let (root, flush) = match place {
            Place::In(root) => (root, false),
            Place::Any => (state.root, false),
            Place::AnyFlush(root) => (state.root, state.root == root),
        };
        let switch = Slot { op: Op::Switch, dst: root, ..Slot::NOP };
        if state.root != root {
            self.write(position, &switch, 0);
            position += 1;
        }
        let first = position;
        let count = slots.len() + usize::from(flush);
        for (n, slot) in slots.chain(flush.then_some(switch)).enumerate() {
            self.write(position, &slot, if n + 1 == count { LAST } else { 0 });
            position += 1;
        }
        if first == position {
            self.write(position, &Slot::NOP, LAST);
            position += 1;
        }
        state.jobs.push_back(Job { start, end: position, first, index, root, batch: Arc::clone(batch) });
        (state.next, state.root) = (position, root);
        // Later slots first: the guest begins once it sees the first, and finds the others without waiting.
        for position in (start..position).rev() {
            self.slot_word(position, slot::TICKET).store(position + 1, Ordering::Release);
        }
        drop(state);
        self.ring();
        Ok(Some(position))
    }

    fn write(&self, position: u64, s: &Slot, flags: u64) {
        let words = [
            (slot::OP, s.op as u64 | flags << 8),
            (slot::DST, s.dst),
            (slot::SRC, s.src),
            (slot::LEN, s.len),
            (slot::A, s.a),
            (slot::B, s.b),
            (slot::C, s.c),
        ];
        for (word, value) in words {
            self.slot_word(position, word).store(value, Ordering::Relaxed);
        }
    }

    /// Wakes the processor's thread if it sleeps or is about to, after what it will look at was stored.
    fn ring(&self) {
        #[expect(clippy::disallowed_methods, reason = "between words shared with the guest")]
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.idle.load(Ordering::SeqCst) != 0 {
            self.call();
        }
    }

    /// Wakes the processor's thread.
    pub(super) fn call(&self) {
        self.doorbell.fetch_add(1, Ordering::SeqCst);
        let _ = futex::wake(&self.doorbell, futex::Flags::PRIVATE, 1);
    }

    /// The processor's thread sleeps until there is a slot to execute, or `stop` says true after a call.
    pub(super) fn sleep_while_idle(&self, stop: impl Fn() -> bool) {
        self.idle.store(1, Ordering::SeqCst);
        loop {
            let bell = self.doorbell.load(Ordering::SeqCst);
            let position = self.position();
            if stop() || self.slot_word(position, slot::TICKET).load(Ordering::SeqCst) == position + 1 {
                break;
            }
            let _ = futex::wait(&self.doorbell, futex::Flags::PRIVATE, bell, None);
        }
        self.idle.store(0, Ordering::SeqCst);
    }

    /// Does the processor's thread sleep, or is it about to?
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.idle.load(Ordering::SeqCst) != 0
    }

    /// Wakes whoever waits for a position, to look again.
    pub(super) fn wake(&self) {
        self.mailbox(mailbox::AWAITED).store(u64::MAX, Ordering::SeqCst);
        self.wakes.fetch_add(1, Ordering::SeqCst);
        let _ = futex::wake(&self.wakes, futex::Flags::PRIVATE, i32::MAX as u32);
    }

    /// Looks at the position for a while. Whether it got there.
    fn look(&self, position: u64, timeout: Option<Duration>) -> bool {
        let start = time::now();
        let us = self.patience.load(interleave::Ordering::Relaxed);
        let patience = Duration::from_micros(us.into()).min(timeout.unwrap_or(Duration::MAX));
        let reached = loop {
            if (0..64).any(|_| {
                std::hint::spin_loop();
                self.position() >= position
            }) {
                break true;
            }
            if start.elapsed() > patience {
                break false;
            }
        };
        let next = if reached { (us * 2).min(PATIENCE_US) } else { (us / 2).max(1) };
        if next != us {
            self.patience.store(next, interleave::Ordering::Relaxed);
        }
        reached
    }

    /// Waits until `position` slots have been executed or skipped.
    pub(super) fn wait(
        &self,
        cx: &mut MaySleep<'_>,
        position: u64,
        timeout: Option<Duration>,
        interruptible: bool,
    ) -> Waited {
        let start = time::now();
        if self.spins() != 0 && self.look(position, timeout) {
            return Waited::Reached;
        }
        loop {
            let wakes = self.wakes.load(Ordering::SeqCst);
            self.mailbox(mailbox::AWAITED).fetch_min(position, Ordering::SeqCst);
            if self.position() >= position {
                return Waited::Reached;
            }
            if self.lock(cx).lost.is_some() {
                return Waited::Reached;
            }
            let left = timeout.map(|t| t.saturating_sub(start.elapsed()));
            if left == Some(Duration::ZERO) {
                return Waited::TimedOut;
            }
            // Without a timeout, a signal whose handler was installed with SA_RESTART would not end the sleep.
            let left = left.unwrap_or(Duration::from_secs(3600));
            let left =
                futex::Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            match futex::wait(&self.wakes, futex::Flags::PRIVATE, wakes, Some(&left)) {
                Err(Errno::INTR) if interruptible => return Waited::Interrupted,
                _ => {}
            }
        }
    }
}
