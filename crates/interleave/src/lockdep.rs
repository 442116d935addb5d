// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lock-class graph, always on, in release builds too.
//!
//! Taking a lock of class B while one of class A is held says A before B. The first acquisition that contradicts an
//! order seen before is reported with the places of both, whether or not anything deadlocks in this run. Reported are:
//!
//! * **inversion**: the new order closes a cycle, of any length;
//! * **recursion**: a class is taken while it is held, with no nesting annotation (`lock_nested`). Readers are no
//!   exception: a reader queues behind a waiting writer, so the second read of one thread can wait for ever.
//!   The very lock that the thread holds is recursion whatever the annotation: it waits for itself;
//! * **sleep in atomic**: [`might_sleep`](crate::might_sleep) in a section that must not.
//!
//! A try-lock does not wait, so no order leads *to* it; but orders lead from it while it is held.
//!
//! Once a pair of classes has been looked at, it costs one test of a bit: three to four nanoseconds for a lock under
//! another, a good one for a lock under none (benches/locks.rs). Lock order: the graph, then nothing; the
//! reports, then nothing; neither is held while a report is logged.

mod cycles;
mod graph;
mod report;

use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};

use crate::class::{LockClass, Node};
use crate::task::{self, Held, Section};
use crate::world::{self, World};

pub(crate) use cycles::Cycles;
pub use report::{Link, Policy, Report, ReportKind, reports_about, set_policy, take_reports, with_policy};

/// A place in the source.
pub type Site = &'static Location<'static>;

/// A lock that this thread holds.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeldLock {
    /// The name of its class.
    pub class: String,
    /// Where it was taken.
    pub site: Option<Site>,
    /// Whether it was taken by a try-lock.
    pub tried: bool,
}

/// The locks that this thread holds, the first taken first. Locks beyond the 32nd are not listed.
pub fn held() -> Vec<HeldLock> {
    let held: Vec<Held> = task::current(|t| t.held().rev().collect());
    let graph = graph::GRAPH.lock();
    held.iter().map(|h| HeldLock { class: graph.name(h.node), site: h.site, tried: h.tried }).collect()
}

/// How much lockdep has seen, and what it could not check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Classes and subclasses in the graph.
    pub classes: usize,
    /// Orders between two of them.
    pub orders: usize,
    /// Classes and subclasses that found no room: their locks are not checked.
    pub unchecked_classes: usize,
    /// Locks taken by threads that held too many to record them.
    pub unrecorded_locks: usize,
    /// Reports that were logged but not kept, because nobody took the earlier ones.
    pub dropped_reports: usize,
}

static UNCHECKED_CLASSES: AtomicUsize = AtomicUsize::new(0);
static UNRECORDED_LOCKS: AtomicUsize = AtomicUsize::new(0);

/// The present numbers.
pub fn stats() -> Stats {
    let (classes, orders) = graph::GRAPH.lock().size();
    Stats {
        classes,
        orders,
        unchecked_classes: UNCHECKED_CLASSES.load(Ordering::Relaxed),
        unrecorded_locks: UNRECORDED_LOCKS.load(Ordering::Relaxed),
        dropped_reports: report::dropped(),
    }
}

/// Checks a lock that is about to be waited for.
#[inline(always)]
pub(crate) fn check(class: &'static LockClass, subclass: u8, lock: usize, site: Site) -> Node {
    let node = class.node(subclass);
    if !task::holds_nothing() {
        // One call beside the lock's own code, so that a lock under no other stays small enough to be inlined.
        task::current(|t| check_order(t, node, lock, site));
    }
    node
}

#[inline(never)]
fn check_order(t: &task::Task, node: Node, lock: usize, site: Site) {
    if let Some(world) = world::active() {
        return check_explored(world, t, node, lock, site);
    }
    let mut unknown = graph::bit(node);
    for slot in t.slots() {
        if suspicious(slot, node, lock, &mut unknown) {
            // The last thing that is done here, so that this frame saves no register for it.
            return suspect_all(t, node, lock, site);
        }
    }
}

/// Whether the lock in `slot` is not known to be right. `unknown` is the bit to be looked for, and zero below the last
/// lock that was waited for: orders from there follow from those already recorded.
#[inline(always)]
fn suspicious(slot: &task::Slot, node: Node, lock: usize, unknown: &mut u64) -> bool {
    let outer = slot.node.get();
    let unseen = !graph::seen_word(outer, node) & *unknown != 0;
    if !slot.tried.get() {
        *unknown = 0;
    }
    unseen | (outer == node) | (slot.lock.get() == lock)
}

/// Under exploration the orders belong to the exploration: the same schedule gives the same reports each time.
#[cold]
#[inline(never)]
fn check_explored(world: &dyn World, t: &task::Task, node: Node, lock: usize, site: Site) {
    if world.aborting() || node == Node::UNCHECKED {
        return;
    }
    for held in t.held() {
        if held.node != Node::UNCHECKED {
            world.ordered(held, node, held.lock == lock && held.node == node, site);
        }
        if !held.tried {
            break;
        }
    }
}

#[cold]
#[inline(never)]
fn suspect_all(t: &task::Task, node: Node, lock: usize, site: Site) {
    let mut unknown = graph::bit(node);
    for slot in t.slots() {
        if suspicious(slot, node, lock, &mut unknown) {
            suspect(slot.get(), node, lock, site);
        }
    }
}

fn suspect(held: Held, node: Node, lock: usize, site: Site) {
    let Some(outer_site) = held.site else { return };
    if held.lock == lock {
        // Not an order of classes, which a nesting annotation can make right, so the graph has no part in it.
        return report::emit_once((outer_site, site), || {
            report::same_lock(graph::GRAPH.lock().link(held.node, outer_site, node, site))
        });
    }
    if node == Node::UNCHECKED || held.node == Node::UNCHECKED {
        return;
    }
    let found = graph::GRAPH.lock().add(held.node, outer_site, node, site);
    if let Some(links) = found {
        report::emit(report::order(links));
    }
}

/// Records a lock that was waited for and is now held.
#[inline(always)]
pub(crate) fn acquired(node: Node, lock: usize, site: Site) {
    if !task::push(Held { lock, site: Some(site), node, tried: false }) {
        unrecorded(site);
    }
}

/// Records a lock that was tried and is now held.
#[inline(always)]
pub(crate) fn acquired_by_try(class: &'static LockClass, lock: usize, site: Site) {
    if !task::push(Held { lock, site: Some(site), node: class.node(0), tried: true }) {
        unrecorded(site);
    }
}

/// Records that a lock is let go; where it was taken.
#[inline(always)]
pub(crate) fn released(lock: usize) -> Option<Site> {
    task::pop(lock)
}

#[cold]
#[inline(never)]
fn unrecorded(site: Site) {
    if UNRECORDED_LOCKS.fetch_add(1, Ordering::Relaxed) == 0 {
        report::emit(report::exhausted(
            site,
            format!(
                "a thread holds more than {} locks at {site}: those beyond are not checked",
                task::MAX_HELD
            ),
        ));
    }
}

/// Gives a subclass its node; `slot` keeps it, plus one.
pub(crate) fn register(name: &'static str, subclass: usize, slot: &AtomicU16) -> Node {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    let mut graph = graph::GRAPH.lock();
    if let Some(index) = slot.load(Ordering::Relaxed).checked_sub(1) {
        return Node::new(index.into()).unwrap_or(Node::UNCHECKED);
    }
    let node = graph.register(name, subclass).unwrap_or(Node::UNCHECKED);
    slot.store(node.index() as u16 + 1, Ordering::Relaxed);
    drop(graph);
    if node == Node::UNCHECKED {
        UNCHECKED_CLASSES.fetch_add(1, Ordering::Relaxed);
        if !REPORTED.swap(true, Ordering::Relaxed) {
            report::emit(report::exhausted(
                Location::caller(),
                format!(
                    "no room for lock class `{name}`: it and later ones are not checked (room for {})",
                    Node::MAX - 1
                ),
            ));
        }
    }
    node
}

/// Something that may sleep was called at `site` in a section that began at `outer`.
#[cold]
#[inline(never)]
pub(crate) fn sleep_in_atomic(section: Section, outer: Site, site: Site) {
    if let Some(world) = world::active() {
        if !world.aborting() {
            world.reported(&report::sleep(section, outer, site, &held()));
        }
        return;
    }
    report::emit_once((outer, site), || report::sleep(section, outer, site, &held()));
}
