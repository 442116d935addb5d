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
//! Whatever the reason that either stops, the state word says so first; see [`Gone::MonitorDead`].

use super::error::Gone;
use super::layout::Kind;
use super::perf_rings::{self, Fields};
use super::shared::{ALIVE, Counters, Lock, MONITOR, Shared, lock};
use crate::sys::map::Word;
use crate::sys::ringbuf::RingReader;
use crate::sys::vm::blocking_signals;
use mmu_notifier::Range;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// One range, as the kernel announced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What is announced.
    pub kind: Kind,
    /// First byte.
    pub start: u64,
    /// First byte after it; up to `u64::MAX` (clear_refs announces the whole address space so).
    pub end: u64,
    /// The CPU that it was announced on.
    pub cpu: u32,
    /// Process id of the task that changes the memory, in the initial pid namespace: this process, another one
    /// (truncate, process_madvise) or a kernel thread (ksmd, kcompactd).
    pub tgid: u32,
    /// Its thread id.
    pub pid: u32,
    /// CLOCK_MONOTONIC in nanoseconds; 0 where the source does not know.
    pub ktime_ns: u64,
}

impl Record {
    pub(crate) fn from_words(w: [u64; 5]) -> Record {
        Record {
            kind: if w[0] >> 32 == Kind::Age as u64 { Kind::Age } else { Kind::Unmap },
            cpu: w[0] as u32,
            start: w[1],
            end: w[2],
            tgid: (w[3] >> 32) as u32,
            pid: w[3] as u32,
            ktime_ns: w[4],
        }
    }

    /// The part of `range` that it touches; all of it if the record is odd.
    pub(crate) fn within(&self, range: Range) -> Range {
        let (start, end) = (self.start.max(range.start()), self.end.min(range.end()));
        let part = end.checked_sub(start).and_then(|len| Range::enclosing(start, len).ok());
        part.unwrap_or(range)
    }

    /// Does it touch `range`? An empty or backward range is taken to touch everything.
    pub fn overlaps(&self, range: Range) -> bool {
        self.start >= self.end || (self.start < range.end() && range.start() < self.end)
    }
}

/// What a callback is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// A range that overlaps the subscription's.
    Range(Record),
    /// Records were lost: anything may have changed.
    Everything,
}

type Callback = Box<dyn FnMut(&Notice) + Send>;

/// One subscription.
pub(crate) struct Sub {
    range: Range,
    /// `None`: unsubscribed. Held while the callback runs, which is what makes unsubscribing a fence.
    callback: Lock<Option<Callback>>,
}

impl std::fmt::Debug for Sub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sub").field("range", &self.range).finish_non_exhaustive()
    }
}

/// Where the records come from.
pub(crate) enum Input {
    /// The program's ring, and the counter of records that did not fit.
    Bpf(RingReader, Word),
    /// perf rings (owned by [`Shared`]), and how to read them.
    Perf(Fields),
}

static ENDED: interleave::LockClass = interleave::LockClass::new("kvm_monitor_ended");

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").field("caller", &self.caller.thread().id()).finish_non_exhaustive()
    }
}

/// A running monitor.
pub(crate) struct Monitor {
    reader: JoinHandle<()>,
    caller: JoinHandle<()>,
    /// Disconnected when both threads have ended. Never locked: a receiver alone could not be shared.
    ended: interleave::Mutex<Receiver<()>>,
}

impl Monitor {
    /// Starts the threads. `fds` are what it polls; they are closed here once it has its own copies.
    pub(crate) fn start(shared: &Arc<Shared>, input: Input, fds: Vec<OwnedFd>) -> io::Result<Monitor> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let (ready, is_ready) = channel::<io::Result<()>>();
        let (alive, ended) = channel::<()>();
        let shared = Arc::clone(shared);
        let (notices, called) = sync_channel(QUEUED);
        let call_back = {
            let (shared, alive) = (Arc::clone(&shared), alive.clone());
            move || call(&shared, &called, alive)
        };
        let body = move || run(&shared, input, &raw, &ready, &notices, alive);
        // A new thread inherits the mask, so there is no moment in which it could take a signal.
        let (caller, reader) = blocking_signals(|| {
            let caller = std::thread::Builder::new().name("kvm-callbacks".into()).spawn(call_back)?;
            let reader = std::thread::Builder::new().name("kvm-notifier".into()).spawn(body)?;
            Ok::<_, io::Error>((caller, reader))
        })?;
        is_ready.recv().map_err(|_| io::Error::other("the monitor thread died at its start"))??;
        Ok(Monitor { reader, caller, ended: interleave::Mutex::new(&ENDED, ended) })
    }

    /// Waits for the end of the threads; `wake` makes a record appear. Gives up after two seconds: they then end by
    /// themselves at the next record, and touch nothing but what they own. From a callback it does not wait.
    pub(crate) fn stop(mut self, mut wake: impl FnMut()) {
        if std::thread::current().id() == self.caller.thread().id() {
            return;
        }
        for _ in 0..400 {
            wake();
            if self.ended.get_mut().recv_timeout(Duration::from_millis(5))
                == Err(RecvTimeoutError::Disconnected)
            {
                // The result was already told through the state word.
                let _ = self.reader.join();
                let _ = self.caller.join();
                return;
            }
        }
    }
}

/// Notices that the reader may be ahead of the callbacks.
const QUEUED: usize = 256;

/// Clears the monitor's bit however its thread ends, a panic in a callback included.
struct Obituary<'a>(&'a Shared);

impl Drop for Obituary<'_> {
    fn drop(&mut self) {
        self.0.clear(MONITOR);
    }
}

/// The caller.
fn call(shared: &Shared, notices: &Receiver<Notice>, alive: Sender<()>) {
    let _alive = alive;
    let _obituary = Obituary(shared);
    while let Ok(notice) = notices.recv() {
        if shared.check(ALIVE).is_err() {
            return;
        }
        dispatch(shared, &notice);
    }
}

/// The caller is gone.
struct NobodyCalls;

/// The reader.
fn run(
    shared: &Shared,
    mut input: Input,
    fds: &[RawFd],
    ready: &Sender<io::Result<()>>,
    notices: &SyncSender<Notice>,
    alive: Sender<()>,
) {
    let _alive = alive;
    shared.set(MONITOR);
    let _obituary = Obituary(shared);
    let own = own_descriptor_table(fds);
    let stop = own.is_err();
    if ready.send(own).is_err() || stop {
        return;
    }
    let mut polled: Vec<libc::pollfd> =
        fds.iter().map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 }).collect();
    let mut tails: Vec<u64> = Vec::new();
    let mut lost = 0;
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
            #[expect(clippy::disallowed_methods, reason = "a real thread that waits for the kernel")]
            std::thread::sleep(COALESCE);
        }
        let tell = |notice| notices.send(notice).map_err(|_| NobodyCalls);
        if drain(shared, &mut input, &mut tails, &mut lost, &tell).is_err() {
            return;
        }
        // The program fails to reserve and then counts the loss. Should the drain fall between the two, nothing more
        // would wake us: look once more after a while, then sleep for as long as it takes.
        timeout = if n > 0 { SETTLE_MS } else { -1 };
    }
}

/// How far callbacks lag behind on purpose.
const COALESCE: Duration = Duration::from_micros(250);

/// How long after the last record the loss counter is looked at again, in milliseconds.
const SETTLE_MS: i32 = 100;

fn drain(
    shared: &Shared,
    input: &mut Input,
    tails: &mut Vec<u64>,
    lost: &mut u64,
    tell: &impl Fn(Notice) -> Result<(), NobodyCalls>,
) -> Result<(), NobodyCalls> {
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
                    Some(records) => records.iter().try_for_each(|r| tell(Notice::Range(*r)))?,
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

/// Calls back every subscription that the notice concerns. A linear scan.
fn dispatch(shared: &Shared, notice: &Notice) {
    let concerned = |sub: &&Arc<Sub>| match notice {
        Notice::Range(record) => record.overlaps(sub.range),
        Notice::Everything => true,
    };
    let subs: Vec<Arc<Sub>> = lock(&shared.subs).iter().filter(concerned).map(Arc::clone).collect();
    for sub in subs {
        if let Some(callback) = lock(&sub.callback).as_mut() {
            callback(notice);
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

/// Callbacks for one range, until dropped.
#[derive(Debug)]
pub struct Subscription {
    sub: Arc<Sub>,
    shared: Arc<Shared>,
    watch: super::Watch,
    caller: std::thread::ThreadId,
}

impl Subscription {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        monitor: &Monitor,
        range: Range,
        callback: Callback,
        watch: super::Watch,
    ) -> Result<Subscription, Gone> {
        let sub = Arc::new(Sub { range, callback: Lock::new(Some(callback)) });
        lock(&shared.subs).push(Arc::clone(&sub));
        let this =
            Subscription { sub, shared: Arc::clone(shared), watch, caller: monitor.caller.thread().id() };
        // After it is listed: a monitor that dies from now on is seen by the watch.
        shared.check(ALIVE | MONITOR)?;
        Ok(this)
    }

    /// Is this the thread that calls back?
    pub(crate) fn is_calling(&self) -> bool {
        std::thread::current().id() == self.caller
    }

    /// The synchronous side of the same range. Unlike a watch without callbacks it is also gone when the monitor is.
    pub fn watch(&self) -> &super::Watch {
        &self.watch
    }
}

impl Drop for Subscription {
    /// A fence: when it returns, the callback is not running and never runs again. In the callback itself it cannot
    /// wait for itself: there it only makes sure that this call is the last.
    fn drop(&mut self) {
        if !self.shared.at_home() {
            // A forked child: the monitor's locks may be held for ever, and there is no monitor.
            return;
        }
        lock(&self.shared.subs).retain(|sub| !Arc::ptr_eq(sub, &self.sub));
        if !self.is_calling() {
            *lock(&self.sub.callback) = None;
            return;
        }
        // On the calling thread: a callback of another subscription may drop this one, whose lock is then free.
        if let Ok(mut callback) = self.sub.callback.try_lock() {
            *callback = None;
        }
    }
}
