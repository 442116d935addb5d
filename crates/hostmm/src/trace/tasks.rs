// SPDX-License-Identifier: MIT OR Apache-2.0
//! The traced threads: what each stop means for the mms.
//!
//! | stop | what is done |
//! |---|---|
//! | the first of a new process | an mm of its own gets a VM; one that shares its parent's (vfork) is noted |
//! | exec | the new mm gets a VM, the old one's is dropped |
//! | exit of a process's first thread | its mm can be looked at for the last time |
//! | a signal, job control | passed on: it is as if nobody were there |
//!
//! A child whose mm is its own and that is not to be followed is let go at its first stop, or at its exec. Until then it
//! is traced even so: what it does in the mm of its parent is the parent's.
//!
//! Invariant: whenever [`Tasks::handle_stops`] returns no thread is stopped by us.

use super::facts::{command, kinship, now, same_mm};
use super::inject::Stands;
use super::launch::{self, Exec};
use super::limit::{FileLimit, Raise};
use super::plant::{Made, Planter};
use super::ptrace::{self, OPTIONS, Stop, Tid, Waited};
use super::reaper::{Planted, Reaper};
use super::signals::Signals;
use super::{Ended, Observer, Options, Tgid, TraceError};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

/// Is anybody left?
pub(super) enum Left {
    Some,
    None,
}

pub(super) struct Tasks<'a> {
    planter: Planter<'a>,
    options: Options,
    observer: &'a mut dyn Observer,
    reaper: Reaper,
    /// Each address space has a VM and its maps open here, so the limit of our own is raised meanwhile.
    files: Option<FileLimit>,
    /// Every traced thread and its process.
    pub(super) threads: BTreeMap<Tid, Tgid>,
    /// The VM on each process's mm; shared where the mm is; `None` where it could not be made.
    pub(super) vms: HashMap<Tgid, Option<Rc<Planted>>>,
    /// Wait statuses of processes that are gone.
    ends: HashMap<Tgid, i32>,
    /// The process that all began with.
    pub(super) first: Tgid,
    /// The program that was started here, until its exec.
    starting: Option<(Tgid, Exec, String)>,
    /// A process that runs, until it has its VM.
    pub(super) attaching: Option<Tgid>,
}

/// What becomes of a stopped thread.
enum Then {
    /// It goes on, with this signal (0: none).
    Resume(i32),
    /// It was dealt with.
    Leave,
}

impl<'a> Tasks<'a> {
    pub(super) fn new(
        kvm: BorrowedFd<'a>,
        options: Options,
        observer: &'a mut dyn Observer,
        reaper: Reaper,
    ) -> Tasks<'a> {
        let (threads, vms, ends) = (BTreeMap::new(), HashMap::new(), HashMap::new());
        Tasks {
            planter: Planter::new(kvm),
            options,
            observer,
            reaper,
            files: FileLimit::raise(0, Raise::ToHard),
            threads,
            vms,
            ends,
            first: 0,
            starting: None,
            attaching: None,
        }
    }

    /// Starts a program and lets it go on to its exec.
    pub(super) fn launch(&mut self, program: &[OsString], signals: &Signals) -> Result<Tgid, TraceError> {
        let name = program.first().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        let system = |what| move |cause| TraceError::System { what, cause };
        let child = launch::fork(program, signals.mask_before(), self.files.as_ref().map(FileLimit::old))
            .map_err(system("starting a process"))?;
        let pid = child.pid;
        let seized = ptrace::seize(pid, OPTIONS);
        // A child that cannot be seized ends when its pipe is closed.
        seized.map_err(system("PTRACE_SEIZE of our own child"))?;
        self.threads.insert(pid, pid);
        self.first = pid;
        self.starting = Some((pid, child.go().map_err(system("starting the program"))?, name));
        Ok(pid)
    }

    /// Handles every stop that there is.
    pub(super) fn handle_stops(&mut self) -> Result<Left, TraceError> {
        let mut stopped = Vec::new();
        loop {
            let waited = ptrace::wait(-1, true);
            match waited.map_err(|cause| TraceError::System { what: "wait4", cause })? {
                Waited::For(tid, stop) => stopped.push((tid, stop)),
                Waited::Nothing if stopped.is_empty() => return Ok(Left::Some),
                // Not "no thread is known": a child that has not stopped yet may outlive its parent.
                Waited::Nobody if stopped.is_empty() => return Ok(Left::None),
                Waited::Nothing | Waited::Nobody => {
                    // A parent need not wait until its child has a VM.
                    stopped.sort_by_key(|(_, stop)| *stop != Stop::Child);
                    for (tid, stop) in stopped.drain(..) {
                        self.handle(tid, stop)?;
                    }
                }
            }
        }
    }

    fn handle(&mut self, tid: Tid, stop: Stop) -> Result<(), TraceError> {
        let then = match stop {
            Stop::Gone(status) => return self.gone(tid, status),
            Stop::Exec => self.exec(tid)?,
            Stop::Trap if !self.threads.contains_key(&tid) => self.born(tid),
            Stop::Trap if self.attaching.is_some_and(|tgid| self.threads.get(&tid) == Some(&tgid)) => {
                self.attached(tid)?
            }
            Stop::Exit => {
                // One whose mm is another's, too, does not end it.
                let vm = self.vms.get(&tid).and_then(Option::as_ref);
                if self.threads.get(&tid) == Some(&tid) && vm.is_some_and(|vm| Rc::strong_count(vm) == 1) {
                    self.observer.mm_ends(tid);
                }
                Then::Resume(0)
            }
            Stop::Group => {
                // A process that was stopped when we came gets its VM when it goes on.
                let _ = ptrace::listen(tid);
                Then::Leave
            }
            Stop::Signal(signal) => Then::Resume(signal),
            Stop::Trap | Stop::Child => Then::Resume(0),
        };
        if let Then::Resume(signal) = then {
            // Fails only if it was killed meanwhile, which the next wait tells.
            let _ = ptrace::resume(tid, signal);
        }
        Ok(())
    }

    /// A new thread or process has stopped for the first time. It may be here before its parent says so.
    fn born(&mut self, tid: Tid) -> Then {
        let (tgid, parent) = kinship(tid).unwrap_or((tid, 0));
        self.threads.insert(tid, tgid);
        if tgid != tid {
            return Then::Resume(0);
        }
        if let Some(with) = self.mm_shared_with(tid, parent) {
            let vm = self.vms.get(&with).cloned().flatten();
            self.vms.insert(tid, vm);
            self.observer.mm_shared(tid, with, now());
            return Then::Resume(0);
        }
        if !self.options.follow {
            return self.let_go(tid);
        }
        self.new_mm(tid, tid, Stands::BetweenCalls).unwrap_or(Then::Resume(0))
    }

    /// The traced process in whose mm `tid` lives: mostly its parent, but CLONE_PARENT makes it a sibling.
    fn mm_shared_with(&self, tid: Tid, parent: Tgid) -> Option<Tgid> {
        if self.vms.contains_key(&parent) && same_mm(tid, parent) {
            return Some(parent);
        }
        self.vms.keys().copied().find(|tgid| *tgid != tid && *tgid != parent && same_mm(tid, *tgid))
    }

    fn let_go(&mut self, tid: Tid) -> Then {
        let _ = ptrace::detach(tid, 0);
        self.threads.remove(&tid);
        Then::Leave
    }

    fn exec(&mut self, tid: Tid) -> Result<Then, TraceError> {
        // The thread that called exec now has the process's id, and all others are gone.
        self.threads.retain(|t, tgid| *tgid != tid || *t == tid);
        self.threads.insert(tid, tid);
        self.vms.remove(&tid);
        if !self.options.follow && tid != self.first {
            self.observer.gone(tid, now());
            return Ok(self.let_go(tid));
        }
        let first = self.starting.take_if(|(pid, ..)| *pid == tid);
        match (first, self.new_mm(tid, tid, Stands::InExec)) {
            (Some(_), Err(why)) => {
                // It was started to be watched.
                let _ = ptrace::kill(tid, libc::SIGKILL);
                Err(TraceError::Plant { tgid: tid, why })
            }
            (_, then) => Ok(then.unwrap_or(Then::Resume(0))),
        }
    }

    fn attached(&mut self, tid: Tid) -> Result<Then, TraceError> {
        let Some(tgid) = self.attaching else { return Ok(Then::Resume(0)) };
        match self.new_mm(tgid, tid, Stands::Anywhere) {
            Ok(then) => {
                // A thread that died under us leaves it to another one.
                if self.vms.contains_key(&tgid) {
                    self.attaching = None;
                }
                Ok(then)
            }
            Err(why) => {
                let _ = ptrace::resume(tid, 0);
                self.detach_all();
                Err(TraceError::Plant { tgid, why })
            }
        }
    }

    /// Puts a VM on the mm of `tgid` by its thread `tid`.
    fn new_mm(&mut self, tgid: Tgid, tid: Tid, stands: Stands) -> Result<Then, String> {
        let at = now();
        match self.planter.plant(tgid, tid, stands) {
            Ok(Made { vm, signal, vdso }) => {
                self.vms.insert(tgid, Some(self.reaper.keep(vm)));
                self.observer.mm_made(tgid, at, &command(tgid), vdso);
                Ok(Then::Resume(signal))
            }
            Err(error) => {
                if let Some(status) = error.gone() {
                    if let Some(status) = status {
                        let _ = self.gone(tid, status);
                    }
                    // Nothing to one that is on its way.
                    return Ok(Then::Resume(0));
                }
                self.vms.insert(tgid, None);
                let why = error.to_string();
                self.observer.unwatched(tgid, at, &why);
                Err(why)
            }
        }
    }

    fn gone(&mut self, tid: Tid, status: i32) -> Result<(), TraceError> {
        let Some(tgid) = self.threads.remove(&tid) else { return Ok(()) };
        // The first thread is waited for last.
        if tid == tgid {
            self.vms.remove(&tgid);
            self.ends.insert(tgid, status);
            self.observer.gone(tgid, now());
        }
        if self.attaching == Some(tgid) {
            self.interrupt_one(tgid);
        }
        if let Some((_, exec, program)) = self.starting.take_if(|(pid, ..)| *pid == tid)
            && let Some(cause) = exec.error()
        {
            return Err(TraceError::Exec { program, cause });
        }
        Ok(())
    }

    /// Is the first process still there?
    pub(super) fn first_lives(&self) -> bool {
        !self.ends.contains_key(&self.first)
    }

    /// How process `tgid` ended.
    pub(super) fn status_of(&self, tgid: Tgid) -> Ended {
        match self.ends.get(&tgid) {
            Some(status) if libc::WIFSIGNALED(*status) => Ended::Signal(libc::WTERMSIG(*status)),
            Some(status) => Ended::Code(libc::WEXITSTATUS(*status)),
            None => Ended::Code(0),
        }
    }
}

impl Drop for Tasks<'_> {
    fn drop(&mut self) {
        self.detach_all();
    }
}
