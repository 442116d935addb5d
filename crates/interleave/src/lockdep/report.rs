// SPDX-License-Identifier: MIT OR Apache-2.0
//! What lockdep says, and to whom: a bounded list, the log at level error, and a panic if the policy asks for it.

use std::collections::HashSet;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{HeldLock, Site};
use crate::class::{LockClass, Node};
use crate::task::{self, Section};
use crate::world;

/// Reports kept until somebody takes them.
const KEPT: usize = 256;

/// Which rule was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReportKind {
    /// Classes were taken in contradicting orders.
    Inversion,
    /// A class was taken while it was held, with no nesting annotation, or a lock by the thread that holds it.
    Recursion,
    /// Something that may sleep was called in a section that must not.
    SleepInAtomic,
    /// lockdep has run out of room, and some locks are no longer checked.
    Exhausted,
}

/// One order: `inner` was taken at `inner_site` while `outer` was held since `outer_site`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Link {
    /// The class held, with its subclass after a slash.
    pub outer: String,
    /// Where it had been taken.
    pub outer_site: Site,
    /// The class taken.
    pub inner: String,
    /// Where it was taken.
    pub inner_site: Site,
    pub(super) outer_node: Node,
    pub(super) inner_node: Node,
}

/// A broken rule. `Display` gives the whole of it, one order a line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Which rule.
    pub kind: ReportKind,
    /// The classes concerned; for a sleep, those of the locks held.
    pub classes: Vec<String>,
    /// The orders that contradict each other, the newest first. Empty for a sleep.
    pub links: Vec<Link>,
    /// All places: for orders, outer and inner of each; for a sleep, where the section began and where it would sleep.
    pub sites: Vec<Site>,
    summary: String,
    nodes: Vec<Node>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary)?;
        for (i, link) in self.links.iter().enumerate() {
            let Link { outer, outer_site, inner, inner_site, .. } = link;
            let age = if i == 0 { "now" } else { "earlier" };
            write!(
                f,
                "\n  {age}: `{inner}` taken at {inner_site}, while `{outer}` was held since {outer_site}"
            )?;
        }
        Ok(())
    }
}

/// What a report does beside being kept and logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Nothing: the program goes on.
    Record,
    /// A panic, before the lock is taken; for tests. A thread that is panicking already goes on.
    Panic,
}

static REPORTS: Mutex<Vec<Report>> = Mutex::new(Vec::new());
static DROPPED: AtomicUsize = AtomicUsize::new(0);
static PANIC: AtomicBool = AtomicBool::new(false);

/// Takes the reports of the whole process so far, the oldest first.
pub fn take_reports() -> Vec<Report> {
    std::mem::take(&mut *REPORTS.lock())
}

/// The reports kept that concern `class`; they stay. For tests, which share the process with others.
pub fn reports_about(class: &LockClass) -> Vec<Report> {
    let nodes: Vec<Node> = class.registered().collect();
    REPORTS.lock().iter().filter(|r| r.nodes.iter().any(|n| nodes.contains(n))).cloned().collect()
}

/// Sets the policy of the process; it begins as [`Policy::Record`].
pub fn set_policy(policy: Policy) {
    PANIC.store(policy == Policy::Panic, Ordering::Relaxed);
}

/// Runs `f` under `policy`, whatever the policy of the process; this thread only.
pub fn with_policy<R>(policy: Policy, f: impl FnOnce() -> R) -> R {
    task::with_policy(policy, f)
}

pub(super) fn policy() -> Policy {
    task::policy().unwrap_or(if PANIC.load(Ordering::Relaxed) { Policy::Panic } else { Policy::Record })
}

pub(super) fn dropped() -> usize {
    DROPPED.load(Ordering::Relaxed)
}

pub(super) fn order(links: Vec<Link>) -> Report {
    if let [link] = &links[..] {
        let class = &link.outer;
        let summary = format!(
            "recursion on lock class `{class}`: another lock of the class, with no nesting annotation"
        );
        return links_report(ReportKind::Recursion, links, summary);
    }
    let mut summary = String::from("lock order inversion: ");
    for link in links.iter().chain(links.first()) {
        let arrow = if summary.ends_with('`') { " -> " } else { "" };
        let _ = write!(summary, "{arrow}`{}`", link.outer);
    }
    links_report(ReportKind::Inversion, links, summary)
}

/// The thread is about to wait for a lock that it holds.
pub(super) fn same_lock(link: Link) -> Report {
    let class = &link.outer;
    let summary = format!(
        "recursion on lock class `{class}`: the same lock again, so that the thread waits for itself"
    );
    links_report(ReportKind::Recursion, vec![link], summary)
}

fn links_report(kind: ReportKind, links: Vec<Link>, summary: String) -> Report {
    Report {
        kind,
        classes: links.iter().map(|l| l.outer.clone()).collect(),
        sites: links.iter().flat_map(|l| [l.outer_site, l.inner_site]).collect(),
        nodes: links.iter().flat_map(|l| [l.outer_node, l.inner_node]).collect(),
        links,
        summary,
    }
}

pub(super) fn sleep(section: Section, outer: Site, site: Site, held: &[HeldLock]) -> Report {
    let mut summary =
        format!("sleep in atomic context: the thread may sleep at {site}, but {section} since {outer}");
    for lock in held {
        let _ = write!(summary, "\n  holds `{}`", lock.class);
        if let Some(site) = lock.site {
            let _ = write!(summary, " since {site}");
        }
    }
    Report {
        kind: ReportKind::SleepInAtomic,
        classes: held.iter().map(|h| h.class.clone()).collect(),
        links: Vec::new(),
        sites: vec![outer, site],
        nodes: task::current(|t| t.held().map(|h| h.node).collect()),
        summary,
    }
}

pub(super) fn exhausted(site: Site, summary: String) -> Report {
    Report {
        kind: ReportKind::Exhausted,
        classes: Vec::new(),
        links: Vec::new(),
        sites: vec![site],
        nodes: Vec::new(),
        summary,
    }
}

/// Keeps and logs a report.
///
/// # Panics
/// If the policy says so.
pub(super) fn emit(report: Report) {
    {
        let mut reports = REPORTS.lock();
        if reports.len() < KEPT {
            reports.push(report.clone());
        } else {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }
    tracing::error!("{report}");
    if let Some(world) = world::active()
        && !world.aborting()
    {
        world.reported(&report);
    }
    let advisory = report.kind == ReportKind::Exhausted;
    if policy() == Policy::Panic && !advisory && !std::thread::panicking() {
        panic!("{report}");
    }
}

/// Keeps and logs what `report` makes, the first time for this pair of places; under [`Policy::Panic`] each time.
pub(super) fn emit_once(places: (Site, Site), report: impl FnOnce() -> Report) {
    /// Pairs remembered; beyond them every occurrence is a report, and the list of reports is bounded itself.
    const REMEMBERED: usize = 4096;
    static EMITTED: Mutex<Option<HashSet<(Site, Site)>>> = Mutex::new(None);
    let first = {
        let mut emitted = EMITTED.lock();
        let emitted = emitted.get_or_insert_default();
        emitted.len() >= REMEMBERED || emitted.insert(places)
    };
    if first || policy() == Policy::Panic {
        emit(report());
    }
}
