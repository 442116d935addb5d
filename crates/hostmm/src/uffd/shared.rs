// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the monitor, the callback thread and the callers share.
//!
//! Lock order: `uffd_registrations` is the only lock, and the monitor never takes it, so an application thread may
//! munmap while it holds it (its allocator does). Everything that the monitor touches is atomic or owned by it.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use interleave::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, LockClass, MaySleep, Mutex, MutexGuard, Ordering, time,
};
use mmu_notifier::Range;

use super::Gone;
use super::epoch::{CLOSED, Epoch, FORKED};
use super::node::{ADD, DROP, FREE, NOTE, Node, Stack};
use super::registrations::Registrations;
use super::{Stats, futex, futex::Futex};
use crate::sys::uffd::{self as sys, Probe};

static REGISTRATIONS: LockClass = LockClass::new("uffd_registrations");

/// Watches dropped before the monitor is woken only to forget them.
const FORGET_AFTER: u32 = 128;
/// Moved ranges that the callback thread has not unregistered yet.
const STRAYS: usize = 64;

/// Counters; see [`Stats`] for what they mean.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) unmaps: AtomicU64,
    pub(super) remaps: AtomicU64,
    pub(super) removes: AtomicU64,
    pub(super) full_batches: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) callback_panics: AtomicU64,
    pub(super) in_flight: AtomicU64,
    pub(super) gave_up: AtomicU64,
}

pub(super) struct Shared {
    /// The userfaultfd. After the end of the monitor this number names the eventfd: see [`Shared::shut`].
    pub(super) uffd: OwnedFd,
    /// Wakes the monitor.
    pub(super) wake: OwnedFd,
    pub(super) epoch: Epoch,
    /// Bumped at every even epoch; the futex of those who wait for one.
    turn: Futex,
    waiting: AtomicU32,
    pub(super) add: Stack<ADD>,
    pub(super) drop: Stack<DROP>,
    pub(super) note: Stack<NOTE>,
    pub(super) free: Stack<FREE>,
    dropped: AtomicU32,
    /// Bumped for the callback thread; its futex.
    pub(super) notes: Futex,
    /// The callback thread may go once it has told everything.
    pub(super) monitor_gone: AtomicBool,
    pub(super) stop: AtomicBool,
    /// A fault to inject at the next wakeup: see `Fault`.
    pub(super) fault: AtomicU32,
    /// Thread ids; 0 until they run.
    pub(super) monitor_tid: AtomicU32,
    pub(super) callback_tid: AtomicU32,
    pub(super) counters: Counters,
    pub(super) strays: Strays,
    pub(super) registrations: Mutex<Registrations>,
    pub(super) patience: Duration,
    pub(super) vma_budget: usize,
}

impl Shared {
    pub(super) fn new(
        uffd: OwnedFd,
        wake: OwnedFd,
        epoch: Epoch,
        patience: Duration,
        vma_budget: usize,
    ) -> Shared {
        Shared {
            uffd,
            wake,
            epoch,
            turn: Futex::new(0),
            waiting: AtomicU32::new(0),
            add: Stack::new(),
            drop: Stack::new(),
            note: Stack::new(),
            free: Stack::new(),
            dropped: AtomicU32::new(0),
            notes: Futex::new(0),
            monitor_gone: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            fault: AtomicU32::new(0),
            monitor_tid: AtomicU32::new(0),
            callback_tid: AtomicU32::new(0),
            counters: Counters::default(),
            strays: Strays::new(),
            registrations: Mutex::new(&REGISTRATIONS, Registrations::default()),
            patience,
            vma_budget,
        }
    }

    /// Is this the thread that runs callbacks?
    pub(super) fn is_callback_thread(&self) -> bool {
        self.callback_tid.load(Ordering::Acquire) == this_thread()
    }

    /// Has a wait that was first asked about at `since` lasted longer than anybody is ready to wait?
    fn is_late(&self, since: &mut Option<time::Instant>) -> bool {
        since.get_or_insert_with(time::now).elapsed() > self.patience
    }

    pub(super) fn fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }

    /// Whether anything can still be heard.
    pub(super) fn alive(&self) -> Result<(), Gone> {
        match self.epoch.load() {
            FORKED => Err(Gone::Forked),
            CLOSED => Err(Gone::Closed),
            _ => Ok(()),
        }
    }

    /// An even epoch, after waiting for the monitor if it is busy.
    pub(super) fn even(&self) -> Result<u64, Gone> {
        let mut since = None;
        let mut spins = 0;
        loop {
            let turn = self.turn.load(Ordering::SeqCst);
            match self.epoch.load() {
                FORKED => return Err(Gone::Forked),
                CLOSED => return Err(Gone::Closed),
                even if even.is_multiple_of(2) => return Ok(even),
                _ => {}
            }
            spins += 1;
            if spins < 64 {
                interleave::spin_hint();
                continue;
            }
            if self.is_late(&mut since) {
                self.counters.gave_up.fetch_add(1, Ordering::Relaxed);
                return Err(Gone::Busy);
            }
            self.waiting.fetch_add(1, Ordering::SeqCst);
            if self.epoch.load() % 2 == 1 {
                futex::wait(&self.turn, turn, Duration::from_millis(10));
            }
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits until no change is between its page table update and the reading of its event.
    pub(super) fn quiet(&self) -> Result<(), Gone> {
        let mut tries = 0u32;
        let mut since = None;
        loop {
            self.alive()?;
            match sys::probe(self.fd()) {
                Probe::Quiet => return Ok(()),
                Probe::Dead => return Err(Gone::Closed),
                Probe::InFlight => {}
            }
            if tries == 0 {
                self.counters.in_flight.fetch_add(1, Ordering::Relaxed);
            }
            tries += 1;
            if self.is_late(&mut since) {
                self.counters.gave_up.fetch_add(1, Ordering::Relaxed);
                return Err(Gone::Busy);
            }
            match tries {
                0..100 => rustix::thread::sched_yield(),
                // A monitor of a lower priority needs us off the CPU.
                _ => nap(),
            }
        }
    }

    /// Monitor only: after the epoch has become even or closed.
    pub(super) fn wake_waiting(&self) {
        self.turn.fetch_add(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) != 0 {
            futex::wake_all(&self.turn);
        }
    }

    pub(super) fn wake_callbacks(&self) {
        self.notes.fetch_add(1, Ordering::SeqCst);
        futex::wake_all(&self.notes);
    }

    /// Callback thread only, after the monitor: closes the userfaultfd and keeps its number, so that a check which has
    /// already read the number asks the eventfd, and fails, and not a stranger's file.
    pub(super) fn shut(&self) {
        // A stranger's file may be there already, if somebody closed what was not his.
        if sys::probe(self.fd()) != Probe::Dead {
            // SAFETY: both numbers are ours.
            unsafe { libc::dup3(self.wake.as_raw_fd(), self.fd(), libc::O_CLOEXEC) };
        }
    }

    pub(super) fn wake_monitor(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// A watch is dropped: the monitor takes `node` out of its index when it next has something to do.
    pub(super) fn forget(&self, node: &Arc<Node>) {
        // SAFETY: the reference that went to `add` keeps it alive, and a watch is dropped once.
        unsafe { self.drop.push(NonNull::from(node.as_ref())) };
        if self.dropped.fetch_add(1, Ordering::Relaxed) >= FORGET_AFTER {
            self.dropped.store(0, Ordering::Relaxed);
            self.wake_monitor();
        }
    }

    /// `range` is held by one watch less. Unregisters what nobody holds any more.
    pub(super) fn release(&self, cx: &mut MaySleep<'_>, range: Range) {
        let mut registrations = self.lock_registrations(cx);
        for free in registrations.release(range) {
            // Pages that are gone, or that are another's by now, are refused; there is nothing to undo then.
            let _ = sys::unregister(self.fd(), free);
        }
    }

    /// The range moved here by mremap brought its registration along, which nobody asked for.
    pub(super) fn release_stray(&self, cx: &mut MaySleep<'_>, range: Range) {
        let registrations = self.lock_registrations(cx);
        for free in registrations.unheld(range) {
            let _ = sys::unregister(self.fd(), free);
        }
    }

    pub(super) fn lock_registrations(&self, cx: &mut MaySleep<'_>) -> MutexGuard<'_, Registrations> {
        self.registrations.lock(cx)
    }

    pub(super) fn stats(&self) -> Stats {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let c = &self.counters;
        Stats {
            unmaps: get(&c.unmaps),
            remaps: get(&c.remaps),
            removes: get(&c.removes),
            full_batches: get(&c.full_batches),
            lost: get(&c.lost),
            callback_panics: get(&c.callback_panics),
            in_flight: get(&c.in_flight),
            gave_up: get(&c.gave_up),
        }
    }
}

/// The kernel's number of the calling thread.
pub(super) fn this_thread() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
}

/// Some 50 us. Not [`interleave::time::sleep`]: the monitor has no context to give it, and waits for the kernel.
pub(super) fn nap() {
    let time = rustix::thread::Timespec { tv_sec: 0, tv_nsec: 50_000 };
    let _ = rustix::thread::nanosleep(&time);
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The monitor is gone, and left the nodes of its index on `free`; what is on `drop` is among them or on `add`.
        for node in self.add.take() {
            // SAFETY: the reference that `watch` gave to `add`.
            drop(unsafe { Arc::from_raw(node.as_ptr()) });
        }
        for node in self.free.take() {
            // SAFETY: the reference that went from `add` through the index to `free`.
            drop(unsafe { Arc::from_raw(node.as_ptr()) });
        }
    }
}

/// Ranges from the monitor to the callback thread: a ring with one writer and one reader.
pub(super) struct Strays {
    slots: [(AtomicU64, AtomicU64); STRAYS],
    written: AtomicUsize,
    read: AtomicUsize,
}

impl Strays {
    fn new() -> Strays {
        Strays {
            slots: std::array::from_fn(|_| (AtomicU64::new(0), AtomicU64::new(0))),
            written: AtomicUsize::new(0),
            read: AtomicUsize::new(0),
        }
    }

    /// Monitor only. A full ring loses the range, which costs an event nobody wants and no correctness.
    pub(super) fn push(&self, start: u64, len: u64) {
        let at = self.written.load(Ordering::Relaxed);
        if at.wrapping_sub(self.read.load(Ordering::Acquire)) < STRAYS
            && let Some(slot) = self.slots.get(at % STRAYS)
        {
            slot.0.store(start, Ordering::Relaxed);
            slot.1.store(len, Ordering::Relaxed);
            self.written.store(at.wrapping_add(1), Ordering::Release);
        }
    }

    /// Callback thread only.
    pub(super) fn pop(&self) -> Option<Range> {
        let at = self.read.load(Ordering::Relaxed);
        if at == self.written.load(Ordering::Acquire) {
            return None;
        }
        let slot = &self.slots[at % STRAYS];
        let range = Range::new(slot.0.load(Ordering::Relaxed), slot.1.load(Ordering::Relaxed));
        self.read.store(at.wrapping_add(1), Ordering::Release);
        range.ok()
    }
}
