// SPDX-License-Identifier: MIT OR Apache-2.0
//! An empty VM on the mm of another program, and nothing else of ours left in it.
//!
//! KVM puts its notifier on the mm of whoever makes the VM, so the program's own thread must make it:
//!
//! ```text
//! in the program                              here
//! mmap a scratch page (not after exec)
//! socketpair                              →   pidfd_getfd one end
//!                                         ←   sendmsg: /dev/kvm
//! recvmsg
//! munmap it
//! ioctl KVM_CREATE_VM                     →   pidfd_getfd the VM
//! close_range: both ends, /dev/kvm and the VM
//! ```
//!
//! /dev/kvm is sent, not opened there: the program may be unprivileged, or live in another root. Everything with memory
//! in it comes before the VM, so that the program's own stream begins empty. All descriptors are close-on-exec and gone
//! at the end; the VM lives by the one here. A program whose table of descriptors is full is given room for the moment.

use super::inject::{Borrowed, InjectError};
use super::limit::{FileLimit, Raise};
use super::ptrace::Tid;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

const KVM_CREATE_VM: u64 = 0xAE01;
const PAGE: u64 = 4096;

// Where things lie in the scratch memory.
const ENDS: u64 = 0;
const MESSAGE: u64 = 64;
const VECTOR: u64 = 192;
const BYTE: u64 = 256;
const CONTROL: u64 = 320;
/// Bytes of it.
const SCRATCH: usize = 384;
/// Descriptors that are open there at once, and some.
const FEW: u64 = 8;
/// CMSG_SPACE(sizeof(int)).
const CONTROL_LEN: u64 = 24;

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

/// Makes the VM on the mm of process `tgid`, whose thread `tid` is stopped (`in_call`: see [`Borrowed::new`]). With it, the
/// signal that the thread is to go on with.
pub(super) fn plant(
    kvm: BorrowedFd<'_>,
    tgid: Tid,
    tid: Tid,
    in_call: bool,
) -> Result<(OwnedFd, i32), PlantError> {
    let planted = try_plant(kvm, tgid, tid, in_call);
    let full = planted.as_ref().is_err_and(PlantError::table_is_full);
    match full.then(|| FileLimit::raise(tgid, Raise::By(FEW))).flatten() {
        // It has left the call by now.
        Some(_room) => try_plant(kvm, tgid, tid, false),
        None => planted,
    }
}

fn try_plant(kvm: BorrowedFd<'_>, tgid: Tid, tid: Tid, in_call: bool) -> Result<(OwnedFd, i32), PlantError> {
    let pidfd = open_pidfd(tgid, tid).map_err(InjectError::from)?;
    let mut thread = Borrowed::new(tid, in_call)?;
    let mut opened = Vec::new();
    let made = match make_vm(&mut thread, kvm, &pidfd, tid, in_call, &mut opened) {
        // It calls nothing more for us.
        Err(PlantError::Inject(error)) => return Err(error.into()),
        made => made,
    };
    close_all(&mut thread, &mut opened)?;
    let signal = thread.give_back()?;
    Ok((made?, signal))
}

/// The VM. What is open there afterwards is in `opened`.
fn make_vm(
    thread: &mut Borrowed,
    kvm: BorrowedFd<'_>,
    pidfd: &OwnedFd,
    tid: Tid,
    in_call: bool,
    opened: &mut Vec<u64>,
) -> Result<OwnedFd, PlantError> {
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{tid}/mem"));
    let memory = memory.map_err(|e| PlantError::Here("opening its memory", e))?;
    let scratch = Scratch::get(thread, &memory, in_call)?;
    let sent = match send_kvm(thread, kvm, pidfd, &memory, scratch.at(), opened) {
        Err(PlantError::Inject(error)) => return Err(error.into()),
        sent => sent,
    };
    scratch.give_back(thread, &memory)?;
    let vm = thread.call(libc::SYS_ioctl, [sent?, KVM_CREATE_VM, 0, 0, 0, 0])?;
    let vm = vm.map_err(|e| PlantError::There("KVM_CREATE_VM", e))?;
    opened.push(vm);
    take(pidfd, vm)
}

/// Memory there for what the calls point to.
enum Scratch {
    /// A page of its own: what a forked child has is shared with its parent, and to write there would be to copy it.
    Page(u64),
    /// Below the stack of a program that has not begun, with what lies there. It saves two calls, and every call is two
    /// switches to the program and back.
    Stack(u64, Vec<u8>),
}

impl Scratch {
    fn get(thread: &mut Borrowed, memory: &File, after_exec: bool) -> Result<Scratch, PlantError> {
        if after_exec && let Some(at) = thread.sp().checked_sub(2 * SCRATCH as u64) {
            let (at, mut there) = (at & !63, vec![0; SCRATCH]);
            memory.read_exact_at(&mut there, at).map_err(|e| PlantError::Here("reading its stack", e))?;
            return Ok(Scratch::Stack(at, there));
        }
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let page = thread.call(libc::SYS_mmap, [0, PAGE, prot, flags, u64::MAX, 0])?;
        Ok(Scratch::Page(page.map_err(|e| PlantError::There("mmap", e))?))
    }

    fn at(&self) -> u64 {
        match self {
            Scratch::Page(at) | Scratch::Stack(at, _) => *at,
        }
    }

    fn give_back(self, thread: &mut Borrowed, memory: &File) -> Result<(), PlantError> {
        match self {
            Scratch::Page(at) => drop(thread.call(libc::SYS_munmap, [at, PAGE, 0, 0, 0, 0])?),
            Scratch::Stack(at, there) => {
                memory.write_all_at(&there, at).map_err(|e| PlantError::Here("writing its stack", e))?;
            }
        }
        Ok(())
    }
}

/// Closes what was opened there, with one call where the numbers follow one another, as they do unless the program's own
/// lie between them.
fn close_all(thread: &mut Borrowed, opened: &mut [u64]) -> Result<(), InjectError> {
    opened.sort_unstable();
    if let [first, .., last] = *opened
        && last - first + 1 == opened.len() as u64
        && thread.call(libc::SYS_close_range, [first, last, 0, 0, 0, 0])?.is_ok()
    {
        return Ok(());
    }
    for fd in opened {
        let _ = thread.call(libc::SYS_close, [*fd, 0, 0, 0, 0, 0])?;
    }
    Ok(())
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

/// Gives the program a descriptor of /dev/kvm; its number there.
fn send_kvm(
    thread: &mut Borrowed,
    kvm: BorrowedFd<'_>,
    pidfd: &OwnedFd,
    memory: &File,
    scratch: u64,
    opened: &mut Vec<u64>,
) -> Result<u64, PlantError> {
    let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64;
    let made = thread.call(libc::SYS_socketpair, [libc::AF_UNIX as u64, kind, 0, scratch + ENDS, 0, 0])?;
    made.map_err(|e| PlantError::There("socketpair", e))?;
    let ends = word(memory, scratch + ENDS)?;
    let (ours, theirs) = (ends & 0xffff_ffff, ends >> 32);
    opened.extend([ours, theirs]);
    let socket = take(pidfd, ours)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [kvm];
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(socket.as_fd(), &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)
        .map_err(|e| PlantError::Here("sendmsg", e.into()))?;
    // struct msghdr: name, name length, vector, its length, control, its length, flags.
    let message = [0, 0, scratch + VECTOR, 1, scratch + CONTROL, CONTROL_LEN, 0];
    write(memory, scratch + MESSAGE, &message)?;
    write(memory, scratch + VECTOR, &[scratch + BYTE, 1])?;
    let flags = (libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) as u64;
    let got = thread.call(libc::SYS_recvmsg, [theirs, scratch + MESSAGE, flags, 0, 0, 0])?;
    got.map_err(|e| PlantError::There("recvmsg", e))?;
    // struct cmsghdr: length, level and type, then the descriptor. A full table leaves it empty.
    if word(memory, scratch + MESSAGE + 40)? < 20 || word(memory, scratch + CONTROL)? < 20 {
        return Err(PlantError::There("recvmsg", io::Error::from_raw_os_error(libc::EMFILE)));
    }
    let kvm_there = word(memory, scratch + CONTROL + 16)? & 0xffff_ffff;
    opened.push(kvm_there);
    Ok(kvm_there)
}

fn word(memory: &File, at: u64) -> Result<u64, PlantError> {
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, at).map_err(|e| PlantError::Here("reading its memory", e))?;
    Ok(u64::from_ne_bytes(bytes))
}

fn write(memory: &File, at: u64, words: &[u64]) -> Result<(), PlantError> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    memory.write_all_at(&bytes, at).map_err(|e| PlantError::Here("writing its memory", e))
}
