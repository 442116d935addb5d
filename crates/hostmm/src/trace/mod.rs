// SPDX-License-Identifier: MIT OR Apache-2.0
//! Other programs, traced so that the kernel's notifier sits on their memory.
//!
//! A notifier belongs to an mm. An mm is made by exec and by fork (not by vfork, nor by threads), so a program is
//! stopped by ptrace at these points and nowhere else, and each new mm gets an empty VM before its program goes on. What the
//! notifiers then say is [`crate::kvm::stream`]'s to hear.
//!
//! The program's descriptors, environment, signals, memory and exit code stay what they are without us; `TracerPid` in
//! its status and the time that the stops take are all that it could notice. A second tracer (a debugger, strace) is
//! refused by the kernel, and so are we where one is.
//!
//! # When we die
//!
//! The kernel then detaches: tracees go on, untraced. A thread that is at that very moment borrowed for one of our calls
//! (about a millisecond after an exec or fork) would go on at the wrong place, and so its process is killed. The VMs go
//! with our descriptors.
//!
//! # Threads
//!
//! ptrace belongs to a thread: [`run`] does all of it on the calling one, which must have no children of its own: they
//! would be waited for. Others close the VMs.

mod attach;
mod errand;
mod facts;
mod inject;
mod launch;
mod limit;
mod plant;
mod ptrace;
mod reaper;
mod rseq;
mod signals;
mod tasks;
mod vdso;

use crate::kvm::OpenError;
use crate::sys::vm;
use interleave::{MaySleep, scope};
use reaper::Reaper;
use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use tasks::Tasks;

pub use facts::now;
pub use signals::Signals;

/// A process id.
pub type Tgid = i32;

/// What to trace.
#[derive(Debug, Clone)]
pub enum What {
    /// A program to start, with its arguments; found as execvp(3) finds it.
    Program(Vec<OsString>),
    /// A process that runs.
    Process(Tgid),
}

/// How to trace.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Trace the processes that it makes, too.
    pub follow: bool,
}

/// What is told while it runs, on the tracing thread; the process concerned is stopped meanwhile.
///
/// Times are CLOCK_MONOTONIC in nanoseconds, as in the stream's records.
pub trait Observer {
    /// From `at` on what `tgid` does is about a new mm, with a notifier on it; `program` is its command. What is opened
    /// of it in /proc now stays about this mm whatever becomes of the process. Because of us fork announces `vdso`, too.
    fn mm_made(&mut self, tgid: Tgid, at: u64, program: &str, vdso: Range<u64>);
    /// `tgid` begins its life in the mm of `with` (vfork, clone with CLONE_VM).
    fn mm_shared(&mut self, tgid: Tgid, with: Tgid, at: u64);
    /// There is no notifier on the mm of `tgid`, and this is why.
    fn unwatched(&mut self, tgid: Tgid, at: u64, why: &str);
    /// `tgid` is about to end; its mm is still there to be looked at. Not told before an exec.
    fn mm_ends(&mut self, tgid: Tgid);
    /// `tgid` is gone, or lives on in an mm that is not watched.
    fn gone(&mut self, tgid: Tgid, at: u64);
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The program exited with this code.
    Code(i32),
    /// The program was killed by this signal.
    Signal(i32),
    /// We were asked to stop by this signal; whatever still ran goes on untraced.
    Asked(i32),
}

/// Why nothing, or no more, could be traced. Nothing is left stopped or attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The program cannot be started.
    #[error("{program}: {cause}")]
    Exec {
        /// As it was given.
        program: String,
        /// exec's answer.
        cause: io::Error,
    },
    /// The process cannot be traced.
    #[error("process {tgid}: {cause}; {hint}")]
    Attach {
        /// The process.
        tgid: Tgid,
        /// ptrace's answer.
        cause: io::Error,
        /// What to do.
        hint: String,
    },
    /// The first program has no notifier, so there would be nothing to hear.
    #[error("process {tgid} cannot be watched: {why}")]
    Plant {
        /// The process.
        tgid: Tgid,
        /// Why.
        why: String,
    },
    /// No KVM.
    #[error(transparent)]
    Kvm(#[from] OpenError),
    /// The system refused something that it should not.
    #[error("{what}: {cause}")]
    System {
        /// The step.
        what: &'static str,
        /// Its answer.
        cause: io::Error,
    },
}

/// Traces until the last process ends, or until an end is asked for.
///
/// A program that was started here is as if it stood in our place: SIGINT, SIGQUIT, SIGTERM and SIGHUP that somebody
/// sends to this process are passed on to it, and those of the terminal it gets by itself; it decides what becomes of
/// them. To a process that ran before, or when the first process is gone and its children are followed, such a signal
/// ends the tracing. Sleeps all the while.
///
/// `signals` are blocked since before this process had other threads, which would take them.
///
/// # Errors
/// [`TraceError`].
pub fn run(
    what: &What,
    options: Options,
    signals: &Signals,
    observer: &mut dyn Observer,
) -> Result<Ended, TraceError> {
    interleave::might_sleep();
    let path = Path::new("/dev/kvm");
    let kvm = vm::open(path).map_err(|e| crate::kvm::kvm_error(path, e))?;
    MaySleep::enter(|cx| {
        scope(cx, |scope, _| {
            let mut tasks = Tasks::new(kvm.as_fd(), options, observer, Reaper::start(scope));
            trace(what, signals, &mut tasks)
        })
    })
}

fn trace(what: &What, signals: &Signals, tasks: &mut Tasks<'_>) -> Result<Ended, TraceError> {
    let (first, launched) = match what {
        What::Program(program) => (tasks.launch(program, signals)?, true),
        What::Process(tgid) => (tasks.attach(*tgid)?, false),
    };
    loop {
        match tasks.handle_stops()? {
            tasks::Left::None => return Ok(tasks.status_of(first)),
            tasks::Left::Some => {}
        }
        let Some(asked) = signals.sleep() else { continue };
        if !launched {
            tasks.detach_all();
            return Ok(Ended::Asked(asked.signal));
        }
        if !tasks.first_lives() {
            tasks.detach_all();
            return Ok(tasks.status_of(first));
        }
        if asked.by_process {
            // It may have ended just now, which the next wait tells.
            let _ = ptrace::kill(first, asked.signal);
        }
    }
}
