// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a thread is doing: its sections that must not sleep, and the locks that it holds.
//!
//! All of it is thread-local, without a destructor and without allocation, so that a lock costs a few stores here.
//! An engine that runs many virtual threads on one OS thread copies it, with [`save`] and [`load`], at each switch.
//! Invariant: the held stack lists locks in the order in which they were taken, whatever the order of their release.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use crate::class::Node;
use crate::lockdep::{Policy, Site};

/// How many locks a thread may hold and still have all of them checked; the kernel has 48.
pub(crate) const MAX_HELD: usize = 32;

/// Why a thread must not sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Section {
    /// A spin lock is held, or preemption is off.
    Atomic,
    /// A non-blocking section of process context.
    NonBlock,
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Section::Atomic => "it has been atomic",
            Section::NonBlock => "it has been in a non-blocking section",
        })
    }
}

/// A lock that is held.
#[derive(Clone, Copy)]
pub(crate) struct Held {
    /// Address of the lock: tells apart locks of one class, never dereferenced.
    pub(crate) lock: usize,
    pub(crate) site: Option<Site>,
    pub(crate) node: Node,
    /// By a try-lock, which cannot have waited: no order leads to it.
    pub(crate) tried: bool,
}

/// A place in the held stack. Field by field, because a wide load of what narrow stores have just written stalls.
pub(crate) struct Slot {
    pub(crate) lock: Cell<usize>,
    site: Cell<Option<Site>>,
    pub(crate) node: Cell<Node>,
    pub(crate) tried: Cell<bool>,
}

impl Slot {
    const fn new() -> Slot {
        Slot {
            lock: Cell::new(0),
            site: Cell::new(None),
            node: Cell::new(Node::UNCHECKED),
            tried: Cell::new(false),
        }
    }

    #[inline(always)]
    fn set(&self, held: Held) {
        self.lock.set(held.lock);
        self.site.set(held.site);
        self.node.set(held.node);
        self.tried.set(held.tried);
    }

    pub(crate) fn get(&self) -> Held {
        let (lock, site) = (self.lock.get(), self.site.get());
        Held { lock, site, node: self.node.get(), tried: self.tried.get() }
    }
}

struct Count {
    depth: Cell<u32>,
    outermost: Cell<Option<Site>>,
}

impl Count {
    const fn new() -> Self {
        Count { depth: Cell::new(0), outermost: Cell::new(None) }
    }
}

/// The state of one thread, or of one virtual thread that is not running.
pub(crate) struct Task {
    atomic: Count,
    non_block: Count,
    /// Locks in `held`, at most [`MAX_HELD`].
    depth: Cell<usize>,
    /// Locks held beyond those.
    beyond: Cell<usize>,
    policy: Cell<Option<Policy>>,
    held: [Slot; MAX_HELD],
}

impl Task {
    pub(crate) const fn new() -> Task {
        Task {
            atomic: Count::new(),
            non_block: Count::new(),
            depth: Cell::new(0),
            beyond: Cell::new(0),
            policy: Cell::new(None),
            held: [const { Slot::new() }; MAX_HELD],
        }
    }

    /// Forgets everything: a new thread.
    pub(crate) fn clear(&self) {
        self.depth.set(0);
        self.beyond.set(0);
        self.policy.set(None);
        self.atomic.depth.set(0);
        self.non_block.depth.set(0);
    }

    fn copy(&self, from: &Task) {
        for (to, slot) in self.held.iter().zip(&from.held).take(from.depth.get()) {
            to.set(slot.get());
        }
        self.depth.set(from.depth.get());
        self.beyond.set(from.beyond.get());
        self.policy.set(from.policy.get());
        for section in [Section::Atomic, Section::NonBlock] {
            let (to, from) = (self.count(section), from.count(section));
            to.depth.set(from.depth.get());
            if from.depth.get() != 0 {
                to.outermost.set(from.outermost.get());
            }
        }
    }

    #[inline(always)]
    fn count(&self, section: Section) -> &Count {
        match section {
            Section::Atomic => &self.atomic,
            Section::NonBlock => &self.non_block,
        }
    }

    /// The locks held, the last one taken first.
    #[inline(always)]
    pub(crate) fn slots(&self) -> impl DoubleEndedIterator<Item = &Slot> {
        self.held[..self.depth.get().min(MAX_HELD)].iter().rev()
    }

    /// Copies of the same.
    pub(crate) fn held(&self) -> impl DoubleEndedIterator<Item = Held> {
        self.slots().map(Slot::get)
    }
}

thread_local! {
    static TASK: Task = const { Task::new() };
}

/// The running thread.
#[inline(always)]
pub(crate) fn current<R>(f: impl FnOnce(&Task) -> R) -> R {
    TASK.with(f)
}

/// Whether this thread holds no lock.
#[inline(always)]
pub(crate) fn holds_nothing() -> bool {
    current(|t| t.depth.get() == 0)
}

/// Leaves its section when dropped, also by unwinding.
pub(crate) struct InSection {
    section: Section,
    _thread: PhantomData<*mut ()>,
}

#[inline(always)]
pub(crate) fn enter(section: Section, site: Site) -> InSection {
    current(|t| {
        let count = t.count(section);
        if count.depth.get() == 0 {
            count.outermost.set(Some(site));
        }
        count.depth.set(count.depth.get() + 1);
    });
    InSection { section, _thread: PhantomData }
}

impl Drop for InSection {
    #[inline(always)]
    fn drop(&mut self) {
        current(|t| {
            let depth = &t.count(self.section).depth;
            depth.set(depth.get() - 1);
        });
    }
}

/// The section that forbids sleeping, if any, and where it began.
#[inline(always)]
pub(crate) fn sleep_forbidden() -> Option<(Section, Site)> {
    current(|t| {
        if t.atomic.depth.get() | t.non_block.depth.get() == 0 {
            return None;
        }
        let section = if t.atomic.depth.get() != 0 { Section::Atomic } else { Section::NonBlock };
        t.count(section).outermost.get().map(|site| (section, site))
    })
}

/// Records that `held` is now held. `false` if the stack is full: the lock stays unchecked.
#[inline(always)]
#[must_use]
pub(crate) fn push(held: Held) -> bool {
    current(|t| {
        let depth = t.depth.get();
        match t.held.get(depth) {
            Some(slot) => {
                slot.set(held);
                t.depth.set(depth + 1);
                true
            }
            None => {
                t.beyond.set(t.beyond.get() + 1);
                false
            }
        }
    })
}

/// Records that the lock at address `lock` is let go; where it was taken, if that is known.
#[inline(always)]
pub(crate) fn pop(lock: usize) -> Option<Site> {
    current(|t| {
        let top = t.depth.get().wrapping_sub(1);
        match t.held.get(top) {
            Some(slot) if slot.lock.get() == lock => {
                t.depth.set(top);
                slot.site.get()
            }
            _ => pop_inner(t, lock),
        }
    })
}

#[cold]
#[inline(never)]
fn pop_inner(t: &Task, lock: usize) -> Option<Site> {
    let depth = t.depth.get();
    let Some(found) = (0..depth).rev().find(|&i| t.held[i].lock.get() == lock) else {
        t.beyond.set(t.beyond.get().saturating_sub(1));
        return None;
    };
    let site = t.held[found].site.get();
    for i in found..depth - 1 {
        t.held[i].set(t.held[i + 1].get());
    }
    t.depth.set(depth - 1);
    site
}

/// Runs `f` with this thread's own policy.
pub(crate) fn with_policy<R>(policy: Policy, f: impl FnOnce() -> R) -> R {
    struct Back(Option<Policy>);
    impl Drop for Back {
        fn drop(&mut self) {
            current(|t| t.policy.set(self.0));
        }
    }
    let _back = Back(current(|t| t.policy.replace(Some(policy))));
    f()
}

/// This thread's own policy, if it has one.
pub(crate) fn policy() -> Option<Policy> {
    current(|t| t.policy.get())
}

/// Copies the state of the running thread, which another virtual thread will be now.
pub(crate) fn save(to: &Task) {
    current(|t| to.copy(t));
}

/// Makes the running thread the one whose state was saved.
pub(crate) fn load(from: &Task) {
    current(|t| t.copy(from));
}
