// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whose memory each change was, what caused it, and how much of that there is.
//!
//! A record names the task that changed memory, not the memory's owner. A task of a watched process changes its own mm;
//! anybody else (a kernel thread, a process that truncates a shared file) changes an mm that maps the address, and where
//! more than one does it is said so.
//!
//! Records and the news of processes come from two threads, so a record may be here before the news that its process
//! has an mm, and before the last look at the mappings of a program that lives for a moment: each waits for one round.

use super::calls::Calls;
use super::cause;
use super::cost::{Cost, WorkingSet};
use super::regions::Regions;
use super::timeline::Timeline;
use super::unwind::Unwind;
use hostmm::kvm::stream::Change;
use hostmm::trace::Tgid;
use mmu_notifier::PAGE_SIZE;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::time::Duration;

/// News of a process, in the order in which it happened.
#[derive(Debug)]
pub(super) enum News {
    /// From `at` on `tgid` lives in a new mm; its maps, opened then, and what fork announces because of us.
    Made { tgid: Tgid, at: u64, program: String, maps: Option<File>, vdso: Range<u64> },
    /// From `at` on it lives in that of `with`.
    Shared { tgid: Tgid, with: Tgid, at: u64 },
    /// It has no notifier.
    Unwatched { tgid: Tgid, why: String },
    /// Its mappings, for the last time.
    Ends { tgid: Tgid, maps: Vec<u8> },
    /// It is gone, since `at`.
    Gone { tgid: Tgid, at: u64 },
}

/// A watched mm.
#[derive(Debug)]
pub(super) struct Mm {
    pub(super) tgid: Tgid,
    pub(super) program: String,
    pub(super) regions: Regions,
    pub(super) changed: Amount,
    /// From when to when.
    lived: Range<u64>,
    /// Fork announces it because the watcher has written to it; nobody else does.
    vdso: Range<u64>,
}

/// How many changes and how many pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) count: u64,
    pub(super) pages: u64,
}

impl Amount {
    fn add(&mut self, pages: u64) {
        self.count += 1;
        self.pages = self.pages.saturating_add(pages);
    }
}

/// Where in a program's code: a file and an offset in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Site {
    pub(super) file: String,
    pub(super) offset: u64,
}

/// The sums.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) mms: Vec<Mm>,
    /// Since when each process lives in which mm, oldest first.
    lives: HashMap<Tgid, Vec<(u64, usize)>>,
    pub(super) by_cause: BTreeMap<String, Amount>,
    pub(super) by_region: BTreeMap<(usize, String), Amount>,
    pub(super) by_site: HashMap<(String, Site), Amount>,
    /// Changes of an address that more than one watched mm maps, by somebody who is none of them.
    pub(super) ambiguous: u64,
    /// Changes by others of addresses that no watched mm maps: other programs' memory.
    pub(super) foreign: u64,
    pub(super) unwatched: Vec<(Tgid, String)>,
    pub(super) timeline: Timeline,
    pub(super) cost: Option<Cost>,
    waiting: Vec<Change>,
    calls: Calls,
    unwind: Unwind,
    /// Our own process, whose memory is not what is asked for.
    ours: u32,
}

impl Tally {
    pub(super) fn new(working_set: Option<WorkingSet>) -> Tally {
        Tally { ours: std::process::id(), cost: working_set.map(Cost::new), ..Tally::default() }
    }

    pub(super) fn news(&mut self, news: News) {
        match news {
            News::Made { tgid, at, program, maps, vdso } => {
                self.end(tgid, at);
                let mut regions = Regions::of(maps);
                let _ = regions.at(0);
                let (changed, lived) = (Amount::default(), at..u64::MAX);
                self.mms.push(Mm { tgid, program, regions, changed, lived, vdso });
                self.lives.entry(tgid).or_default().push((at, self.mms.len() - 1));
            }
            News::Shared { tgid, with, at } => {
                if let Some(mm) = self.lives.get(&with).and_then(|lives| lives.last()).map(|(_, mm)| *mm) {
                    self.lives.entry(tgid).or_default().push((at, mm));
                }
            }
            News::Unwatched { tgid, why } => self.unwatched.push((tgid, why)),
            News::Ends { tgid, maps } => {
                if let Some(mm) = self.mm_of(tgid) {
                    self.mms[mm].regions.know(&maps);
                }
            }
            News::Gone { tgid, at } => self.end(tgid, at),
        }
    }

    /// From the first process to the end of the last, or until now.
    pub(super) fn lived(&self) -> Duration {
        let from = self.mms.iter().map(|mm| mm.lived.start).min();
        let to = self.mms.iter().map(|mm| mm.lived.end).max().map(|end| end.min(hostmm::trace::now()));
        from.zip(to).map_or(Duration::ZERO, |(from, to)| Duration::from_nanos(to.saturating_sub(from)))
    }

    fn mm_of(&self, tgid: Tgid) -> Option<usize> {
        self.lives.get(&tgid)?.last().map(|(_, mm)| *mm)
    }

    /// The mm of `tgid` lives no longer, unless it was only borrowed.
    fn end(&mut self, tgid: Tgid, at: u64) {
        if let Some(mm) = self.mm_of(tgid)
            && self.mms[mm].tgid == tgid
        {
            self.mms[mm].lived.end = at;
            self.mms[mm].regions.close();
        }
    }

    /// Takes what has come and counts what came a round ago; `last`: counts everything.
    pub(super) fn changes(&mut self, new: &mut Vec<Change>, last: bool) {
        let ours = self.ours;
        new.retain(|change| change.record.tgid != ours);
        for change in std::mem::replace(&mut self.waiting, std::mem::take(new)) {
            self.count(&change);
        }
        if last {
            for change in std::mem::take(&mut self.waiting) {
                self.count(&change);
            }
            return;
        }
        // Whose mappings are not known yet are looked at now, while they may still be there.
        for at in 0..self.waiting.len() {
            if let Some(mm) = self.owner(&self.waiting[at]) {
                let start = self.waiting[at].record.start;
                let _ = self.mms[mm].regions.at(start);
            }
        }
    }

    /// The mm that the task which made the change lives in.
    fn owner(&self, change: &Change) -> Option<usize> {
        let lives = self.lives.get(&Tgid::try_from(change.record.tgid).ok()?)?;
        lives.iter().rev().find(|(at, _)| *at <= change.record.ktime_ns).map(|(_, mm)| *mm)
    }

    fn count(&mut self, change: &Change) {
        let start = change.record.start;
        match self.owner(change) {
            // What it faults in is its own, or, if it had to reclaim, most likely so.
            Some(mm) if !cause::reaches_others(change) || self.mms[mm].regions.maps(start) => {
                return self.add(mm, change, &cause::of_task(change));
            }
            // Another program's own memory: it has a VM as well.
            None if cause::is_of_own(change) => {
                self.foreign += 1;
                return;
            }
            _ => {}
        }
        let mut owners = Vec::new();
        for (at, mm) in self.mms.iter_mut().enumerate() {
            if mm.lived.contains(&change.record.ktime_ns) && mm.regions.maps(start) {
                owners.push(at);
            }
        }
        match (&owners[..], self.owner(change)) {
            ([mm], own) if own != Some(*mm) => self.add(*mm, change, &cause::of_other(change)),
            // Nobody maps it any more: then it was the memory of who did it.
            ([] | [_], Some(own)) => self.add(own, change, &cause::of_task(change)),
            ([], None) => self.foreign += 1,
            _ => self.ambiguous += 1,
        }
    }

    fn add(&mut self, mm: usize, change: &Change, cause: &str) {
        let (start, end) = (change.record.start, change.record.end);
        if cause == cause::FORK && self.mms[mm].vdso == (start..end) {
            return;
        }
        // clear_refs announces everything: that is not so many pages.
        let whole = start >= end || end > 1 << 47;
        let pages = if whole { 0 } else { (end - start).div_ceil(PAGE_SIZE) };
        let this = &mut self.mms[mm];
        this.changed.add(pages);
        let region = this.regions.at(start);
        let name = match region {
            _ if whole => "the whole address space",
            Some((_, region)) => region.name.as_str(),
            None => "gone before it was seen",
        };
        if let Some(cost) = &mut self.cost {
            cost.add(cause, start, end, whole, region.map(|(_, r)| r));
        }
        match self.by_cause.get_mut(cause) {
            Some(amount) => amount.add(pages),
            None => self.by_cause.entry(cause.to_owned()).or_default().add(pages),
        }
        self.timeline.add(change.record.ktime_ns, mm, start, pages, cause);
        self.by_region.entry((mm, name.to_owned())).or_default().add(pages);
        if let Some(site) = this.site(change, &mut self.calls, &mut self.unwind) {
            self.by_site.entry((cause.to_owned(), site)).or_default().add(pages);
        }
    }
}

impl Mm {
    /// The first place outside of the C library, which is in most stacks and says nothing; else the innermost.
    ///
    /// First the place itself, then its callers. Where these cannot be followed (a program made while it runs, or a stack
    /// deeper than what was recorded) they are guessed: what looks like a return address at the top of the stack, then
    /// the return addresses that frame pointers lead to.
    fn site(&self, change: &Change, calls: &mut Calls, unwind: &mut Unwind) -> Option<Site> {
        let (ip, callers) = change.stack.split_first()?;
        let outside = |site: &Site| !is_plumbing(&site.file);
        let innermost = self.place(*ip);
        if innermost.as_ref().is_some_and(outside) {
            return innermost;
        }
        if let Some(site) = unwind.caller(change, |at| self.place(at), outside, calls) {
            return Some(site);
        }
        // A return address may be the first of the next function.
        let caller = |address: &u64| self.place(address.wrapping_sub(1));
        let at_top = change.top.iter().filter_map(|word| {
            let site = caller(word).filter(outside)?;
            calls.one_ends_at(&site.file, site.offset + 1).then_some(site)
        });
        at_top.chain(callers.iter().filter_map(caller).filter(outside)).next().or(innermost)
    }

    /// Where in which file's code an address lies.
    fn place(&self, address: u64) -> Option<Site> {
        let (start, region) = self.regions.known(address)?;
        let in_file = region.executable && !region.anonymous;
        in_file.then(|| Site { file: region.name.clone(), offset: address - start + region.offset })
    }
}

/// Libraries through which system calls are made.
fn is_plumbing(file: &str) -> bool {
    let name = file.rsplit('/').next().unwrap_or(file);
    ["libc.so", "libc-", "ld-linux", "ld-musl", "libpthread"].iter().any(|p| name.starts_with(p))
}
