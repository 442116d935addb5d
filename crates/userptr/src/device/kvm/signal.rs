// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the guest is stopped from outside: a signal that no handler ever sees.
//!
//! The processor's thread has every signal blocked. KVM_RUN unblocks [`KICK`] and SIGBUS for as long as the guest
//! runs (KVM_SET_SIGNAL_MASK): one of them ends KVM_RUN with EINTR and is still pending, and [`take`] consumes it.
//! Nothing is installed in the program that embeds the device. SIGBUS is what the kernel sends when the guest touches a
//! page that the hardware has lost; without this, KVM would try again for ever.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use kvm_ioctls::VcpuFd;

/// No driver, no program and no library uses it: the kernel's list calls it unused.
const KICK: i32 = libc::SIGSTKFLT;
/// _IOW(KVMIO, 0x8b, struct kvm_signal_mask)
const KVM_SET_SIGNAL_MASK: libc::Ioctl = 0x4004_ae8b;
/// Bytes of the kernel's signal set.
const SIGSET_LEN: u32 = 8;

/// What stopped the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// Somebody asked for it.
    Kick,
    /// The page at this address of the process is lost.
    Poison(u64),
}

/// Blocks every signal in the calling thread, and prepares `vcpu`.
pub(super) fn prepare(vcpu: &VcpuFd) -> io::Result<()> {
    let mut all = MaybeUninit::uninit();
    // SAFETY: the set is written before it is read; the mask is this thread's own.
    let blocked = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut())
    };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    let bit = |signal: i32| 1_u64 << (signal - 1);
    #[repr(C, packed)]
    struct Mask {
        len: u32,
        set: u64,
    }
    let mask = Mask { len: SIGSET_LEN, set: !(bit(KICK) | bit(libc::SIGBUS)) };
    // SAFETY: the kernel reads a length and a set of that length.
    if unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Consumes what ended KVM_RUN, in the thread that called it.
pub(super) fn take() -> Option<Stopped> {
    let mut set = MaybeUninit::uninit();
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the set is written before it is read; both signals are blocked in this thread.
    let signal = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), KICK);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGBUS);
        libc::sigtimedwait(set.as_ptr(), info.as_mut_ptr(), &raw const now)
    };
    match signal {
        KICK => Some(Stopped::Kick),
        // SAFETY: sigtimedwait filled it in, and all zeroes is a siginfo_t anyway.
        libc::SIGBUS => Some(Stopped::Poison(unsafe { info.assume_init().si_addr() }.addr() as u64)),
        _ => None,
    }
}

/// The calling thread's id, for [`kick`].
pub(super) fn thread_id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
}

/// Stops the guest that thread `tid` of this process runs, or is about to run.
pub(super) fn kick(tid: u32) {
    // SAFETY: the thread has the signal blocked and consumes it. It is joined before its id can be another's.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, KICK) };
}
