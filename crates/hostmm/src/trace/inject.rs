// SPDX-License-Identifier: MIT OR Apache-2.0
//! A stopped thread, borrowed for work of ours.
//!
//! The thread is sent to code that [`super::vdso`] lodged in its vDSO, runs there until it stops itself, and is put back
//! where it was: none of the program's own code is written to. It stops by a SIGTRAP that it sends to itself and that we
//! take: not by a breakpoint or a single step, whose forced SIGTRAP resets the program's own action for that signal,
//! and not at system calls, each of which would be two stops. All other signals are blocked meanwhile; one that arrives
//! waits and is delivered afterwards.
//!
//! A thread that was interrupted inside of a restartable sequence is put back at its abort handler ([`super::rseq`]).
//! One that was interrupted in a system call begins it again, or not, as it would have: it is put back at a stop for a
//! signal, behind which the kernel decides that.
//!
//! While the thread is borrowed seccomp filters look away from it, and should we die it is killed: to go on at a place
//! that is not its own could do anything.
//!
//! Preconditions: the thread is stopped and ours. On any error but the death of the thread it is put back.

use super::errand;
use super::facts::has_seccomp;
use super::ptrace::{self, EXITKILL, OPTIONS, Regs, SUSPEND_SECCOMP, SigInfo, Stop, Tid, Waited};
use super::rseq;
use super::vdso::{Lodged, Room};
use std::io;
use std::ops::Range;

/// Every signal but SIGKILL and SIGSTOP, which cannot be blocked, and the one that the thread stops by.
const ALL: u64 = !(1 << (libc::SIGTRAP - 1));
/// More stops than this that are not its own: it will not come to that.
const PATIENCE: u32 = 64;
/// Only what is always set.
const EFLAGS: u64 = 0x202;

/// Why the thread could not be made to work for us.
#[derive(Debug, thiserror::Error)]
pub(super) enum InjectError {
    /// Gone meanwhile, with this wait status; `None`: on its way, and its end will be told by a later wait.
    #[error("the thread ended")]
    Gone(Option<i32>),
    /// Nobody is allowed to make its filter look away.
    #[error("its seccomp filter cannot be suspended without CAP_SYS_ADMIN, or from under a filter: {0}")]
    Seccomp(io::Error),
    /// ptrace, wait or /proc.
    #[error(transparent)]
    System(io::Error),
    /// Nowhere for our code.
    #[error("it has no vDSO of this kernel with room in it (a 32-bit program, a restored one, or vdso=0)")]
    NoVdso,
}

impl From<io::Error> for InjectError {
    /// A stopped thread that is killed is no longer there for any request.
    fn from(error: io::Error) -> InjectError {
        match error.raw_os_error() {
            Some(libc::ESRCH) => InjectError::Gone(None),
            _ => InjectError::System(error),
        }
    }
}

/// Where a thread stands that is borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stands {
    /// At the event of exec, whose result the kernel has yet to put into rax.
    InExec,
    /// At the end of the fork that made it, or of such a borrowing.
    BetweenCalls,
    /// Wherever it was interrupted.
    Anywhere,
}

/// A stopped thread that is borrowed. [`Borrowed::give_back`] or dropping it puts the thread back as it was.
pub(super) struct Borrowed {
    tid: Tid,
    regs: Regs,
    mask: u64,
    code: Lodged,
    /// Where it is to go on: at the beginning, or behind its last stop.
    begun: bool,
    /// It ended meanwhile, or is about to.
    gone: bool,
    /// A signal that could not be blocked, for afterwards.
    held: Option<(i32, SigInfo)>,
    given_back: bool,
}

impl Borrowed {
    /// Borrows `tid`, which stands at a ptrace stop, for the errand.
    pub(super) fn new(tid: Tid, stands: Stands, room: &Room) -> Result<Borrowed, InjectError> {
        let mut regs = ptrace::regs(tid)?;
        match stands {
            Stands::InExec => regs.rax = 0,
            Stands::BetweenCalls => {}
            Stands::Anywhere => regs.rip = rseq::resume_at(tid, regs.rip),
        }
        let mask = ptrace::signal_mask(tid)?;
        if let Err(refused) = ptrace::set_options(tid, OPTIONS | EXITKILL | SUSPEND_SECCOMP) {
            if has_seccomp(tid) {
                return Err(InjectError::Seccomp(refused));
            }
            ptrace::set_options(tid, OPTIONS | EXITKILL)?;
        }
        let code = match Lodged::enter(tid, room, errand::code()) {
            Ok(code) => code,
            Err(error) => {
                let _ = ptrace::set_options(tid, OPTIONS);
                return Err(error);
            }
        };
        let borrowed =
            Borrowed { tid, regs, mask, code, begun: false, gone: false, held: None, given_back: false };
        ptrace::set_signal_mask(tid, ALL)?;
        Ok(borrowed)
    }

    /// Its vDSO.
    pub(super) fn vdso(&self) -> Range<u64> {
        self.code.vdso()
    }

    /// Lets the thread run to the next stop of its own; its registers there.
    pub(super) fn run(&mut self) -> Result<Regs, InjectError> {
        if !self.begun {
            self.begun = true;
            let at_start = Regs {
                rip: self.code.at(),
                // Not in a system call: nothing is restarted on the way out of the stop.
                orig_rax: u64::MAX,
                eflags: EFLAGS,
                r13: errand::NONE,
                r15: errand::NONE,
                ..self.regs
            };
            ptrace::set_regs(self.tid, &at_start)?;
        }
        let stop = self.code.at() + errand::stop_offset();
        for _ in 0..PATIENCE {
            ptrace::resume(self.tid, 0)?;
            match ptrace::wait(self.tid, false)? {
                Waited::For(_, Stop::Gone(status)) => return Err(self.ends(Some(status))),
                // To wait for its end could be for ever: a first thread's is told after those of threads that
                // themselves wait for us.
                Waited::For(_, Stop::Exit) => {
                    ptrace::resume(self.tid, 0)?;
                    return Err(self.ends(None));
                }
                Waited::Nobody => return Err(self.ends(None)),
                Waited::For(_, Stop::Signal(signal)) => {
                    let regs = ptrace::regs(self.tid)?;
                    match signal {
                        libc::SIGTRAP if regs.rip == stop => return Ok(regs),
                        // They cannot be blocked, but they can wait.
                        libc::SIGTRAP | libc::SIGSTOP => {
                            self.held.get_or_insert((signal, ptrace::siginfo(self.tid)?));
                        }
                        // Blocked signals do not come here; a synchronous one would be our own mistake.
                        _ => {
                            let what = format!("signal {signal} in borrowed code at {:#x}", regs.rip);
                            return Err(io::Error::other(what).into());
                        }
                    }
                }
                // Job control and interrupts change nothing about where it stands.
                Waited::For(..) | Waited::Nothing => {}
            }
        }
        Err(io::Error::other("the thread does not reach the end of the borrowed code").into())
    }

    fn ends(&mut self, status: Option<i32>) -> InjectError {
        self.gone = true;
        InjectError::Gone(status)
    }

    /// Puts the thread back; it stays stopped, and is to go on with the signal returned (0: none).
    pub(super) fn give_back(mut self) -> Result<i32, InjectError> {
        self.given_back = true;
        self.restore()
    }

    fn restore(&mut self) -> Result<i32, InjectError> {
        if self.gone {
            return Ok(0);
        }
        let regs = ptrace::set_regs(self.tid, &self.regs);
        // Whatever happens to the one, try the other.
        let mask = ptrace::set_signal_mask(self.tid, self.mask);
        self.code.leave()?;
        mask.and(regs)?;
        ptrace::set_options(self.tid, OPTIONS)?;
        let Some((signal, info)) = self.held.take() else { return Ok(0) };
        ptrace::set_siginfo(self.tid, &info)?;
        Ok(signal)
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if !self.given_back {
            let _ = self.restore();
        }
    }
}
