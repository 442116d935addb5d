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
//! thread, with the table of the process. A slow callback stops the reader in the end, and the ring overflows: counted,
//! and told as [`Notice::Everything`], so that what is queued has a bound.
//!
//! Whatever the reason that either stops, the state word says so first; see [`Gone::MonitorDead`](super::Gone::MonitorDead).
//!
//! Lock order: `kvm_monitor_stage` is a leaf, taken at the reader's start and end alone.

use super::perf_rings::{self, Fields};
use super::record::{Notice, Record};
use super::shared::{ALIVE, Counters, MONITOR, Shared};
use crate::sys::map::Word;
use crate::sys::ringbuf::RingReader;
use crate::sys::signal::blocking_signals;
use interleave::{JoinHandle, LockClass, MaySleep, Mutex, WaitQueue, time, try_spawn};
use rustix::thread::Pid;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
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

/// A running monitor.
#[derive(Debug)]
pub(crate) struct Monitor {
    thread: JoinHandle<()>,
    tid: Pid,
    life: Arc<Life>,
}

impl Monitor {
    /// Starts the thread. `fds` are what it polls; they are closed here once it has its own copies.
    pub(crate) fn start(shared: &Arc<Shared>, input: Input, fds: Vec<OwnedFd>) -> io::Result<Monitor> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let life = Arc::new(Life::new());
        let body = {
            let (shared, life) = (Arc::clone(shared), Arc::clone(&life));
            move |cx: &mut MaySleep<'_>| run(cx, &shared, &life, input, &raw)
        };
        // A new thread inherits the mask, so there is no moment in which it could take a signal.
        let thread = blocking_signals(|| try_spawn("kvm-notifier", body))?;
        let tid = MaySleep::enter(|cx| life.started(cx))?;
        Ok(Monitor { thread, tid, life })
    }

    /// The thread that calls back.
    pub(crate) fn tid(&self) -> Pid {
        self.tid
    }

    /// Waits for the end of the thread; `wake` makes a record appear. Gives up after two seconds: the thread then ends
    /// by itself at its next record, and touches nothing but what it owns. In an atomic section, where nobody may wait,
    /// it gives up at once.
    pub(crate) fn stop(self, mut wake: impl FnMut()) {
        // From a callback: the thread ends when that returns.
        if rustix::thread::gettid() == self.tid {
            return;
        }
        wake();
        let _ = MaySleep::try_enter(|cx| {
            for _ in 0..400 {
                if self.life.ended_within(cx, Duration::from_millis(5)) {
                    // The result was already told through the state word.
                    let _ = self.thread.join(cx);
                    return;
                }
                wake();
            }
        });
    }
}

/// Notices that the reader may be ahead of the callbacks.
const QUEUED: usize = 256;

/// The thread that calls back.
struct Caller {
    thread: JoinHandle<()>,
    notices: SyncSender<Notice>,
}

impl Caller {
    /// Starts it, with the descriptor table that the calling thread has now.
    fn start(shared: &Arc<Shared>) -> io::Result<(Caller, Pid)> {
        let (notices, queued) = sync_channel(QUEUED);
        let (name, named) = sync_channel(1);
        let shared = Arc::clone(shared);
        let thread = try_spawn("kvm-callbacks", move |cx| {
            let _ = name.send(rustix::thread::gettid());
            call(cx, &shared, &queued);
        })?;
        let tid = named.recv().map_err(|_| io::Error::other("the callback thread died at its start"))?;
        Ok((Caller { thread, notices }, tid))
    }
}

/// Says that nobody calls any more however the thread ends, a panic in a callback included.
struct Silent<'a>(&'a Shared);

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        self.0.clear(MONITOR);
    }
}

fn call(cx: &mut MaySleep<'_>, shared: &Shared, queued: &Receiver<Notice>) {
    let _silent = Silent(shared);
    let mut hits = Vec::new();
    while let Ok(notice) = queued.recv() {
        if shared.check(ALIVE).is_err() {
            return;
        }
        shared.subs.dispatch(cx, &notice, &mut hits);
    }
}

/// The caller is gone, so there is nobody to read for.
struct NobodyCalls;

/// Says that the monitor is gone however the reader ends.
struct Obituary<'a> {
    shared: &'a Shared,
    life: &'a Life,
}

impl Drop for Obituary<'_> {
    fn drop(&mut self) {
        self.shared.clear(MONITOR);
        MaySleep::enter(|cx| {
            let mut stage = self.life.stage.lock(cx);
            if !matches!(*stage, Stage::Refused(_)) {
                *stage = Stage::Ended;
            }
        });
        self.life.changed.wake_all();
    }
}

fn run(cx: &mut MaySleep<'_>, shared: &Arc<Shared>, life: &Life, input: Input, fds: &[RawFd]) {
    shared.set(MONITOR);
    let _obituary = Obituary { shared, life };
    // The caller first: it keeps the descriptor table that this thread leaves.
    let (caller, tid) = match Caller::start(shared) {
        Ok(started) => started,
        Err(why) => return life.reach(cx, Stage::Refused(why)),
    };
    match own_descriptor_table(fds) {
        Ok(()) => {
            life.reach(cx, Stage::Running(tid));
            read(cx, shared, input, fds, &caller.notices);
        }
        Err(why) => life.reach(cx, Stage::Refused(why)),
    }
    drop(caller.notices);
    // A panic of it was told through the state word.
    let _ = caller.thread.join(cx);
}

/// Reads until the source closes or nobody calls.
fn read(
    cx: &mut MaySleep<'_>,
    shared: &Shared,
    mut input: Input,
    fds: &[RawFd],
    notices: &SyncSender<Notice>,
) {
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
        if drain(shared, &mut input, &mut state, notices).is_err() {
            return;
        }
        // The program fails to reserve and then counts the loss. Should the drain fall between the two, nothing more
        // would wake us: look once more after a while, then sleep for as long as it takes.
        timeout = if n > 0 { SETTLE_MS } else { -1 };
    }
}

/// What the thread remembers from one round to the next.
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

fn drain(
    shared: &Shared,
    input: &mut Input,
    state: &mut State,
    notices: &SyncSender<Notice>,
) -> Result<(), NobodyCalls> {
    let State { tails, lost } = state;
    let tell = |notice| notices.send(notice).map_err(|_| NobodyCalls);
    match input {
        Input::Bpf(ring, lost_word) => {
            loop {
                match ring.next::<{ super::program::RECORD_WORDS }>() {
                    Ok(Some(words)) => tell(Notice::Range(Record::from_words(words)))?,
                    Ok(None) => break,
                    Err(_) => tell(Notice::Everything)?,
                }
                if shared.check(ALIVE).is_err() {
                    return Ok(());
                }
            }
            let now = lost_word.load();
            if now != std::mem::replace(lost, now) {
                tell(Notice::Everything)?;
            }
        }
        Input::Perf(fields) => {
            let Counters::Perf { rings, cpus } = &*shared.counters else { return Ok(()) };
            tails.resize(rings.len(), 0);
            for (at, (ring, tail)) in rings.iter().zip(tails.iter_mut()).enumerate() {
                match perf_rings::read(ring, tail, cpus[at], *fields) {
                    Some(records) => records.into_iter().try_for_each(|r| tell(Notice::Range(r)))?,
                    None => {
                        shared.count_overrun();
                        tell(Notice::Everything)?;
                    }
                }
            }
        }
    }
    Ok(())
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
