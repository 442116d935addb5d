// SPDX-License-Identifier: MIT OR Apache-2.0
//! Migration by memory compaction: the page moves to another frame, the bytes stay.
//!
//! Notifier sequence: `migrate_pages` -> `try_to_migrate_one`: range_start over the page; a pinned page is passed
//! over.

use std::fs;

use super::Outcome::{Prevented, Stale};
use super::mem::{self, Region};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via};

pub(super) const EVENTS: &[&[Event]] = &[&[Event::new(
    "compaction",
    "compact_zone -> migrate_pages -> try_to_migrate",
    Via::KernelThread,
    compaction,
)
.expect(Prevented, Stale, "the page moves to another frame; a pinned page is passed over")
.needs(&[Need::Compaction, Need::PageFrames])]];

/// Pages of which every other one is given back, so that compaction has something to do.
const FRAGMENTED: u64 = 32768;
const TRIES: u32 = 12;

fn compaction(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    // Compaction moves pages from the low end of a zone to holes at its high end: a low page goes first.
    let region = fragments(&mut undo, before)?;
    let mut lowest = (region.page(0), u64::MAX);
    for page in (0..FRAGMENTED).step_by(2).map(|n| region.page(n)) {
        match page.pfn()? {
            Some(pfn) if pfn < lowest.1 => lowest = (page, pfn),
            _ => {}
        }
    }
    let page = lowest.0;
    Ok(Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, undo| {
        let old = page.pfn()?;
        for _ in 0..TRIES {
            fs::write("/proc/sys/vm/compact_memory", "1")
                .map_err(page.failed("/proc/sys/vm/compact_memory"))?;
            if page.pfn()? != old {
                returned();
                return Ok(Change::Happened);
            }
            fragments(undo, before)?;
        }
        Ok(Change::Refused)
    }))
}

/// Small pages with a hole behind each.
fn fragments(undo: &mut Undo, stamp: u64) -> Result<Region, DisturbError> {
    let region = Region::map(undo, FRAGMENTED, mem::RW, mem::PRIVATE, None)?;
    region.madvise(Via::Libc, libc::MADV_NOHUGEPAGE).map_err(region.failed("MADV_NOHUGEPAGE"))?;
    region.fill(stamp);
    for n in (1..FRAGMENTED).step_by(2) {
        region.page(n).madvise(Via::Libc, libc::MADV_DONTNEED).map_err(region.failed("MADV_DONTNEED"))?;
    }
    Ok(region)
}
