// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls made by a stopped thread on our behalf.
//!
//! The thread is sent to a `syscall` instruction of its vDSO, stopped again at the entry and at the exit of the call,
//! and put back where it was, so none of its code is written to: no text page is copied.
//! Signals are blocked meanwhile; one that arrives waits and is delivered afterwards. Stops at system calls and not
//! single steps, because a step ends in a forced SIGTRAP, which resets the program's own action for that signal.
//!
//! A thread that was interrupted inside of a restartable sequence is put back at its abort handler ([`super::rseq`]).
//!
//! While the thread is borrowed seccomp filters look away from it, and should we die it is killed: to go on at a place
//! that is not its own could do anything.
//!
//! Preconditions of every call: the thread is stopped and ours. On any error but the death of the thread its registers
//! and mask are put back.

use super::facts::has_seccomp;
use super::ptrace::{self, EXITKILL, OPTIONS, Regs, SUSPEND_SECCOMP, Stop, Tid, Waited};
use super::rseq;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

/// Every signal but SIGKILL and SIGSTOP, which cannot be blocked.
const ALL: u64 = u64::MAX;
/// `syscall`
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// More stops than this without the call: it will not come.
const PATIENCE: u32 = 64;

/// Why the thread could not be made to call.
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
    /// Nothing to call with.
    #[error("it has no vDSO with a system call instruction in it (a 32-bit program, or vdso=0)")]
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

/// A stopped thread that is borrowed. [`Borrowed::give_back`] or dropping it puts the thread back as it was.
pub(super) struct Borrowed {
    tid: Tid,
    regs: Regs,
    mask: u64,
    call_at: u64,
    /// It ended meanwhile, or is about to.
    gone: bool,
    /// One that it is about to be given.
    signal: i32,
    given_back: bool,
}

impl Borrowed {
    /// Borrows `tid`, which stands at a ptrace stop; `in_call`: at the event of a system call (exec), which is let out
    /// of that call first, so that the call's result is among what is put back.
    pub(super) fn new(tid: Tid, in_call: bool) -> Result<Borrowed, InjectError> {
        let call_at = find_syscall(tid)?;
        let mut regs = ptrace::regs(tid)?;
        if !in_call {
            regs.rip = rseq::resume_at(tid, regs.rip);
        }
        let mask = ptrace::signal_mask(tid)?;
        if let Err(refused) = ptrace::set_options(tid, OPTIONS | EXITKILL | SUSPEND_SECCOMP) {
            if has_seccomp(tid) {
                return Err(InjectError::Seccomp(refused));
            }
            ptrace::set_options(tid, OPTIONS | EXITKILL)?;
        }
        let mut borrowed = Borrowed { tid, regs, mask, call_at, gone: false, signal: 0, given_back: false };
        ptrace::set_signal_mask(tid, ALL)?;
        if in_call {
            borrowed.next_call_stop()?;
            borrowed.regs = ptrace::regs(tid)?;
        }
        Ok(borrowed)
    }

    /// Its stack pointer.
    pub(super) fn sp(&self) -> u64 {
        self.regs.rsp
    }

    /// Lets the thread run to the next stop at a system call.
    fn next_call_stop(&mut self) -> Result<(), InjectError> {
        for _ in 0..PATIENCE {
            ptrace::resume_to_syscall(self.tid)?;
            match ptrace::wait(self.tid, false)? {
                Waited::For(_, Stop::Syscall) => return Ok(()),
                Waited::For(_, Stop::Gone(status)) => return Err(self.ends(Some(status))),
                // To wait for its end could be for ever: a first thread's is told after those of threads that
                // themselves wait for us.
                Waited::For(_, Stop::Exit) => {
                    ptrace::resume(self.tid, 0)?;
                    return Err(self.ends(None));
                }
                Waited::Nobody => return Err(self.ends(None)),
                // It cannot be blocked, but it can wait.
                Waited::For(_, Stop::Signal(libc::SIGSTOP)) => self.signal = libc::SIGSTOP,
                // Blocked signals do not come here; a synchronous one would be our own mistake.
                Waited::For(_, Stop::Signal(signal)) => {
                    return Err(io::Error::other(format!("signal {signal} during a borrowed call")).into());
                }
                // Job control and interrupts change nothing about where it stands.
                Waited::For(..) | Waited::Nothing => {}
            }
        }
        Err(io::Error::other("the thread does not reach the borrowed call").into())
    }

    fn ends(&mut self, status: Option<i32>) -> InjectError {
        self.gone = true;
        InjectError::Gone(status)
    }

    /// Makes the thread call `number` with up to six arguments. The kernel's answer, an errno as an error.
    pub(super) fn call(&mut self, number: i64, args: [u64; 6]) -> Result<io::Result<u64>, InjectError> {
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        let want = Regs {
            rip: self.call_at,
            rax: number as u64,
            // Not in a system call: nothing is restarted on the way out of the stop.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.regs
        };
        ptrace::set_regs(self.tid, &want)?;
        self.next_call_stop()?;
        if !ptrace::at_syscall_entry(self.tid)? {
            return Err(io::Error::other("the thread left a call where it should have entered one").into());
        }
        self.next_call_stop()?;
        let answer = ptrace::regs(self.tid)?.rax as i64;
        Ok(match answer {
            -4095..0 => Err(io::Error::from_raw_os_error(-answer as i32)),
            _ => Ok(answer as u64),
        })
    }

    /// Puts the thread back; it stays stopped, and is to go on with the signal returned (0: none).
    pub(super) fn give_back(mut self) -> Result<i32, InjectError> {
        self.given_back = true;
        self.restore()?;
        Ok(self.signal)
    }

    fn restore(&mut self) -> Result<(), InjectError> {
        if self.gone {
            return Ok(());
        }
        let regs = ptrace::set_regs(self.tid, &self.regs);
        // Whatever happens to the one, try the other.
        ptrace::set_signal_mask(self.tid, self.mask)?;
        regs?;
        ptrace::set_options(self.tid, OPTIONS)?;
        if self.was_interrupted() {
            // Only on its way through a signal stop does the kernel begin an interrupted call again, or not.
            ptrace::interrupt(self.tid)?;
            ptrace::resume(self.tid, 0)?;
            match ptrace::wait(self.tid, false)? {
                Waited::For(_, Stop::Trap | Stop::Group) => {}
                Waited::For(_, Stop::Gone(status)) => return Err(self.ends(Some(status))),
                Waited::For(_, Stop::Exit) => {
                    ptrace::resume(self.tid, 0)?;
                    return Err(self.ends(None));
                }
                // Its signal comes again.
                Waited::For(_, Stop::Signal(signal)) => self.signal = signal,
                _ => {}
            }
        }
        Ok(())
    }

    /// Did it stand in a system call that an interruption has ended, to be begun again?
    fn was_interrupted(&self) -> bool {
        const ERESTART_RESTARTBLOCK: i64 = 516;
        const ERESTARTSYS: i64 = 512;
        let answer = -(self.regs.rax as i64);
        (self.regs.orig_rax as i64) >= 0 && (ERESTARTSYS..=ERESTART_RESTARTBLOCK).contains(&answer)
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if !self.given_back {
            let _ = self.restore();
        }
    }
}

/// The address of a `syscall` instruction in the vDSO of `tid`.
fn find_syscall(tid: Tid) -> Result<u64, InjectError> {
    let maps = fs::read_to_string(format!("/proc/{tid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).ok_or(InjectError::NoVdso)?;
    let (start, end) = line
        .split_once(' ')
        .and_then(|(range, _)| range.split_once('-'))
        .and_then(|(a, b)| Some((u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?)))
        .ok_or(InjectError::NoVdso)?;
    // A 32-bit vDSO lies below 4 GiB and speaks another language.
    if end <= 1 << 32 {
        return Err(InjectError::NoVdso);
    }
    let mut code = vec![0; (end - start) as usize];
    fs::File::open(format!("/proc/{tid}/mem"))?.read_exact_at(&mut code, start)?;
    let at = code.windows(2).position(|two| two == SYSCALL).ok_or(InjectError::NoVdso)?;
    Ok(start + at as u64)
}
