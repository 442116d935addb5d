// SPDX-License-Identifier: MIT OR Apache-2.0
//! Coming to a process that runs, and letting go of all.
//!
//! Every thread is seized, which stops none; one is then interrupted, to put a VM on the mm with it. Only one, because
//! an interruption is not always unnoticed: epoll_wait(2) and some others (signal(7)) return EINTR after it.

use super::facts::{attach_hint, is_dead};
use super::ptrace::{self, OPTIONS, Stop, Tid, Waited};
use super::reaper::Planted;
use super::tasks::Tasks;
use super::{Tgid, TraceError};
use interleave::{MaySleep, time};
use std::fs;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A thread that does not stop so long is in a sleep that nothing interrupts. It is let go when we end.
const PATIENCE: Duration = Duration::from_secs(5);
/// A child that was just made stops by itself within this; it is not known before.
const LAST: Duration = Duration::from_millis(20);
/// Between two looks for stopped threads.
const NAP: Duration = Duration::from_millis(1);

impl Tasks<'_> {
    /// Seizes every thread of a process, and stops one to put a VM on its mm.
    pub(super) fn attach(&mut self, tgid: Tgid) -> Result<Tgid, TraceError> {
        let fail = |cause: io::Error| TraceError::Attach { tgid, hint: attach_hint(tgid, &cause), cause };
        loop {
            let mut found = false;
            let tasks = fs::read_dir(format!("/proc/{tgid}/task")).map_err(fail)?;
            for tid in tasks.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<Tid>().ok()) {
                if self.threads.contains_key(&tid) {
                    continue;
                }
                match ptrace::seize(tid, OPTIONS) {
                    Ok(()) => {}
                    // It ended, or is a dead first thread that waits for the others.
                    Err(e) if e.raw_os_error() == Some(libc::ESRCH) => continue,
                    Err(_) if is_dead(tid) => continue,
                    Err(e) => {
                        let error = fail(e);
                        self.detach_all();
                        return Err(error);
                    }
                }
                self.threads.insert(tid, tgid);
                found = true;
            }
            // Threads that were made while we read the list.
            if !found {
                break;
            }
        }
        self.first = tgid;
        self.attaching = Some(tgid);
        if !self.interrupt_one(tgid) {
            return Err(fail(io::Error::from_raw_os_error(libc::ESRCH)));
        }
        Ok(tgid)
    }

    /// Interrupts a thread of `tgid` that can stop. False: there is none.
    pub(super) fn interrupt_one(&self, tgid: Tgid) -> bool {
        let of = self.threads.iter().filter(|(_, of)| **of == tgid).map(|(tid, _)| *tid);
        of.filter(|tid| !is_dead(*tid)).any(|tid| ptrace::interrupt(tid).is_ok())
    }

    /// Lets every thread go. Only a stopped one can be let go, so each is interrupted first.
    pub(super) fn detach_all(&mut self) {
        for tid in self.threads.keys() {
            // One that stands at a stop already keeps the interruption for later, and loses it with us.
            let _ = ptrace::interrupt(*tid);
        }
        let (mut last, mut left) = (Instant::now(), PATIENCE);
        // Any thread and not each in turn: a dead first thread is told of when all others are gone.
        while last.elapsed() < left {
            match ptrace::wait(-1, true) {
                Ok(Waited::For(tid, stop)) => {
                    last = Instant::now();
                    self.threads.remove(&tid);
                    match stop {
                        Stop::Gone(_) => {}
                        Stop::Signal(signal) => drop(ptrace::detach(tid, signal)),
                        _ => drop(ptrace::detach(tid, 0)),
                    }
                }
                Ok(Waited::Nothing) => {
                    self.threads.retain(|tid, _| !is_dead(*tid));
                    if self.threads.is_empty() {
                        left = LAST;
                    }
                    MaySleep::enter(|cx| time::sleep(cx, NAP));
                }
                Ok(Waited::Nobody) | Err(_) => break,
            }
        }
        self.threads.clear();
        // Processes of one mm share its VM.
        self.vms.drain().filter_map(|(_, vm)| vm).filter_map(Rc::into_inner).for_each(Planted::close);
    }
}
