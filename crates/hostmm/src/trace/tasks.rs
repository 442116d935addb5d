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
//! Invariant: whenever [`Tasks::handle_stops`] returns no thread is stopped by us.

use super::inject::InjectError;
use super::launch::{self, Exec};
use super::plant::{PlantError, plant};
use super::ptrace::{self, Stop, Tid};
use super::signals::Signals;
use super::{Ended, Observer, Options, Tgid, TraceError};
use rustix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;

const KCMP_VM: libc::c_long = 1;

/// Is anybody left?
pub(super) enum Left {
    Some,
    None,
}

pub(super) struct Tasks<'a> {
    kvm: BorrowedFd<'a>,
    options: Options,
    observer: &'a mut dyn Observer,
    /// Every traced thread and its process.
    threads: BTreeMap<Tid, Tgid>,
    /// The VM on each process's mm; shared where the mm is; `None` where it could not be made.
    vms: HashMap<Tgid, Option<Rc<OwnedFd>>>,
    /// Wait statuses of processes that are gone.
    ends: HashMap<Tgid, i32>,
    /// The program that was started here, until its exec.
    starting: Option<(Tgid, Exec, String)>,
    /// A process that runs, until it has its VM.
    attaching: Option<Tgid>,
    /// What the thread that was borrowed last is to go on with.
    signal: i32,
}

impl<'a> Tasks<'a> {
    pub(super) fn new(kvm: BorrowedFd<'a>, options: Options, observer: &'a mut dyn Observer) -> Tasks<'a> {
        let (threads, vms, ends) = (BTreeMap::new(), HashMap::new(), HashMap::new());
        Tasks { kvm, options, observer, threads, vms, ends, starting: None, attaching: None, signal: 0 }
    }

    fn trace_options(&self) -> i32 {
        if self.options.follow { ptrace::OPTIONS } else { ptrace::OPTIONS_ALONE }
    }

    /// Starts a program and lets it go on to its exec.
    pub(super) fn launch(
        &mut self,
        program: &[OsString],
        signals: &Signals,
    ) -> Result<(Tgid, bool), TraceError> {
        let name = program.first().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        let system = |what| move |cause| TraceError::System { what, cause };
        let child = launch::fork(program, signals.mask_before()).map_err(system("starting a process"))?;
        let pid = child.pid;
        let seized = ptrace::seize(pid, self.trace_options());
        // A child that cannot be seized ends when its pipe is closed.
        seized.map_err(system("PTRACE_SEIZE of our own child"))?;
        self.threads.insert(pid, pid);
        self.starting = Some((pid, child.go().map_err(system("starting the program"))?, name));
        Ok((pid, true))
    }

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
                match ptrace::seize(tid, self.trace_options()) {
                    Ok(()) => {}
                    Err(e) if e.raw_os_error() == Some(libc::ESRCH) => continue,
                    Err(e) => {
                        self.detach_all();
                        return Err(fail(e));
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
        if self.threads.is_empty() {
            return Err(fail(io::Error::from_raw_os_error(libc::ESRCH)));
        }
        self.attaching = Some(tgid);
        ptrace::interrupt(*self.threads.keys().next().unwrap_or(&tgid)).map_err(fail)?;
        Ok(tgid)
    }

    /// Handles every stop that there is.
    pub(super) fn handle_stops(&mut self) -> Result<Left, TraceError> {
        loop {
            let stopped = ptrace::wait(-1, true);
            match stopped.map_err(|cause| TraceError::System { what: "wait4", cause })? {
                Some((tid, stop)) => self.handle(tid, stop)?,
                None if self.threads.is_empty() => return Ok(Left::None),
                None => return Ok(Left::Some),
            }
        }
    }

    fn handle(&mut self, tid: Tid, stop: Stop) -> Result<(), TraceError> {
        match stop {
            Stop::Gone(status) => return self.gone(tid, status),
            Stop::Exec => self.exec(tid)?,
            Stop::Trap if !self.threads.contains_key(&tid) => self.born(tid),
            Stop::Trap if self.attaching.is_some_and(|tgid| self.threads.get(&tid) == Some(&tgid)) => {
                self.attached(tid)?;
            }
            Stop::Exit => {
                if self.threads.get(&tid) == Some(&tid) {
                    self.observer.mm_ends(tid);
                }
            }
            Stop::Group => {
                // It was stopped when we came: it gets its VM when it goes on.
                let _ = ptrace::listen(tid);
                return Ok(());
            }
            Stop::Signal(signal) => {
                let _ = ptrace::resume(tid, signal);
                return Ok(());
            }
            Stop::Trap | Stop::Child | Stop::Syscall => {}
        }
        // Fails only if it was killed meanwhile, which the next wait tells.
        let _ = ptrace::resume(tid, std::mem::take(&mut self.signal));
        Ok(())
    }

    /// A new thread or process has stopped for the first time. It may be here before its parent says so.
    fn born(&mut self, tid: Tid) {
        let (tgid, parent) = kinship(tid).unwrap_or((tid, 0));
        self.threads.insert(tid, tgid);
        if tgid != tid {
            return;
        }
        // A process made by clone(2) with another exit signal comes as a thread would.
        if !self.options.follow {
            let _ = ptrace::detach(tid, 0);
            self.threads.remove(&tid);
            return;
        }
        if self.vms.contains_key(&parent) && same_mm(tid, parent) {
            let vm = self.vms.get(&parent).cloned().flatten();
            self.vms.insert(tid, vm);
            self.observer.mm_shared(tid, parent, now());
            return;
        }
        let _ = self.new_mm(tid, tid, false);
    }

    fn exec(&mut self, tid: Tid) -> Result<(), TraceError> {
        // The thread that called exec now has the process's id, and all others are gone.
        self.threads.retain(|t, tgid| *tgid != tid || *t == tid);
        self.threads.insert(tid, tid);
        let first = self.starting.take_if(|(pid, ..)| *pid == tid);
        self.vms.remove(&tid);
        let planted = self.new_mm(tid, tid, true);
        match (first, planted) {
            (Some(_), Err(why)) => {
                let _ = rustix::process::kill_process(
                    rustix::process::Pid::from_raw(tid).ok_or_else(no_such_process)?,
                    rustix::process::Signal::KILL,
                );
                Err(TraceError::Plant { tgid: tid, why })
            }
            _ => Ok(()),
        }
    }

    fn attached(&mut self, tid: Tid) -> Result<(), TraceError> {
        let Some(tgid) = self.attaching.take() else { return Ok(()) };
        if let Err(why) = self.new_mm(tgid, tid, false) {
            let _ = ptrace::resume(tid, 0);
            self.detach_all();
            return Err(TraceError::Plant { tgid, why });
        }
        Ok(())
    }

    /// Puts a VM on the mm of `tgid` by its thread `tid`.
    fn new_mm(&mut self, tgid: Tgid, tid: Tid, in_call: bool) -> Result<(), String> {
        let at = now();
        let filtered = has_seccomp(tid);
        if filtered {
            let _ = ptrace::set_options(tid, self.trace_options() | ptrace::SUSPEND_SECCOMP);
        }
        let planted = plant(self.kvm, tgid, tid, in_call);
        if filtered {
            let _ = ptrace::set_options(tid, self.trace_options());
        }
        match planted {
            Ok((vm, signal)) => {
                self.signal = signal;
                self.vms.insert(tgid, Some(Rc::new(vm)));
                self.observer.mm_made(tgid, at, &command(tgid));
                Ok(())
            }
            Err(PlantError::Inject(InjectError::Gone(status))) => {
                // Killed: the end of the thread has been waited for already.
                let _ = self.gone(tid, status);
                Ok(())
            }
            Err(error) => {
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
            self.observer.gone(tgid);
        }
        if let Some((_, exec, program)) = self.starting.take_if(|(pid, ..)| *pid == tid)
            && let Some(cause) = exec.error()
        {
            return Err(TraceError::Exec { program, cause });
        }
        Ok(())
    }

    /// Lets every thread go. Only a stopped one can be let go, so each is interrupted first.
    pub(super) fn detach_all(&mut self) {
        for tid in std::mem::take(&mut self.threads).into_keys() {
            if ptrace::interrupt(tid).is_err() {
                continue;
            }
            while let Ok(Some((_, stop))) = ptrace::wait(tid, false) {
                match stop {
                    Stop::Gone(_) => break,
                    Stop::Signal(signal) => {
                        let _ = ptrace::detach(tid, signal);
                        break;
                    }
                    // A child that it just made is traced as well, and stops by itself.
                    Stop::Child => {
                        if let Some(child) =
                            ptrace::event_message(tid).ok().and_then(|m| Tid::try_from(m).ok())
                            && let Ok(Some((_, Stop::Trap | Stop::Group))) = ptrace::wait(child, false)
                        {
                            let _ = ptrace::detach(child, 0);
                        }
                        let _ = ptrace::detach(tid, 0);
                        break;
                    }
                    Stop::Trap | Stop::Group | Stop::Exec | Stop::Exit | Stop::Syscall => {
                        let _ = ptrace::detach(tid, 0);
                        break;
                    }
                }
            }
        }
        self.vms.clear();
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

fn no_such_process() -> TraceError {
    TraceError::System { what: "the process has no id", cause: io::ErrorKind::NotFound.into() }
}

fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// A field of `/proc/TID/status`.
fn status_field(tid: Tid, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// Process and parent of a thread.
fn kinship(tid: Tid) -> Option<(Tgid, Tgid)> {
    let number = |field| status_field(tid, field)?.parse().ok();
    Some((number("Tgid")?, number("PPid")?))
}

fn has_seccomp(tid: Tid) -> bool {
    status_field(tid, "Seccomp").is_some_and(|mode| mode != "0")
}

fn command(tgid: Tgid) -> String {
    fs::read_to_string(format!("/proc/{tgid}/comm")).map(|s| s.trim_end().to_owned()).unwrap_or_default()
}

/// Do two processes live in one mm (kcmp(2))?
fn same_mm(a: Tgid, b: Tgid) -> bool {
    // SAFETY: takes integers.
    unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) == 0 }
}

fn attach_hint(tgid: Tgid, cause: &io::Error) -> String {
    match cause.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => "there is no such process".to_owned(),
        Some(libc::EPERM) => match status_field(tgid, "TracerPid").as_deref() {
            Some("0") | None => {
                "it belongs to another user, or kernel.yama.ptrace_scope forbids it: run as root".to_owned()
            }
            Some(tracer) => format!("process {tracer} traces it already"),
        },
        _ => "see ptrace(2)".to_owned(),
    }
}
