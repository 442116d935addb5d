// SPDX-License-Identifier: MIT OR Apache-2.0
//! A watch as the monitor sees it, and the lock-free stacks on which watches travel between threads.
//!
//! The life of a node: `watch()` makes it and pushes it on [`ADD`]; the monitor takes it into its index; a change
//! puts it on [`NOTE`] for the callback thread; dropping the watch pushes it on [`DROP`]; the monitor takes it out of
//! the index and pushes it on [`FREE`]; the callback thread, which may free memory, lets it go. One reference count
//! travels `ADD`, index, `FREE`, so a node on `NOTE` or `DROP` is alive as long as it has not come off `FREE`.
//!
//! A stack is pushed to by anybody and emptied as a whole, so it has no ABA problem, needs no lock and no allocation.

use std::cell::UnsafeCell;
use std::fmt;
use std::ptr::{self, NonNull};
use std::time::Duration;

use interleave::{AtomicU32, AtomicU64, Ordering};
use mmu_notifier::Range;

use super::futex::{self, Futex};
use super::index::Links;

/// A link of a stack, or its head.
#[expect(
    clippy::disallowed_types,
    reason = "interleave has no atomic pointer, and no lock can stand in for it: the monitor takes none"
)]
type AtomicLink = std::sync::atomic::AtomicPtr<Node>;

/// Made, not yet in the index.
pub(super) const ADD: usize = 0;
/// The watch has been dropped; still in the index.
pub(super) const DROP: usize = 1;
/// Has something to tell its callback.
pub(super) const NOTE: usize = 2;
/// Out of the index.
pub(super) const FREE: usize = 3;

const UNMAP: u32 = 1;
const REMAP: u32 = 2;
const REMOVE: u32 = 4;
const LOST: u32 = 8;

/// What happened to pages of a watch, as far as is known. Several changes may be told as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The pages of the watch that may have changed: a hull, never less than what changed.
    pub range: Range,
    /// Pages were unmapped, or something else was mapped over them. The watch is dead.
    pub unmapped: bool,
    /// Pages were moved away, or others were moved here. The watch is dead.
    pub moved: bool,
    /// Pages were or are about to be dropped (madvise). The watch lives on.
    pub removed: bool,
    /// The monitor could not tell what happened, or is gone. The watch is dead.
    pub lost: bool,
}

/// What a watch calls.
pub(super) type Callback = Box<dyn Fn(&Change) + Send + Sync>;

/// How an event concerns a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Unmap,
    Remap,
    Remove,
    Lost,
}

pub(super) struct Node {
    /// Immutable.
    pub(super) range: Range,
    /// Owned by the monitor thread.
    pub(super) links: UnsafeCell<Links>,
    next: [AtomicLink; 4],
    /// The even epoch of the last change, or `u64::MAX` for good. Published by the epoch.
    changed_at: AtomicU64,
    /// What the callback has not been told: kinds, and the hull.
    untold: AtomicU32,
    hull_start: AtomicU64,
    hull_end: AtomicU64,
    has_callback: bool,
    /// Who may touch `callback`: see [`Node::call`] and [`Node::close`].
    gate: Futex,
    callback: UnsafeCell<Option<Callback>>,
}

/// The callback runs.
const RUNNING: u32 = 1;
/// The watch is dropped: the callback will not run again.
const GONE: u32 = 2;
/// Its own callback was the first to close it, so the closure goes when that returns.
const BY_ITSELF: u32 = 4;

// SAFETY: `links` is touched by the monitor thread alone; `callback` is guarded by `gate`; the rest is atomic or
// immutable, and the callback is Send + Sync.
unsafe impl Send for Node {}
// SAFETY: as above.
unsafe impl Sync for Node {}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("range", &self.range).finish_non_exhaustive()
    }
}

impl Node {
    pub(super) fn new(range: Range, callback: Option<Callback>) -> Node {
        Node {
            range,
            links: UnsafeCell::new(Links::new(range)),
            next: [const { AtomicLink::new(ptr::null_mut()) }; 4],
            changed_at: AtomicU64::new(0),
            untold: AtomicU32::new(0),
            hull_start: AtomicU64::new(u64::MAX),
            hull_end: AtomicU64::new(0),
            has_callback: callback.is_some(),
            gate: Futex::new(0),
            callback: UnsafeCell::new(callback),
        }
    }

    /// Has it changed after the even epoch `seq`? Right once an even epoch after the change has been loaded.
    pub(super) fn changed_after(&self, seq: u64) -> bool {
        self.changed_at.load(Ordering::Acquire) > seq
    }

    /// Are its pages gone?
    pub(super) fn is_dead(&self) -> bool {
        self.changed_at.load(Ordering::Acquire) == u64::MAX
    }

    /// Monitor only: the pages `[start, end)` changed; `even` is the epoch that will say so. Is there now something
    /// to tell that nobody had been asked to tell?
    pub(super) fn hit(&self, kind: Kind, start: u64, end: u64, even: u64) -> bool {
        let (bit, at) = match kind {
            Kind::Unmap => (UNMAP, u64::MAX),
            Kind::Remap => (REMAP, u64::MAX),
            Kind::Remove => (REMOVE, even),
            Kind::Lost => (LOST, u64::MAX),
        };
        self.changed_at.fetch_max(at, Ordering::AcqRel);
        if !self.has_callback {
            return false;
        }
        self.hull_start.fetch_min(start.max(self.range.start()), Ordering::AcqRel);
        self.hull_end.fetch_max(end.min(self.range.end()), Ordering::AcqRel);
        self.untold.fetch_or(bit, Ordering::AcqRel) == 0
    }

    /// Callback thread only: what is to be told.
    fn take_change(&self) -> Change {
        // The kinds first: whatever the monitor adds from here on comes with a push of its own.
        let kinds = self.untold.swap(0, Ordering::AcqRel);
        let start = self.hull_start.swap(u64::MAX, Ordering::AcqRel);
        let end = self.hull_end.swap(0, Ordering::AcqRel);
        let hull = end.checked_sub(start).and_then(|len| Range::new(start, len).ok());
        Change {
            // An earlier call may have taken the hull of this one along: then all of it is.
            range: hull.unwrap_or(self.range),
            unmapped: kinds & UNMAP != 0,
            moved: kinds & REMAP != 0,
            removed: kinds & REMOVE != 0,
            lost: kinds & LOST != 0,
        }
    }

    /// Callback thread only: tell, unless the watch is dropped. Whether the callback panicked.
    pub(super) fn call(&self) -> bool {
        let change = self.take_change();
        if self.gate.compare_exchange(0, RUNNING, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return false;
        }
        // SAFETY: RUNNING keeps `close` from taking the closure; only this thread sets RUNNING.
        let callback = unsafe { &*self.callback.get() };
        let call = std::panic::AssertUnwindSafe(|| {
            if let Some(callback) = callback {
                callback(&change);
            }
        });
        let panicked = std::panic::catch_unwind(call).is_err();
        let before = self.gate.fetch_and(!RUNNING, Ordering::AcqRel);
        if before & BY_ITSELF != 0 {
            // SAFETY: GONE is set, so nobody calls it again, and its first closer left it to us.
            drop(unsafe { (*self.callback.get()).take() });
        }
        if before & GONE != 0 {
            futex::wake_all(&self.gate);
        }
        panicked
    }

    /// The callback does not run when this returns and will not run again, unless this is the callback itself. May be
    /// called more than once, by several threads.
    pub(super) fn close(&self, on_callback_thread: impl FnOnce() -> bool) {
        let mut gate = self.gate.fetch_or(GONE, Ordering::AcqRel);
        let first = gate & GONE == 0;
        if gate & RUNNING != 0 && on_callback_thread() {
            if first {
                self.gate.fetch_or(BY_ITSELF, Ordering::AcqRel);
            }
            return;
        }
        while gate & RUNNING != 0 {
            futex::wait(&self.gate, gate | GONE, Duration::from_secs(1));
            gate = self.gate.load(Ordering::Acquire);
        }
        if first {
            // SAFETY: GONE without RUNNING: `call` will not look at the closure again; there is one first closer.
            drop(unsafe { (*self.callback.get()).take() });
        }
    }
}

/// A stack of nodes, linked through `next[LINK]`.
pub(super) struct Stack<const LINK: usize> {
    head: AtomicLink,
}

impl<const LINK: usize> Stack<LINK> {
    pub(super) const fn new() -> Self {
        Stack { head: AtomicLink::new(ptr::null_mut()) }
    }

    /// # Safety
    /// `node` stays alive until it has been taken off, and is on no other stack with this link.
    pub(super) unsafe fn push(&self, node: NonNull<Node>) {
        // SAFETY: alive, by the caller's promise.
        let link = unsafe { &node.as_ref().next[LINK] };
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            link.store(head, Ordering::Relaxed);
            match self.head.compare_exchange_weak(head, node.as_ptr(), Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.head.load(Ordering::Relaxed).is_null()
    }

    /// All of them, the last pushed first. A node may be pushed again as soon as it has come out.
    pub(super) fn take(&self) -> Taken<LINK> {
        Taken { next: self.head.swap(ptr::null_mut(), Ordering::AcqRel) }
    }
}

/// What [`Stack::take`] took.
pub(super) struct Taken<const LINK: usize> {
    next: *mut Node,
}

impl<const LINK: usize> Iterator for Taken<LINK> {
    type Item = NonNull<Node>;

    fn next(&mut self) -> Option<NonNull<Node>> {
        let node = NonNull::new(self.next)?;
        // SAFETY: alive until taken off, by the promise of `push`, and this is where it is taken off.
        self.next = unsafe { node.as_ref().next[LINK].load(Ordering::Acquire) };
        Some(node)
    }
}
