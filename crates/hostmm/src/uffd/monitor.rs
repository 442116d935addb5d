// SPDX-License-Identifier: MIT OR Apache-2.0
//! The thread that reads events.
//!
//! Whoever changes subscribed memory sleeps in the kernel until this thread has read the event, with whatever locks
//! it holds: an allocator's, the application's, libc's. So from the first registration on this thread allocates
//! nothing, frees nothing, logs nothing, takes no lock and runs no code of others; it blocks all signals. All that
//! it does is poll, read, walk its own index and write atomics.
//!
//! Order, for each batch: epoch odd; read; mark; epoch even; wake. The epoch is odd before the read because the read
//! is what lets the unmapper return. Between two batches nothing is lost: what has not been read keeps its caller
//! asleep and `mmap_changing` raised.
//!
//! It has a descriptor table of its own, with nothing in it but its two files: an application that closes descriptors
//! which are not its own can neither make it deaf nor have it read from a stranger's file.
//!
//! It ends in one way only, [`Exit`], also when it panics: the epoch says closed, every registration is undone, what
//! was in flight is read, and the callback thread closes the descriptor. Then every check fails closed and nobody
//! waits.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use interleave::Ordering;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::Fault;
use super::index::Index;
use super::node::{Kind, Node};
use super::shared::{Shared, nap, this_thread};
use crate::sys::uffd::{self as sys, Event, Msg, Probe};

/// Why the loop ended; for the reader of the code only.
enum End {
    Asked,
    /// The descriptor is not a userfaultfd any more, or the kernel refuses to read it.
    Broken,
}

pub(super) fn run(shared: Arc<Shared>, mut batch: Box<[Msg]>) {
    let mut exit = Exit { shared: &shared, index: Index::new() };
    shared.monitor_tid.store(this_thread(), Ordering::Release);
    let alone = own_descriptor_table(shared.uffd.as_raw_fd(), shared.wake.as_raw_fd());
    let _: End = turn(&shared, &mut exit.index, &mut batch, alone);
}

/// From here on this thread's table holds only `a` and `b`. False where the kernel has no close_range (5.9) or refuses
/// it: then the table stays the process's.
fn own_descriptor_table(a: RawFd, b: RawFd) -> bool {
    let (low, high) = (a.min(b).cast_unsigned(), a.max(b).cast_unsigned());
    let close = |first: u32, last: u32, flags: u32| {
        // SAFETY: with CLOSE_RANGE_UNSHARE the table is a copy of our own, and so it is in the later calls.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) == 0 }
    };
    if !close(high + 1, u32::MAX, libc::CLOSE_RANGE_UNSHARE) {
        return false;
    }
    if low > 0 {
        close(0, low - 1, 0);
    }
    if low + 1 < high {
        close(low + 1, high - 1, 0);
    }
    true
}

fn turn(shared: &Shared, index: &mut Index, batch: &mut [Msg], alone: bool) -> End {
    // SAFETY: both descriptors are owned by `shared`, which outlives the loop.
    let (uffd, wake) = unsafe {
        (BorrowedFd::borrow_raw(shared.uffd.as_raw_fd()), BorrowedFd::borrow_raw(shared.wake.as_raw_fd()))
    };
    loop {
        let mut fds =
            [PollFd::from_borrowed_fd(uffd, PollFlags::IN), PollFd::from_borrowed_fd(wake, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return End::Broken,
        }
        let [events, woken] = fds.map(|fd| fd.revents());
        if !woken.is_empty() {
            let _ = rustix::io::read(wake, &mut [0u8; 8]);
            if shared.stop.load(Ordering::Acquire) {
                return End::Asked;
            }
            match Fault::from_word(shared.fault.swap(0, Ordering::AcqRel)) {
                Some(Fault::Panic) => panic!("injected"),
                Some(Fault::Return) => return End::Broken,
                Some(Fault::Lose) => lose_everything(shared, index),
                None => {}
            }
        }
        if events.contains(PollFlags::IN) {
            if hear(shared, index, batch, alone).is_err() {
                return End::Broken;
            }
        } else if !events.is_empty() {
            return End::Broken;
        } else {
            sync(shared, index);
        }
        if !woken.is_empty() && !shared.free.is_empty() {
            shared.wake_callbacks();
        }
    }
}

/// One batch.
fn hear(shared: &Shared, index: &mut Index, batch: &mut [Msg], alone: bool) -> Result<(), ()> {
    let even = shared.epoch.begin();
    // Somebody who closes descriptors that are not his may have given the number to another file: not ours to read.
    if !alone && sys::probe(shared.fd()) == Probe::Dead {
        return Err(());
    }
    let read = match sys::read(shared.fd(), batch) {
        Ok(read) => read,
        // Another's read, or a change whose thread was killed.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => 0,
        // The epoch stays odd: it is not for us to say that nothing happened.
        Err(_) => return Err(()),
    };
    // After the read: a watch is pushed before it is registered, so the watches of what was read are all here.
    sync(shared, index);
    let mut told = false;
    for msg in batch.iter().take(read) {
        told |= apply(shared, index, msg, even);
    }
    if read == batch.len() {
        shared.counters.full_batches.fetch_add(1, Ordering::Relaxed);
    }
    shared.epoch.end(even);
    shared.wake_waiting();
    if told {
        shared.wake_callbacks();
    }
    Ok(())
}

/// Marks what `msg` concerns. Whether the callback thread has something to do.
fn apply(shared: &Shared, index: &mut Index, msg: &Msg, even: u64) -> bool {
    let mut told = false;
    let mut mark = |kind, start: u64, end: u64| {
        index.overlapping(start, end, |node| told |= hit(shared, node, kind, start, end, even));
    };
    let counter = match msg.event() {
        Event::Unmap { start, end } => {
            mark(Kind::Unmap, start, end);
            &shared.counters.unmaps
        }
        Event::Remove { start, end } => {
            mark(Kind::Remove, start, end);
            &shared.counters.removes
        }
        Event::Remap { from, to, len } => {
            mark(Kind::Remap, from, from.saturating_add(len));
            mark(Kind::Remap, to, to.saturating_add(len));
            shared.strays.push(to, len);
            told = true;
            &shared.counters.remaps
        }
        Event::Other { .. } => {
            mark(Kind::Lost, 0, u64::MAX);
            &shared.counters.lost
        }
    };
    counter.fetch_add(1, Ordering::Relaxed);
    told
}

fn hit(shared: &Shared, node: NonNull<Node>, kind: Kind, start: u64, end: u64, even: u64) -> bool {
    // SAFETY: nodes in the index are alive.
    let first = unsafe { node.as_ref() }.hit(kind, start, end, even);
    if first {
        // SAFETY: alive until it comes off `free`, which the callback thread empties after `note`; `first` says that
        // it is not on `note`.
        unsafe { shared.note.push(node) };
    }
    first
}

/// Takes in new watches and lets dropped ones go.
///
/// Wakes nobody to free them: on an event that would cost the unmapper another thread's turn on its CPU. Whoever drops
/// watches wakes the monitor once in a while (`Shared::forget`), and then they are freed.
fn sync(shared: &Shared, index: &mut Index) {
    // Dropped ones first: whatever is dropped by then has been added by then.
    let dropped = shared.drop.take();
    for node in shared.add.take() {
        // SAFETY: it comes with a reference of its own and has been in no index.
        unsafe { index.insert(node) };
    }
    for node in dropped {
        // SAFETY: added before it was dropped, so it is in the index; then nobody but `free` has it.
        unsafe {
            index.remove(node);
            shared.free.push(node);
        }
    }
}

/// Every watch is dead.
fn lose_everything(shared: &Shared, index: &mut Index) {
    let even = shared.epoch.begin();
    sync(shared, index);
    index.overlapping(0, u64::MAX, |node| {
        hit(shared, node, Kind::Lost, 0, u64::MAX, even);
    });
    shared.counters.lost.fetch_add(1, Ordering::Relaxed);
    shared.epoch.end(even);
    shared.wake_waiting();
    shared.wake_callbacks();
}

/// How the monitor ends.
struct Exit<'s> {
    shared: &'s Shared,
    index: Index,
}

impl Drop for Exit<'_> {
    fn drop(&mut self) {
        let shared = self.shared;
        // First: nobody may be let go before every check fails.
        shared.epoch.close();
        shared.wake_waiting();
        sync(shared, &mut self.index);
        // A forked child may hold the descriptor open, and then closing ours frees nobody: undo the registrations,
        // and read until nothing is in flight, which takes as long as the longest munmap. Bounded, some seconds.
        self.index.overlapping(0, u64::MAX, |node| {
            // SAFETY: nodes in the index are alive.
            let node_ref = unsafe { node.as_ref() };
            let _ = sys::unregister(shared.fd(), node_ref.range);
            hit(shared, node, Kind::Lost, 0, u64::MAX, u64::MAX);
        });
        let mut msg = [Msg::default(); 16];
        for tries in 0..100_000 {
            match sys::probe(shared.fd()) {
                Probe::InFlight => drop(sys::read(shared.fd(), &mut msg)),
                Probe::Quiet | Probe::Dead => break,
            }
            if tries < 100 { rustix::thread::sched_yield() } else { nap() }
        }
        while let Some(node) = self.index.any() {
            // SAFETY: it is in the index; `free` takes over its reference.
            unsafe {
                self.index.remove(node);
                shared.free.push(node);
            }
        }
        shared.monitor_gone.store(true, Ordering::Release);
        shared.wake_callbacks();
    }
}
