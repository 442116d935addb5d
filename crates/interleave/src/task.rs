// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a thread is doing: its sections that must not sleep, and the locks that it holds.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::panic::Location;

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
            Section::Atomic => "atomic",
            Section::NonBlock => "in a non-blocking section",
        })
    }
}

struct Task {
    atomic: Count,
    non_block: Count,
}

struct Count {
    depth: Cell<u32>,
    outermost: Cell<Option<&'static Location<'static>>>,
}

impl Count {
    const fn new() -> Self {
        Count { depth: Cell::new(0), outermost: Cell::new(None) }
    }
}

thread_local! {
    static TASK: Task = const { Task { atomic: Count::new(), non_block: Count::new() } };
}

impl Task {
    fn count(&self, section: Section) -> &Count {
        match section {
            Section::Atomic => &self.atomic,
            Section::NonBlock => &self.non_block,
        }
    }
}

/// Leaves its section when dropped, also by unwinding.
pub(crate) struct InSection {
    section: Section,
    _thread: PhantomData<*mut ()>,
}

#[inline]
pub(crate) fn enter(section: Section, site: &'static Location<'static>) -> InSection {
    TASK.with(|t| {
        let count = t.count(section);
        if count.depth.get() == 0 {
            count.outermost.set(Some(site));
        }
        count.depth.set(count.depth.get() + 1);
    });
    InSection { section, _thread: PhantomData }
}

impl Drop for InSection {
    #[inline]
    fn drop(&mut self) {
        TASK.with(|t| {
            let depth = &t.count(self.section).depth;
            depth.set(depth.get() - 1);
        });
    }
}

/// The outermost section that forbids sleeping, if any.
#[inline]
pub(crate) fn sleep_forbidden() -> Option<(Section, &'static Location<'static>)> {
    TASK.with(|t| {
        for section in [Section::Atomic, Section::NonBlock] {
            let count = t.count(section);
            if count.depth.get() != 0 {
                return count.outermost.get().map(|site| (section, site));
            }
        }
        None
    })
}
