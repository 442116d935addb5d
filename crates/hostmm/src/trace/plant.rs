// SPDX-License-Identifier: MIT OR Apache-2.0
//! An empty VM on the mm of another program, and nothing else of ours left in it.
//!
//! KVM puts its notifier on the mm of whoever makes the VM, so the program's own thread must make it:
//!
//! ```text
//! in the program ([`super::errand`])          here
//! mmap a page, socketpair                 →   pidfd_getfd one end
//!                                         ←   sendmsg: /dev/kvm
//! recvmsg, munmap, ioctl KVM_CREATE_VM    →   pidfd_getfd the VM
//! close all four
//! ```
//!
//! /dev/kvm is sent, not opened there: the program may be unprivileged, or live in another root. All descriptors are
//! close-on-exec and gone at the end; the VM lives by the one here. A program whose table of descriptors is full is given
//! room for the moment.

use super::errand;
use super::inject::{Borrowed, InjectError, Stands};
use super::limit::{FileLimit, Raise};
use super::ptrace::Tid;
use super::vdso::Room;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Descriptors that are open there at once, and some.
const FEW: u64 = 8;

/// Why there is no VM on a program's mm.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlantError {
    /// Its thread could not be made to call.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// A call that it made for us failed.
    #[error("{0} in the program: {1}")]
    There(&'static str, io::Error),
    /// One of ours.
    #[error("{0}: {1}")]
    Here(&'static str, io::Error),
}

impl PlantError {
    /// The thread ended meanwhile: see [`InjectError::Gone`].
    pub(super) fn gone(&self) -> Option<Option<i32>> {
        match self {
            PlantError::Inject(InjectError::Gone(status)) => Some(*status),
            _ => None,
        }
    }

    fn table_is_full(&self) -> bool {
        matches!(self, PlantError::There(_, e) if e.raw_os_error() == Some(libc::EMFILE))
    }
}

/// A VM that was made.
pub(super) struct Made {
    pub(super) vm: OwnedFd,
    /// The signal that the thread is to go on with.
    pub(super) signal: i32,
    /// Where the program's vDSO lies.
    pub(super) vdso: Range<u64>,
}

/// What it takes.
pub(super) struct Planter<'a> {
    kvm: BorrowedFd<'a>,
    room: Option<Room>,
}

impl<'a> Planter<'a> {
    /// With `kvm`, a descriptor of /dev/kvm.
    pub(super) fn new(kvm: BorrowedFd<'a>) -> Planter<'a> {
        Planter { kvm, room: Room::find(errand::code().len()) }
    }

    /// Makes the VM on the mm of process `tgid`, whose thread `tid` is stopped.
    pub(super) fn plant(&self, tgid: Tid, tid: Tid, stands: Stands) -> Result<Made, PlantError> {
        let planted = self.once(tgid, tid, stands);
        let full = planted.as_ref().is_err_and(PlantError::table_is_full);
        match full.then(|| FileLimit::raise(tgid, Raise::By(FEW))).flatten() {
            Some(_room) => self.once(tgid, tid, Stands::BetweenCalls),
            None => planted,
        }
    }

    fn once(&self, tgid: Tid, tid: Tid, stands: Stands) -> Result<Made, PlantError> {
        let room = self.room.as_ref().ok_or(InjectError::NoVdso)?;
        let pidfd = open_pidfd(tgid, tid).map_err(InjectError::from)?;
        let mut thread = Borrowed::new(tid, stands, room)?;
        let (mut vm, mut failed) = (None, None);
        let end = loop {
            let regs = thread.run()?;
            let done = match regs.r14 {
                // If nothing is sent there is nothing to receive, and it comes to its end by that.
                errand::SOCKET => take(&pidfd, regs.r13 & 0xffff_ffff).and_then(|end| send(&end, self.kvm)),
                errand::VM => take(&pidfd, regs.rbp).map(|taken| vm = Some(taken)),
                _ => break regs,
            };
            failed = failed.or(done.err());
        };
        let vdso = thread.vdso();
        let signal = thread.give_back()?;
        match (failed, vm) {
            (Some(error), _) => Err(error),
            (None, Some(vm)) => Ok(Made { vm, signal, vdso }),
            (None, None) => {
                let step = errand::STEPS.get(end.rbx as usize).copied().unwrap_or("a call");
                Err(PlantError::There(step, io::Error::from_raw_os_error(-(end.rbp as i32))))
            }
        }
    }
}

/// A pidfd through which the descriptors of the thread can be had. A first thread that is dead has none any more.
fn open_pidfd(tgid: Tid, tid: Tid) -> io::Result<OwnedFd> {
    let pid = |id| Pid::from_raw(id).ok_or(io::ErrorKind::InvalidInput);
    // PIDFD_THREAD, Linux 6.9.
    let thread = PidfdFlags::from_bits_retain(libc::O_EXCL as u32);
    match pidfd_open(pid(tid)?, thread) {
        Err(rustix::io::Errno::INVAL) => Ok(pidfd_open(pid(tgid)?, PidfdFlags::empty())?),
        other => Ok(other?),
    }
}

/// A copy of its descriptor `fd`.
fn take(pidfd: &OwnedFd, fd: u64) -> Result<OwnedFd, PlantError> {
    pidfd_getfd(pidfd, fd as i32, PidfdGetfdFlags::empty())
        .map_err(|e| PlantError::Here("pidfd_getfd", e.into()))
}

/// Sends a descriptor.
fn send(socket: &OwnedFd, fd: BorrowedFd<'_>) -> Result<(), PlantError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(socket.as_fd(), &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(|e| PlantError::Here("sendmsg", e.into()))
}
