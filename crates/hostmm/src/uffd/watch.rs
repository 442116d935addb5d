// SPDX-License-Identifier: MIT OR Apache-2.0
//! A subscription to some pages, and the question that its holder asks before trusting what it cached of them.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use interleave::MaySleep;
use mmu_notifier::Range;

use super::callbacks::CALLBACK;
use super::epoch::Word;
use super::node::{Callback, Node};
use super::shared::Shared;
use super::{Core, Gone, WatchError};
use crate::sys::uffd as sys;

/// A moment in the life of one source. Only good for the watches of that source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seq(u64);

/// Pages whose changes are heard. Dropping it ends the subscription: the callback does not run after that.
///
/// How to use one:
/// 1. `let seq = watch.snapshot()?`
/// 2. pin or translate the pages, and cache the result with `seq`;
/// 3. `watch.changed_since_strict(seq)`: if true, undo and start again;
/// 4. before each use of the cached result ask again, strictly or in order, and drop the result if true.
///
/// A watch whose pages were unmapped or moved is dead for good: make a new one. After madvise it lives on.
///
/// # Panics
/// Dropping it may wait for its callback, so it panics where the thread must not sleep (under a spin lock).
pub struct Watch {
    node: Arc<Node>,
    core: Arc<Core>,
    /// Of `core`, which therefore outlives it.
    epoch: Word,
    /// The pages are counted in `registrations`.
    held: bool,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("range", &self.range()).field("dead", &self.node.is_dead()).finish()
    }
}

impl Watch {
    pub(super) fn new(
        core: &Arc<Core>,
        range: Range,
        callback: Option<Callback>,
    ) -> Result<Watch, WatchError> {
        let shared = &core.shared;
        // Whoever had these addresses before may have left an event that is not read or not applied yet, and it would
        // kill the new watch. Not for correctness, so a source that is never quiet goes on.
        match shared.quiet().and_then(|()| shared.even()) {
            Ok(_) | Err(Gone::Busy) => {}
            Err(gone) => return Err(gone.into()),
        }
        let node = Arc::new(Node::new(range, callback));
        let reference = Arc::into_raw(Arc::clone(&node));
        // Before the registration: the monitor must know the watch when it reads the first event of its pages.
        // SAFETY: the reference made above goes with it.
        unsafe { shared.add.push(NonNull::new_unchecked(reference.cast_mut())) };
        let mut watch = Watch { node, core: Arc::clone(core), epoch: shared.epoch.as_word(), held: false };
        MaySleep::enter(|cx| watch.register(cx))?;
        // The monitor may have died in between; its exit only knows what it had taken in.
        watch.core.shared.alive()?;
        Ok(watch)
    }

    fn register(&mut self, cx: &mut MaySleep<'_>) -> Result<(), WatchError> {
        let (shared, range) = (&self.core.shared, self.range());
        let mut registrations = shared.lock_registrations(cx);
        registrations.hold(range);
        let outcome = if registrations.vmas() > shared.vma_budget {
            Err(WatchError::VmaBudget { range, budget: shared.vma_budget })
        } else {
            sys::register(shared.fd(), range).map_err(|source| WatchError::of_register(range, source))
        };
        if let Err(error) = outcome {
            // Only a lack of memory leaves a part registered: the kernel checks the rest beforehand. Pages of another
            // userfaultfd must not be touched, because older kernels take them from their owner.
            let undo = matches!(error, WatchError::NoMemory { .. });
            for free in registrations.release(range) {
                if undo {
                    let _ = sys::unregister(shared.fd(), free);
                }
            }
            return Err(error);
        }
        drop(registrations);
        self.held = true;
        // After the registration: a hole that was there then and is mapped now would not be subscribed, but only a
        // caller who maps the range while asking to watch it can bring that about.
        if !sys::fully_mapped(range) {
            return Err(WatchError::Hole { range, at: first_hole(range) });
        }
        Ok(())
    }

    /// The pages.
    pub fn range(&self) -> Range {
        self.node.range
    }

    /// The present moment, to be taken before the pages are pinned or translated.
    ///
    /// May wait for the monitor to finish a batch, some microseconds.
    ///
    /// # Errors
    /// If nothing can be trusted any more: [`Gone`] says why.
    pub fn snapshot(&self) -> Result<Seq, Gone> {
        let even = self.shared().even()?;
        if self.node.is_dead() { Err(Gone::Unmapped) } else { Ok(Seq(even)) }
    }

    /// May the pages have changed since `seq`, as far as the caller can have been told? Loads only.
    ///
    /// Honours every change whose system call *returned* before this call, in happens-before order. It does not see
    /// a munmap that another thread is still in, although its address may already be somebody else's: then only
    /// [`Watch::changed_since_strict`] is right. True also if the monitor is gone, or this is a forked child.
    #[inline]
    pub fn changed_since_ordered(&self, seq: Seq) -> bool {
        // SAFETY: `core` keeps the epoch.
        unsafe { self.epoch.load() != seq.0 && self.changed_slowly(seq) }
    }

    /// May the pages have changed since `seq`? Right for every address that the caller can have been given.
    ///
    /// One system call, some 200 ns; while a change of any watched memory of the process is in flight, waits for its
    /// event to be read. True also if the monitor is gone, does not answer within
    /// [`Options::patience`](super::Options::patience), or this is a forked child.
    pub fn changed_since_strict(&self, seq: Seq) -> bool {
        self.shared().quiet().is_err() || self.changed_since_ordered(seq)
    }

    #[cold]
    fn changed_slowly(&self, seq: Seq) -> bool {
        self.shared().even().is_err() || self.node.changed_after(seq.0)
    }

    /// Is this the thread that runs callbacks?
    pub(crate) fn is_calling(&self) -> bool {
        self.shared().is_callback_thread()
    }

    /// No callback runs after this returns, unless it is called from one.
    pub(crate) fn silence(&self) {
        if !self.is_calling() {
            // To the lock-class graph the wait for a running callback is a lock: see `CALLBACK`.
            MaySleep::enter(|cx| drop(CALLBACK.acquire(cx)));
        }
        self.node.close(|| self.is_calling());
    }

    fn shared(&self) -> &Shared {
        &self.core.shared
    }
}

/// A moment at which no change of watched memory was in flight.
#[derive(Clone, Copy)]
pub struct Quiet<'s> {
    core: &'s Arc<Core>,
}

impl fmt::Debug for Quiet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Quiet")
    }
}

impl<'s> Quiet<'s> {
    pub(super) fn new(core: &'s Arc<Core>) -> Quiet<'s> {
        Quiet { core }
    }

    /// As [`Watch::changed_since_strict`], for memory that was mapped before the probe. Loads only. True if `watch`
    /// is of another source.
    #[inline]
    pub fn changed_since(&self, watch: &Watch, seq: Seq) -> bool {
        !Arc::ptr_eq(self.core, &watch.core) || watch.changed_since_ordered(seq)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let shared = &self.core.shared;
        match shared.alive() {
            // The descriptor is the parent's address space, and no thread of the source exists here.
            Err(Gone::Forked) => return,
            Err(_) if self.held => {
                MaySleep::enter(|cx| drop(shared.lock_registrations(cx).release(self.range())));
            }
            Ok(()) if self.held => MaySleep::enter(|cx| shared.release(cx, self.range())),
            _ => {}
        }
        self.silence();
        shared.forget(&self.node);
    }
}

/// The first page of `range` that is not mapped.
pub(super) fn first_hole(range: Range) -> u64 {
    let (mut mapped, mut end) = (range.start(), range.end());
    while end - mapped > mmu_notifier::PAGE_SIZE {
        let middle = (mapped + (end - mapped) / 2) & !(mmu_notifier::PAGE_SIZE - 1);
        match Range::new(mapped, middle - mapped) {
            Ok(half) if sys::fully_mapped(half) => mapped = middle,
            _ => end = middle,
        }
    }
    mapped
}
