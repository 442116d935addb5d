// SPDX-License-Identifier: MIT OR Apache-2.0
//! The oracle: what must hold of a device and its driver, by name, and a judge that looks at each access of the device.
//!
//! The judge is the [`Observer`] of a device. It is called under the lock that a flush of the device's TLB takes: a
//! driver that flushes before the page table changes is never caught in between, and whatever is seen to differ does differ at the access.
//!
//! A stale translation is judged by what it does: a write through it is always wrong, a read is if the word in the
//! frame differs from the word that the CPU would read. A page table entry that is not there is no verdict while the path runs (an
//! entry is cleared before it is set), but it is one after it.
//!
//! What is judged where: 1 to 5 at the access and at the end, 6, 10 and 11 at the end, 7, 8 and 12 by the explorer (contexts, lock
//! classes, bounded steps), 9 at the access.

mod rule;

pub use rule::Rule;

use drivers::{Binding, Callback, Counts, DeviceAccess, DriverBug, Follows, Holds, Moment, Observer};
use interleave::Atomic;
use interleave::explore::{Ghost, note, violation};
use mmu_notifier::{Access, PageAddr, Range};
use softmm::{FrameFreed, FrameId, Mm};
use std::collections::BTreeMap;
use std::fmt;

/// A rule that was broken, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// Which.
    pub rule: Rule,
    /// By what.
    pub how: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.how)
    }
}

type Place = (Binding, PageAddr, usize);

/// What the judge knows beside the machine.
#[derive(Default)]
struct State {
    /// The path is over: what is not mapped now will not be.
    settled: bool,
    /// Ranges between the return of the driver's start and its end.
    open: Vec<Range>,
    /// What was ever notified.
    told: Vec<Range>,
    /// The last value that a device wrote, and where.
    written: BTreeMap<(PageAddr, usize), u64>,
    /// The last value that a device wrote or read, and where.
    known: BTreeMap<Place, u64>,
    broken: Vec<Broken>,
}

/// See the module.
pub struct Oracle {
    holds: Holds,
    /// The program itself gives the memory up: a binding that follows its pages keeps them, by design.
    explicit: bool,
    /// Are the moments known at which the driver's callbacks return and begin?
    windows: bool,
    state: Ghost<State>,
}

impl Oracle {
    /// An oracle for one execution. `explicit`: the program gives the memory up of its own will. `windows`: somebody
    /// tells of starts and ends.
    pub fn new(holds: Holds, explicit: bool, windows: bool) -> Oracle {
        Oracle { holds, explicit, windows, state: Ghost::new(State::default()) }
    }

    /// Says that `rule` is broken. Ends the execution under exploration.
    pub fn broken(&self, rule: Rule, how: String) {
        let broken = Broken { rule, how };
        self.state.update(|state| state.broken.push(broken.clone()));
        violation(|| broken.to_string());
    }

    /// What was broken so far.
    pub fn verdict(&self) -> Vec<Broken> {
        self.state.read(|state| state.broken.clone())
    }

    /// The path is over.
    pub fn settle(&self) {
        self.state.update(|state| state.settled = true);
    }

    /// The start callbacks of `range` have returned.
    pub(crate) fn started(&self, range: Range) {
        note(|| format!("invalidate_range_start {range} returns"));
        self.state.update(|state| {
            state.open.push(range);
            state.told.push(range);
        });
    }

    /// The end callbacks of `range` begin.
    pub(crate) fn ending(&self, range: Range) {
        note(|| format!("invalidate_range_end {range}"));
        self.state.update(|state| {
            if let Some(at) = state.open.iter().position(|open| *open == range) {
                state.open.swap_remove(at);
            }
        });
    }

    /// `callback` tells of `range`.
    pub(crate) fn told(&self, callback: &str, range: Range) {
        note(|| format!("{callback} {range}"));
        self.state.update(|state| state.told.push(range));
    }

    /// The translation of `page` is another one than `before`: was anybody told?
    pub(crate) fn judge_range(&self, page: PageAddr, before: Option<FrameId>, after: Option<FrameId>) {
        if before.is_none() || before == after {
            return;
        }
        if !self.state.read(|state| state.told.iter().any(|range| range.contains_addr(page.get()))) {
            self.broken(Rule::Range, format!("{page:?} was {before:?}, is {after:?}, and nobody was told"));
        }
    }

    /// Every start that did not refuse has had its end.
    pub(crate) fn judge_pairing(&self, counts: &Counts) {
        let starts = counts.callbacks(Callback::Start) - counts.refused;
        let ends = counts.callbacks(Callback::End);
        if starts != ends {
            self.broken(Rule::Pairing, format!("{starts} starts and {ends} ends"));
        }
    }

    /// `before`: when the driver had been closed.
    pub(crate) fn judge_silence(&self, before: &Counts, after: &Counts) {
        let late = after.all_callbacks() - before.all_callbacks();
        if late > 0 {
            self.broken(Rule::Lifetime, format!("{late} callbacks after the driver was closed"));
        }
    }

    /// What the device wrote last to a word of `page`; `None` if it wrote nothing there.
    pub(crate) fn written(&self, page: PageAddr, word: usize) -> Option<u64> {
        self.state.read(|state| state.written.get(&(page, word)).copied())
    }

    /// Is the device meant to stay on its pages when the program gives them up?
    fn stays(&self, access: &DeviceAccess<'_>) -> bool {
        match access.follows {
            Follows::Address => false,
            Follows::Pages => true,
            // What was given up before the device asked for it is the past; where nobody tells, nobody knows.
            Follows::PagesSince(_) if !self.windows => true,
            Follows::PagesSince(Moment(since)) => self.state.read(|state| {
                state.told.iter().skip(since as usize).any(|range| range.contains_addr(access.page.get()))
            }),
        }
    }

    fn judge(&self, access: &DeviceAccess<'_>) -> Option<Broken> {
        let frames = access.mm.machine().frames();
        let (settled, open) = self.state.read(|state| {
            (state.settled, state.open.iter().any(|range| range.contains_addr(access.page.get())))
        });
        let verb = if access.access == Access::Write { "writes" } else { "reads" };
        let broken = |rule, why: &str| {
            let how = format!("the device {verb} {:?} through {:?}: {why}", access.frame.pfn, access.page);
            Some(Broken { rule, how })
        };
        if !frames.is_live(access.frame) {
            return broken(Rule::MemorySafety, "the page was freed");
        }
        let pfn = access.frame.pfn;
        match mapped(access.mm, access.page) {
            Some((frame, writable)) if frame == access.frame => {
                let shared = frames.is_ksm(pfn) || !frames.is_anon(pfn) || frames.mapcount(pfn) > 1;
                let late = self.holds == Holds::ProcessTable && !settled;
                if access.access == Access::Write && !writable && shared && !late {
                    return broken(Rule::WritePermission, "the CPU may not write it, and it is shared");
                }
                if open && self.windows && self.holds == Holds::Nothing {
                    return broken(Rule::Retry, "between the return of the start callback and the end");
                }
                None
            }
            now => {
                let theirs = frames.is_anon(pfn) && !frames.is_ksm(pfn) && frames.mapcount(pfn) > 0;
                if self.explicit && self.stays(access) {
                    // By design it stays on its pages; it must not learn there what another process does since.
                    let known = self.state.read(|state| state.known.get(&place(access)).copied());
                    let word = frames.read(access.frame, access.word).ok();
                    let leak = theirs && access.access == Access::Read && known.is_some() && word != known;
                    let why = "another process alone has the page, and has written it since";
                    return leak.then(|| broken(Rule::Isolation, why)).flatten();
                }
                let rule = if theirs { Rule::Isolation } else { Rule::Coherence };
                let whose = if theirs { ", and another process has the page" } else { "" };
                match now {
                    Some((frame, _)) => {
                        let differs =
                            frames.read(frame, access.word) != frames.read(access.frame, access.word);
                        let harm = access.access == Access::Write || differs;
                        harm.then(|| broken(rule, &format!("the CPU has {:?} there{whose}", frame.pfn)))?
                    }
                    None if settled && !access.mm.peek_pte(access.page).is_swap() => {
                        broken(rule, &format!("the CPU has nothing there{whose}"))
                    }
                    None => None,
                }
            }
        }
    }
}

fn place(access: &DeviceAccess<'_>) -> Place {
    (access.binding, access.page, access.word)
}

/// What the CPU's page table has at `page`, and whether it may be written.
pub(crate) fn mapped(mm: &Mm, page: PageAddr) -> Option<(FrameId, bool)> {
    let pte = mm.peek_pte(page);
    pte.is_mapped().then(|| (mm.machine().frames().id(pte.pfn()), pte.is_writable()))
}

impl Observer for Oracle {
    fn device_access(&self, _: &mut Atomic<'_>, access: &DeviceAccess<'_>) {
        let verb = if access.access == Access::Write { "writes" } else { "reads" };
        note(|| format!("device {verb} {:?} through {:?}", access.frame.pfn, access.page));
        if let Some(Broken { rule, how }) = self.judge(access) {
            self.broken(rule, how);
        }
    }

    fn access_done(&self, _: &mut Atomic<'_>, access: &DeviceAccess<'_>, result: Result<u64, FrameFreed>) {
        match result {
            Ok(value) => self.state.update(|state| {
                state.known.insert(place(access), value);
                if access.access == Access::Write {
                    state.written.insert((access.page, access.word), value);
                }
            }),
            Err(freed) => self.broken(Rule::MemorySafety, freed.to_string()),
        }
    }

    /// As many moments as there were notifications.
    fn now(&self) -> Moment {
        Moment(self.state.read(|state| state.told.len() as u64))
    }

    fn driver_bug(&self, driver: &'static str, bug: DriverBug) {
        let rule = match bug {
            DriverBug::LeakedPins { .. } => Rule::Frames,
            DriverBug::LostDirty { .. } => Rule::Dirty,
            DriverBug::DirtiedFreedPage => Rule::MemorySafety,
            _ => Rule::Lifetime,
        };
        self.broken(rule, format!("{driver}: {bug}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use interleave::explore::FailureKind;

    #[test]
    fn names_lead_back_and_say_where_they_come_from() {
        for rule in Rule::ALL {
            assert_eq!(Rule::from_name(rule.name()), Some(rule));
            assert!(!rule.source().is_empty());
        }
        assert_eq!(Rule::from_name("speed"), None);
    }

    #[test]
    fn a_failure_names_its_rule() {
        let of = Rule::of_failure;
        assert_eq!(of(FailureKind::Violation, "isolation: x"), Some(Rule::Isolation));
        assert_eq!(of(FailureKind::SleepInAtomic, ""), Some(Rule::Context));
        assert_eq!(of(FailureKind::LockOrder, ""), Some(Rule::Locks));
        assert_eq!(of(FailureKind::Livelock, ""), Some(Rule::Liveness));
        assert_eq!(of(FailureKind::Nondeterminism, "coherence: x"), None);
    }
}
