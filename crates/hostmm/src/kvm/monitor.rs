// SPDX-License-Identifier: MIT OR Apache-2.0
//! The monitor: one thread reads records, another calls back whoever's range they overlap.
//!
//! Callbacks come *after the announcement and independently of the change*: nothing waits for them, so a consumer's
//! correctness rests on [`super::Watch`] alone. They are for giving memory back early and for watching.
//!
//! Both threads block every signal. The reader has a descriptor table of its own with nothing but the ring in it, so
//! that a close_range(2) elsewhere does not silence it. For the same reason it is not woken by a descriptor when the
//! source closes: the closer changes the canary page, whose record wakes it like any other. Callbacks are the
//! consumer's code, which may well use a descriptor (to give a pin back, to stop a device), so they run on the other
//! thread, with the table of the process.
//!
//! Whatever the reason that either stops, the state word says so first; see [`Gone::MonitorDead`](super::Gone::MonitorDead).
//!
//! Lock order: `kvm_monitor_stage` is a leaf, taken at the threads' start and end alone.

use super::perf_rings::{self, Fields};
use super::queue::Queue;
use super::record::{Notice, Record};
use super::shared::{ALIVE, Counters, MONITOR, Shared};
use super::subscription::Sub;
use crate::sys::map::Word;
use crate::sys::ringbuf::RingReader;
use crate::sys::signal::blocking_signals;
use interleave::{JoinHandle, LockClass, MaySleep, Mutex, WaitQueue, time, try_spawn};
use rustix::thread::Pid;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// Where the records come from.
pub(crate) enum Input {
    /// The program's ring, and the counter of records that did not fit.
    Bpf(RingReader, Word),
    /// perf rings (owned by [`Shared`]), and how to read them.
    Perf(Fields),
}

static STAGE: LockClass = LockClass::new("kvm_monitor_stage");
static STAGE_CHANGED: LockClass = LockClass::new("kvm_monitor_stage_changed");

/// How far the thread is.
#[derive(Debug)]
enum Stage {
    Starting,
    Running(Pid),
    /// It could not start.
    Refused(io::Error),
    Ended,
}

/// Shared by the thread and whoever waits for it.
#[derive(Debug)]
struct Life {
    stage: Mutex<Stage>,
    changed: WaitQueue,
}

impl Life {
    fn new() -> Life {
        Life { stage: Mutex::new(&STAGE, Stage::Starting), changed: WaitQueue::new(&STAGE_CHANGED) }
    }

    fn reach(&self, cx: &mut MaySleep<'_>, stage: Stage) {
        *self.stage.lock(cx) = stage;
        self.changed.wake_all();
    }

    /// The thread, once it runs.
    fn started(&self, cx: &mut MaySleep<'_>) -> io::Result<Pid> {
        let mut stage = self.stage.lock(cx);
        loop {
            match std::mem::replace(&mut *stage, Stage::Ended) {
                Stage::Starting => *stage = Stage::Starting,
                Stage::Running(tid) => {
                    *stage = Stage::Running(tid);
                    return Ok(tid);
                }
                Stage::Refused(why) => return Err(why),
                Stage::Ended => return Err(io::Error::other("the monitor thread died at its start")),
            }
            stage = self.changed.wait(cx, stage);
        }
    }

    /// Has it ended, or does it within `patience`?
    fn ended_within(&self, cx: &mut MaySleep<'_>, patience: Duration) -> bool {
        let stage = self.stage.lock(cx);
        if matches!(*stage, Stage::Ended) {
            return true;
        }
        let (stage, _) = self.changed.wait_timeout(cx, stage, patience);
        matches!(*stage, Stage::Ended)
    }
}

/// One of the two threads.
#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    life: Arc<Life>,
}

impl Thread {
    fn spawn(name: &str, body: impl FnOnce(&mut MaySleep<'_>, &Life) + Send + 'static) -> io::Result<Thread> {
        let life = Arc::new(Life::new());
        let body = {
            let life = Arc::clone(&life);
            move |cx: &mut MaySleep<'_>| body(cx, &life)
        };
        Ok(Thread { handle: try_spawn(name, body)?, life })
    }
}

/// A running monitor.
#[derive(Debug)]
pub(crate) struct Monitor {
    reader: Thread,
    caller: Thread,
    caller_tid: Pid,
}

impl Monitor {
    /// Starts the threads. `fds` are what the reader polls; they are closed here once it has its own copies.
    pub(crate) fn start(shared: &Arc<Shared>, input: Input, fds: Vec<OwnedFd>) -> io::Result<Monitor> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let queue = Arc::new(Queue::new());
        shared.set(MONITOR);
        let call = {
            let (shared, queue) = (Arc::clone(shared), Arc::clone(&queue));
            move |cx: &mut MaySleep<'_>, life: &Life| {
                let _obituary = Obituary { shared: &shared, life, queue: &queue };
                life.reach(cx, Stage::Running(rustix::thread::gettid()));
                call(cx, &shared, &queue);
            }
        };
        let read = {
            let (shared, queue) = (Arc::clone(shared), Arc::clone(&queue));
            move |cx: &mut MaySleep<'_>, life: &Life| {
                let _obituary = Obituary { shared: &shared, life, queue: &queue };
                match own_descriptor_table(&raw) {
                    Ok(()) => life.reach(cx, Stage::Running(rustix::thread::gettid())),
                    Err(why) => return life.reach(cx, Stage::Refused(why)),
                }
                read(cx, &shared, &queue, input, &raw);
            }
        };
        // A new thread inherits the mask, so there is no moment in which it could take a signal.
        let (reader, caller) = blocking_signals(|| {
            let caller = Thread::spawn("kvm-callbacks", call)?;
            match Thread::spawn("kvm-notifier", read) {
                Ok(reader) => Ok((reader, caller)),
                Err(e) => {
                    // Nobody else would end the caller.
                    MaySleep::enter(|cx| queue.close(cx));
                    Err(e)
                }
            }
        })?;
        let caller_tid = MaySleep::enter(|cx| {
            reader.life.started(cx)?;
            caller.life.started(cx)
        })?;
        Ok(Monitor { reader, caller, caller_tid })
    }

    /// The thread that calls back.
    pub(crate) fn tid(&self) -> Pid {
        self.caller_tid
    }

    /// Waits for the end of the threads; `wake` makes a record appear. Gives up after two seconds: they then end by
    /// themselves at the next record, and touch nothing but what they own. In an atomic section, where nobody may wait,
    /// it gives up at once.
    pub(crate) fn stop(self, mut wake: impl FnMut()) {
        // From a callback: the thread ends when that returns.
        if rustix::thread::gettid() == self.caller_tid {
            return;
        }
        wake();
        let _ = MaySleep::try_enter(|cx| {
            for _ in 0..400 {
                let patience = Duration::from_millis(5);
                // The reader's end closes the queue, which ends the caller.
                if self.reader.life.ended_within(cx, patience) && self.caller.life.ended_within(cx, patience)
                {
                    // The result was already told through the state word.
                    let _ = self.reader.handle.join(cx);
                    let _ = self.caller.handle.join(cx);
                    return;
                }
                wake();
            }
        });
    }
}

/// Says that the monitor is gone however its thread ends, a panic in a callback included, and ends the other one.
struct Obituary<'a> {
    shared: &'a Shared,
    life: &'a Life,
    queue: &'a Queue,
}

impl Drop for Obituary<'_> {
    fn drop(&mut self) {
        self.shared.clear(MONITOR);
        MaySleep::enter(|cx| {
            self.queue.close(cx);
            let mut stage = self.life.stage.lock(cx);
            if !matches!(*stage, Stage::Refused(_)) {
                *stage = Stage::Ended;
            }
        });
        self.life.changed.wake_all();
    }
}

/// The caller.
fn call(cx: &mut MaySleep<'_>, shared: &Shared, queue: &Queue) {
    let mut hits: Vec<Arc<Sub>> = Vec::new();
    while let Some(notice) = queue.pop(cx) {
        if shared.check(ALIVE).is_err() {
            return;
        }
        shared.subs.dispatch(cx, &notice, &mut hits);
    }
}

/// The reader.
fn read(cx: &mut MaySleep<'_>, shared: &Shared, queue: &Queue, mut input: Input, fds: &[RawFd]) {
    let mut polled: Vec<libc::pollfd> =
        fds.iter().map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 }).collect();
    let mut state = State::default();
    let mut timeout = SETTLE_MS;
    loop {
        // SAFETY: an array of pollfd of the length given.
        let n = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) };
        if shared.check(ALIVE).is_err() {
            return;
        }
        if n < 0 || polled.iter().any(|p| p.revents & libc::POLLNVAL != 0) {
            return;
        }
        if n > 0 {
            // The kernel wakes the reader only when it had caught up. Lagging a little on purpose makes one wakeup (10 us
            // of the changing task's time, measured) serve all the ranges of that while.
            time::sleep(cx, COALESCE);
        }
        if !drain(cx, shared, queue, &mut input, &mut state) {
            return;
        }
        // The program fails to reserve and then counts the loss. Should the drain fall between the two, nothing more
        // would wake us: look once more after a while, then sleep for as long as it takes.
        timeout = if n > 0 { SETTLE_MS } else { -1 };
    }
}

/// What the reader remembers from one round to the next.
#[derive(Default)]
struct State {
    /// How far each perf ring has been read.
    tails: Vec<u64>,
    /// The last value of the program's counter of lost records.
    lost: u64,
}

/// How far callbacks lag behind on purpose.
const COALESCE: Duration = Duration::from_micros(250);

/// How long after the last record the loss counter is looked at again, in milliseconds.
const SETTLE_MS: i32 = 100;

/// False: nobody calls any more, or the source is closed.
fn drain(
    cx: &mut MaySleep<'_>,
    shared: &Shared,
    queue: &Queue,
    input: &mut Input,
    state: &mut State,
) -> bool {
    let State { tails, lost } = state;
    let mut tell = |notice| queue.push(cx, notice);
    match input {
        Input::Bpf(ring, lost_word) => {
            loop {
                let told = match ring.next::<{ super::program::RECORD_WORDS }>() {
                    Ok(Some(words)) => tell(Notice::Range(Record::from_words(words))),
                    Ok(None) => break,
                    Err(_) => tell(Notice::Everything),
                };
                if !told || shared.check(ALIVE).is_err() {
                    return false;
                }
            }
            let now = lost_word.load();
            now == std::mem::replace(lost, now) || tell(Notice::Everything)
        }
        Input::Perf(fields) => {
            let Counters::Perf { rings, cpus } = &*shared.counters else { return false };
            tails.resize(rings.len(), 0);
            for (at, (ring, tail)) in rings.iter().zip(tails.iter_mut()).enumerate() {
                let told = match perf_rings::read(ring, tail, cpus[at], *fields) {
                    Some(records) => records.into_iter().all(|r| tell(Notice::Range(r))),
                    None => {
                        shared.count_overrun();
                        tell(Notice::Everything)
                    }
                };
                if !told {
                    return false;
                }
            }
            true
        }
    }
}

/// Gives the calling thread a descriptor table that holds `keep` and nothing else.
fn own_descriptor_table(keep: &[RawFd]) -> io::Result<()> {
    // SAFETY: takes a flag. The thread's table is from now on its own.
    if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut keep: Vec<u32> = keep.iter().map(|fd| *fd as u32).collect();
    keep.sort_unstable();
    let mut from = 0;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if from < fd {
            let last = if fd == u32::MAX { fd } else { fd - 1 };
            // SAFETY: closes copies that only this thread could use, and it uses none of them.
            if unsafe { libc::syscall(libc::SYS_close_range, from, last, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        from = fd.saturating_add(1);
    }
    Ok(())
}
