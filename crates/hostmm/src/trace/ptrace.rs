// SPDX-License-Identifier: MIT OR Apache-2.0
//! ptrace(2), as far as we need it: requests on a stopped thread, and what a wait status says.
//!
//! Every request must come from the thread that seized the tracee (the kernel answers ESRCH to any other), and works
//! only while the tracee is stopped, but for seize, interrupt and the killing of it.

use std::io;
use std::mem::MaybeUninit;
use std::ptr::null_mut;

/// A thread of a traced program, by its kernel id.
pub(super) type Tid = libc::pid_t;

/// The registers of a stopped thread.
pub(super) type Regs = libc::user_regs_struct;

/// What a signal tells besides its number.
pub(super) type SigInfo = libc::siginfo_t;

/// Which stops we ask for: where an mm is made, shared or lost.
pub(super) const OPTIONS: i32 = libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXIT;
/// The tracee is killed if its tracer ends.
pub(super) const EXITKILL: i32 = libc::PTRACE_O_EXITKILL;
/// Seccomp filters look away (CAP_SYS_ADMIN, Linux 4.3). Not in every libc.
pub(super) const SUSPEND_SECCOMP: i32 = 1 << 21;

const GETSIGMASK: libc::c_uint = 0x420a;
const SETSIGMASK: libc::c_uint = 0x420b;
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// Bytes of a kernel sigset.
const SIGSET: usize = 8;

fn request(what: libc::c_uint, tid: Tid, addr: usize, data: usize) -> io::Result<i64> {
    // SAFETY: `addr` and `data` are integers or pointers to memory that the caller of this private function owns, is
    // as large as the request demands, and outlives the call.
    match unsafe { libc::ptrace(what, tid, addr, data) } {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}

/// Begins to trace a thread without stopping it.
pub(super) fn seize(tid: Tid, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

pub(super) fn set_options(tid: Tid, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// Makes a seized thread stop soon, with [`Stop::Trap`].
pub(super) fn interrupt(tid: Tid) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets it go on, delivering `signal` if that is not 0.
pub(super) fn resume(tid: Tid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Leaves it stopped, as its job control wants, but listens for the end of that.
pub(super) fn listen(tid: Tid) -> io::Result<()> {
    request(libc::PTRACE_LISTEN, tid, 0, 0).map(drop)
}

/// Ends the tracing; the thread goes on, with `signal` if that is not 0.
pub(super) fn detach(tid: Tid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// Sends a process a signal.
pub(super) fn kill(tid: Tid, signal: i32) -> io::Result<()> {
    // SAFETY: takes integers.
    if unsafe { libc::kill(tid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub(super) fn regs(tid: Tid) -> io::Result<Regs> {
    let mut regs = MaybeUninit::<Regs>::uninit();
    request(libc::PTRACE_GETREGS, tid, 0, regs.as_mut_ptr() as usize)?;
    // SAFETY: the request succeeded, so it filled all of it; any bits are valid.
    Ok(unsafe { regs.assume_init() })
}

pub(super) fn set_regs(tid: Tid, regs: &Regs) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, std::ptr::from_ref(regs) as usize).map(drop)
}

/// The signals that the thread blocks, a bit each.
pub(super) fn signal_mask(tid: Tid) -> io::Result<u64> {
    let mut mask = 0_u64;
    request(GETSIGMASK, tid, SIGSET, &raw mut mask as usize)?;
    Ok(mask)
}

pub(super) fn set_signal_mask(tid: Tid, mask: u64) -> io::Result<()> {
    request(SETSIGMASK, tid, SIGSET, &raw const mask as usize).map(drop)
}

/// Of the signal that it has stopped for.
pub(super) fn siginfo(tid: Tid) -> io::Result<SigInfo> {
    let mut info = MaybeUninit::<SigInfo>::zeroed();
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as usize)?;
    // SAFETY: the request succeeded, so it filled all of it; any bits are valid.
    Ok(unsafe { info.assume_init() })
}

/// Makes it another signal that it has stopped for.
pub(super) fn set_siginfo(tid: Tid, info: &SigInfo) -> io::Result<()> {
    request(libc::PTRACE_SETSIGINFO, tid, 0, std::ptr::from_ref(info) as usize).map(drop)
}

/// Where the thread's struct rseq lies, if it has one.
pub(super) fn rseq_area(tid: Tid) -> io::Result<Option<u64>> {
    // struct ptrace_rseq_configuration: the address, then size, signature, flags and padding.
    let mut configuration = [0_u64; 3];
    let size = size_of_val(&configuration);
    request(GET_RSEQ_CONFIGURATION, tid, size, configuration.as_mut_ptr() as usize)?;
    Ok(Some(configuration[0]).filter(|area| *area != 0))
}

/// Why a wait returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// It is gone, with this wait status.
    Gone(i32),
    /// It made a child or a thread; the message is its id.
    Child,
    /// It has a new program, and a new mm.
    Exec,
    /// It is about to end; its mm is still there.
    Exit,
    /// Job control stopped it.
    Group,
    /// It was new or interrupted.
    Trap,
    /// It is about to be given this signal.
    Signal(i32),
}

impl Stop {
    /// What `status`, as wait4(2) gives it, means.
    pub(super) fn of(status: i32) -> Stop {
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            return Stop::Gone(status);
        }
        let signal = libc::WSTOPSIG(status);
        match status >> 16 {
            0 => Stop::Signal(signal),
            libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => Stop::Child,
            libc::PTRACE_EVENT_EXEC => Stop::Exec,
            libc::PTRACE_EVENT_EXIT => Stop::Exit,
            libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Trap,
            libc::PTRACE_EVENT_STOP => Stop::Group,
            _ => Stop::Trap,
        }
    }
}

/// What a wait found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waited {
    /// This thread has stopped or ended.
    For(Tid, Stop),
    /// None has, yet.
    Nothing,
    /// There is nobody to wait for: no tracee and no child of the calling thread.
    Nobody,
}

/// Waits for any tracee (-1) or one of the calling thread; with `nohang` only looks.
pub(super) fn wait(tid: Tid, nohang: bool) -> io::Result<Waited> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD | if nohang { libc::WNOHANG } else { 0 };
    // SAFETY: a local integer for the status; no usage is asked for.
    match unsafe { libc::wait4(tid, &raw mut status, flags, null_mut()) } {
        0 => Ok(Waited::Nothing),
        -1 => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ECHILD) => Ok(Waited::Nobody),
            e if e.kind() == io::ErrorKind::Interrupted => Ok(Waited::Nothing),
            e => Err(e),
        },
        tid => Ok(Waited::For(tid, Stop::of(status))),
    }
}
