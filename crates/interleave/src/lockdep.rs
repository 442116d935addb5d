// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lock-class graph, always on.

use std::fmt;
use std::panic::Location;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::task::Section;

/// A place in the source.
pub type Site = &'static Location<'static>;

/// What kind of rule was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReportKind {
    /// Two classes were taken in both orders, perhaps through others.
    Inversion,
    /// A class was taken while it was held, with no nesting annotation.
    Recursion,
    /// Something that may sleep was called in a section that must not.
    SleepInAtomic,
    /// Tables are full: some classes are not checked.
    Exhausted,
}

/// One edge of a report: `inner` was taken at `inner_site` while `outer` was held since `outer_site`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The class that was held.
    pub outer: &'static str,
    /// Where it was taken.
    pub outer_site: Site,
    /// The class that was taken.
    pub inner: &'static str,
    /// Where.
    pub inner_site: Site,
}

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Which rule.
    pub kind: ReportKind,
    /// The classes concerned.
    pub classes: Vec<&'static str>,
    /// The orders that contradict each other, the newest first.
    pub links: Vec<Link>,
    /// All places named, in order.
    pub sites: Vec<Site>,
    /// The rule and the places in words.
    pub text: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What to do at a report, beside recording it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Nothing: the program goes on.
    Record,
    /// Panic, before the lock is taken. For tests.
    Panic,
}

static REPORTS: Mutex<Vec<Report>> = Mutex::new(Vec::new());
static PANIC: AtomicBool = AtomicBool::new(false);

/// Takes what was reported so far, oldest first.
pub fn take_reports() -> Vec<Report> {
    std::mem::take(&mut *REPORTS.lock())
}

/// Sets the policy of the process.
pub fn set_policy(policy: Policy) {
    PANIC.store(policy == Policy::Panic, Ordering::Relaxed);
}

#[cold]
pub(crate) fn sleep_in_atomic(section: Section, outer: Site, site: Site) {
    let text = format!("sleep in atomic context: may sleep at {site}, but {section} since {outer}");
    tracing::error!("{text}");
    REPORTS.lock().push(Report {
        kind: ReportKind::SleepInAtomic,
        classes: vec![],
        links: vec![],
        sites: vec![outer, site],
        text: text.clone(),
    });
    if PANIC.load(Ordering::Relaxed) {
        panic!("{text}");
    }
}
