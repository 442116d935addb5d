// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why would a lookup hit, or not?

use std::fmt;

use interleave::MaySleep;
use mmu_notifier::primary::{PrimaryMmu, Subscription};
use mmu_notifier::{Access, Range};

use super::core::Core;
use super::{CacheError, RegistrationCache};
use crate::device::Device;

/// What a lookup would find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// A registration that contains it, is good for the access, and has not changed.
    Hit,
    /// No registration shares a page with it.
    Unknown,
    /// Registrations share pages with it, and none contains it.
    InPart,
    /// A registration contains it and is for reading only.
    ReadOnly,
    /// A registration contains it and has changed since.
    Changed,
}

/// A registration that shares a page with the range asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its pages.
    pub range: Range,
    /// What the device may do with it.
    pub rights: Access,
    /// Has its range changed since it was registered?
    pub changed: bool,
    /// Does anybody hold a lease?
    pub leased: bool,
}

/// The answer of [`RegistrationCache::explain`]. Prints as lines for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The pages asked about.
    pub range: Range,
    /// The access asked about.
    pub access: Access,
    /// What a lookup would find.
    pub verdict: Verdict,
    /// What is registered there, in order of address.
    pub found: Vec<Found>,
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> RegistrationCache<M, D> {
    /// What a lookup of these bytes would find now, and why. Changes nothing; true for a moment only.
    ///
    /// # Errors
    /// [`CacheError::Range`], [`CacheError::Forked`], [`CacheError::Atomic`].
    pub fn explain(&self, addr: usize, len: usize, access: Access) -> Result<Explanation, CacheError> {
        let range = Range::enclosing(addr as u64, len as u64)?;
        self.at_home()?;
        Ok(MaySleep::try_enter(|cx| self.core.explain(cx, range, access))?)
    }
}

impl<M: PrimaryMmu, D: Device<M>> Core<M, D> {
    fn explain(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Explanation {
        let books = self.books.lock(cx);
        let listed: Vec<(Range, u32)> = books.ranges.overlaps(range).map(|(_, r, i)| (r, *i)).collect();
        drop(books);
        let mut found = Vec::new();
        for (registered, index) in listed {
            let state = self.slab.state(index);
            let leased = self.slab.is_leased(index);
            if !state.is_live() {
                continue;
            }
            self.counters.in_vain.add(1);
            let Some(held) = self.slab.lease(index, state) else { continue };
            let body = held.body();
            let changed = body.watched.as_ref().is_none_or(|w| w.subscription.read_retry(w.seq));
            found.push(Found { range: registered, rights: body.rights, changed, leased });
        }
        found.sort_by_key(|f| (f.range, f.rights));
        let covers = |f: &&Found| f.range.contains(range);
        let allows = |f: &Found| access == Access::Read || f.rights == Access::Write;
        let covering: Vec<&Found> = found.iter().filter(covers).collect();
        let verdict = match () {
            () if covering.iter().any(|f| allows(f) && !f.changed) => Verdict::Hit,
            () if covering.iter().any(|f| allows(f)) => Verdict::Changed,
            () if !covering.is_empty() => Verdict::ReadOnly,
            () if !found.is_empty() => Verdict::InPart,
            () => Verdict::Unknown,
        };
        Explanation { range, access, verdict, found }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Hit => "a hit",
            Verdict::Unknown => "a miss: nothing there is registered",
            Verdict::InPart => "a miss: no single registration contains it",
            Verdict::ReadOnly => "a miss: what contains it is registered for reading only",
            Verdict::Changed => "a miss: the memory changed since it was registered",
        })
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = |access| if access == Access::Write { "write" } else { "read" };
        write!(f, "{} for {}: {}", self.range, access(self.access), self.verdict)?;
        for found in &self.found {
            let changed = if found.changed { ", changed since" } else { "" };
            let leased = if found.leased { ", leased" } else { "" };
            write!(f, "\n  {} for {}{changed}{leased}", found.range, access(found.rights))?;
        }
        Ok(())
    }
}
