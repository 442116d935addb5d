// SPDX-License-Identifier: MIT OR Apache-2.0
//! Migration by memory compaction: the page moves to another frame, the bytes stay.
//!
//! Notifier sequence: `migrate_pages` -> `try_to_migrate_one`: range_start over the page; a pinned page is passed
//! over.
//!
//! Compaction moves pages from the low end of a zone into holes at its high end, and a pass ends for good at the first
//! large folio that finds no hole of its size (6.18). So only low pages are likely to move, on a machine full of large
//! folios none may, and whether a page was passed over shows in its neighbours: one above it moved, it did not.

use std::fs;

use super::Outcome::{Prevented, Stale};
use super::mem::{self, Region};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via};
use crate::page::{Frame, Pagemap, Pfn, PidOrSelf};

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

fn compact(region: Region) -> Result<(), DisturbError> {
    fs::write("/proc/sys/vm/compact_memory", "1").map_err(region.failed("/proc/sys/vm/compact_memory"))
}

fn timeout(region: Region, start: std::time::Instant) -> DisturbError {
    let millis = start.elapsed().as_millis();
    DisturbError::Timeout { what: "compaction", range: region.range(), millis }
}

/// Small pages with a hole behind each, and where they are, the lowest first.
fn fragments(undo: &mut Undo) -> Result<Vec<(Pfn, Region)>, DisturbError> {
    let region = Region::map(undo, FRAGMENTED, mem::RW, mem::PRIVATE, None)?;
    region.madvise(Via::Libc, libc::MADV_NOHUGEPAGE).map_err(region.failed("MADV_NOHUGEPAGE"))?;
    region.madvise(Via::Libc, libc::MADV_POPULATE_WRITE).map_err(region.failed("MADV_POPULATE_WRITE"))?;
    for n in (1..FRAGMENTED).step_by(2) {
        region.page(n).madvise(Via::Libc, libc::MADV_DONTNEED).map_err(region.failed("MADV_DONTNEED"))?;
    }
    let entries = Pagemap::open(PidOrSelf::Myself)?.entries(region.range())?;
    let mut frames: Vec<_> = (0..)
        .zip(entries)
        .filter_map(|(n, entry)| match entry.frame() {
            Frame::Present(pfn) => Some((pfn, region.page(n))),
            _ => None,
        })
        .collect();
    frames.sort_unstable_by_key(|(pfn, _)| *pfn);
    Ok(frames)
}

/// How many of the lowest pages are looked at after a pass.
const SAMPLE: usize = 64;

/// The highest old frame of the lowest pages that have moved, if any has.
fn highest_moved(frames: &[(Pfn, Region)]) -> Result<Option<Pfn>, DisturbError> {
    for (old, page) in frames.iter().take(SAMPLE).rev() {
        if page.pfn()? != Some(*old) {
            return Ok(Some(*old));
        }
    }
    Ok(None)
}

fn compaction(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let start = std::time::Instant::now();
    // Try on pages of no interest how far compaction gets at present, then take a page below that.
    let mut reach = None;
    for _ in 0..TRIES {
        let frames = fragments(&mut undo)?;
        let Some(&(old, page)) = frames.first() else { break };
        if reach.is_some_and(|reach| old < reach) {
            page.fill(before);
            return Ok(scene(undo, before, old, page, frames));
        }
        compact(page)?;
        reach = highest_moved(&frames)?.or(reach);
    }
    let region = Region::map(&mut undo, 1, mem::RW, mem::PRIVATE, None)?;
    Err(timeout(region, start))
}

fn scene(undo: Undo, before: u64, old: Pfn, page: Region, frames: Vec<(Pfn, Region)>) -> Scene {
    Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, undo| {
        let start = std::time::Instant::now();
        let mut passed_over = false;
        for _ in 0..TRIES {
            compact(page)?;
            if page.pfn()? != Some(old) {
                returned();
                return Ok(Change::Happened);
            }
            // A page under somebody's momentary reference is passed over once, a pinned one always.
            if highest_moved(&frames)?.is_some() {
                if passed_over {
                    return Ok(Change::Refused);
                }
                passed_over = true;
            }
            fragments(undo)?;
        }
        Err(timeout(page, start))
    })
}
