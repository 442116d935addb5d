// SPDX-License-Identifier: MIT OR Apache-2.0
//! KSM: ksmd merges equal pages, and a write or MADV_UNMERGEABLE parts them again.
//!
//! Notifier sequence of a merge, from ksmd: range_start for the write protection (`write_protect_page`), another for
//! the replacement (`replace_page`). Un-merging is a copy-on-write break: range_start over the page. A page with a
//! pin is passed over.
//!
//! ksmd is woken for the time of a merge only; `run` and its pace are put back before the change is reported.

use std::fs;
use std::time::Duration;

use super::Outcome::{Prevented, Stale};
use super::mem::{self, Region, pause_for};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via, both};
use crate::setting::Setting;

const DIR: &str = "/sys/kernel/mm/ksm";
const LIMIT: Duration = Duration::from_secs(15);

pub(super) const EVENTS: &[&[Event]] = &[
    &[Event::new(
        "ksm_merge",
        "try_to_merge_one_page -> write_protect_page, replace_page",
        Via::KernelThread,
        merge,
    )
    .expect(Prevented, Stale, "the bytes stay, the page does not; a pinned page is passed over")
    .needs(&[Need::Ksm, Need::PageFrames])],
    &[Event::new("ksm_unmerge_write", "do_wp_page -> wp_page_copy", Via::Fault, write)
        .expect(Prevented, Stale, "the writer gets a page of its own; pinning for writing does it already")
        .needs(&[Need::Ksm, Need::PageFrames])],
    &both!("madv_unmergeable", "ksm_madvise -> unmerge_ksm_pages -> break_ksm", unmergeable, |e| e
        .expect(Prevented, Stale, "every merged page of the vma is parted; pinning does it already")
        .needs(&[Need::Ksm, Need::PageFrames])),
];

fn setting(file: &'static str, value: &str) -> Result<Setting, DisturbError> {
    Setting::set(format!("{DIR}/{file}"), value).map_err(|source| DisturbError::Call {
        what: "/sys/kernel/mm/ksm",
        range: None,
        source,
    })
}

fn full_scans() -> u64 {
    fs::read_to_string(format!("{DIR}/full_scans")).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// Run ksmd until `page` is the same frame as `other`. `false` if it has had every chance and passed them over.
fn run_until_merged(page: Region, other: Region) -> Result<bool, DisturbError> {
    let _pace =
        [setting("sleep_millisecs", "1")?, setting("pages_to_scan", "4096")?, setting("smart_scan", "0")?];
    let _run = setting("run", "1")?;
    let scans = full_scans();
    let mut merged = false;
    // A page is merged in the second scan that finds it unchanged; six are ample.
    let over = mem::wait_for(LIMIT, Duration::from_millis(1), || {
        let (one, two) = (page.pfn()?, other.pfn()?);
        merged = one.is_some() && one == two;
        Ok(merged || full_scans() >= scans + 6)
    })?;
    if over { Ok(merged) } else { Err(timeout(page)) }
}

fn timeout(page: Region) -> DisturbError {
    DisturbError::Timeout { what: "merging", range: page.range(), millis: LIMIT.as_millis() }
}

/// Three pages filled with `stamp`, of which ksmd has merged the last two.
fn pages(undo: &mut Undo, stamp: u64) -> Result<Region, DisturbError> {
    let pages = Region::stamped(undo, 3, stamp)?;
    let pair = pages.part(1, 2);
    pair.madvise(Via::Libc, libc::MADV_MERGEABLE).map_err(pair.failed("MADV_MERGEABLE"))?;
    // ksmd passes a page over that is under anybody's momentary reference.
    for _ in 0..5 {
        if run_until_merged(pair.page(0), pair.page(1))? {
            return Ok(pages);
        }
        pause_for(Duration::from_millis(10));
    }
    Err(timeout(pair))
}

fn merge(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    // Of two pages that meet either may be the one that stays; a third one always joins the frame that is there.
    let pages = pages(&mut undo, before)?;
    let page = pages.page(0);
    page.madvise(Via::Libc, libc::MADV_MERGEABLE).map_err(page.failed("MADV_MERGEABLE"))?;
    Ok(Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, _| {
        if !run_until_merged(page, pages.page(1))? {
            return Ok(Change::Refused);
        }
        returned();
        Ok(Change::Happened)
    }))
}

fn write(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let page = pages(&mut undo, before)?.page(1);
    Ok(Scene::new(page.range(), before, After::Stamp(after), undo, move |returned, _| {
        page.fill(after);
        returned();
        Ok(Change::Happened)
    }))
}

fn unmergeable(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let pair = pages(&mut undo, before)?.part(1, 2);
    let page = pair.page(0);
    Ok(Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, _| {
        pair.madvise(via, libc::MADV_UNMERGEABLE).map_err(pair.failed("MADV_UNMERGEABLE"))?;
        returned();
        Ok(Change::Happened)
    }))
}
