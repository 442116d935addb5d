// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the changes would cost a device that had some of the program's memory mapped.
//!
//! Two kinds of secondary MMU, by what they lose to one change:
//!
//! * `object`: memory is bound in objects (i915's userptr, a registration cache): a change anywhere in one unbinds all of
//!   it, and all of it is pinned again at the next use;
//! * `page`: single translations (KVM, RDMA's on-demand paging): what changed is dropped and faulted in again.
//!
//! Assumed: the device uses everything between any two changes, so this is the most that it can cost.

use super::regions::Region;
use mmu_notifier::PAGE_SIZE;
use std::collections::BTreeMap;

/// The memory that the device has mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WorkingSet {
    /// Anonymous memory: the heap, mapped chunks, not stacks.
    Heap,
    /// Everything.
    All,
    /// One range of addresses.
    Range(u64, u64),
}

impl std::str::FromStr for WorkingSet {
    type Err = String;

    fn from_str(text: &str) -> Result<WorkingSet, String> {
        let hex = |s: &str| u64::from_str_radix(s.trim_start_matches("0x"), 16).ok();
        match (text, text.split_once('-')) {
            ("heap", _) => Ok(WorkingSet::Heap),
            ("all", _) => Ok(WorkingSet::All),
            (_, Some((a, b))) => match (hex(a), hex(b)) {
                (Some(a), Some(b)) if a < b => Ok(WorkingSet::Range(a, b)),
                _ => Err("a range is two hexadecimal addresses, START-END".to_owned()),
            },
            _ => Err("give heap, all, or START-END".to_owned()),
        }
    }
}

/// Of one cause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Price {
    /// Objects unbound and pinned again.
    pub(super) objects: u64,
    /// Pages of these objects.
    pub(super) object_pages: u64,
    /// Translations dropped and faulted in again.
    pub(super) pages: u64,
}

/// The sums.
#[derive(Debug)]
pub(super) struct Cost {
    set: WorkingSet,
    pub(super) by_cause: BTreeMap<String, Price>,
}

/// Bytes of an object.
pub(super) const OBJECT: u64 = 2 << 20;

impl Cost {
    pub(super) fn new(set: WorkingSet) -> Cost {
        Cost { set, by_cause: BTreeMap::new() }
    }

    /// Adds a change of `[start, end)`, or of everything.
    pub(super) fn add(&mut self, cause: &str, start: u64, end: u64, whole: bool, region: Option<&Region>) {
        let (start, end) = match self.set {
            // What a change of everything does to memory whose size is not known is not guessed.
            _ if whole => return,
            WorkingSet::All => (start, end),
            WorkingSet::Heap => match region {
                Some(r) if r.anonymous && (r.name == "[heap]" || r.name.starts_with("anon")) => (start, end),
                _ => return,
            },
            WorkingSet::Range(a, b) => (start.max(a), end.min(b)),
        };
        if start >= end {
            return;
        }
        let objects = (end - 1) / OBJECT - start / OBJECT + 1;
        let price = self.by_cause.entry(cause.to_owned()).or_default();
        price.objects += objects;
        price.object_pages += objects * (OBJECT / PAGE_SIZE);
        price.pages += (end - start).div_ceil(PAGE_SIZE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn price(set: &str, start: u64, end: u64) -> Price {
        let mut cost = Cost::new(set.parse().unwrap());
        cost.add("munmap", start, end, false, None);
        cost.by_cause.get("munmap").copied().unwrap_or_default()
    }

    #[test]
    fn a_page_costs_an_object_its_whole_self() {
        assert_eq!(price("all", 0x1000, 0x2000), Price { objects: 1, object_pages: 512, pages: 1 });
        assert_eq!(price("all", OBJECT - 0x1000, OBJECT + 0x1000).objects, 2);
    }

    #[test]
    fn what_is_not_in_the_working_set_costs_nothing() {
        assert_eq!(price("0x1000-0x3000", 0x8000, 0x9000), Price::default());
        assert_eq!(price("0x1000-0x3000", 0x2000, 0x9000).pages, 1);
        assert_eq!(price("heap", 0x1000, 0x2000), Price::default());
        assert!("1000".parse::<WorkingSet>().is_err() && "b-a".parse::<WorkingSet>().is_err());
    }
}
