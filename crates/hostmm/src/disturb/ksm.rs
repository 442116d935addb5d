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
use crate::testing::Setting;

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

/// Run ksmd until the two pages of `pair` are one. `false` if it has had every chance and passed them over.
fn merge_pair(pair: Region) -> Result<bool, DisturbError> {
    let _pace =
        [setting("sleep_millisecs", "1")?, setting("pages_to_scan", "4096")?, setting("smart_scan", "0")?];
    let _run = setting("run", "1")?;
    let scans = full_scans();
    let mut merged = false;
    // A page is merged in the second scan that finds it unchanged; six are ample.
    let over = mem::wait_for(LIMIT, Duration::from_millis(1), || {
        let (one, two) = (pair.page(0).pfn()?, pair.page(1).pfn()?);
        merged = one.is_some() && one == two;
        Ok(merged || full_scans() >= scans + 6)
    })?;
    if over {
        Ok(merged)
    } else {
        Err(DisturbError::Timeout { what: "merging", range: pair.range(), millis: LIMIT.as_millis() })
    }
}

fn pair(undo: &mut Undo, stamp: u64) -> Result<Region, DisturbError> {
    let pair = Region::stamped(undo, 2, stamp)?;
    pair.madvise(Via::Libc, libc::MADV_MERGEABLE).map_err(pair.failed("MADV_MERGEABLE"))?;
    Ok(pair)
}

/// A pair that ksmd has merged already.
fn merged_pair(undo: &mut Undo, stamp: u64) -> Result<Region, DisturbError> {
    let pair = pair(undo, stamp)?;
    // ksmd passes a page over that is under its own or anybody's momentary reference.
    for _ in 0..5 {
        if merge_pair(pair)? {
            return Ok(pair);
        }
        pause_for(Duration::from_millis(10));
    }
    Err(DisturbError::Timeout { what: "merging", range: pair.range(), millis: LIMIT.as_millis() })
}

fn merge(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let pair = pair(&mut undo, before)?;
    let page = pair.page(0);
    Ok(Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, _| {
        let old = page.pfn()?;
        if !merge_pair(pair)? {
            return Ok(Change::Refused);
        }
        returned();
        // Either of the two frames may become the shared one; only from the third page on would a new one be made.
        if page.pfn()? == old { Ok(Change::Refused) } else { Ok(Change::Happened) }
    }))
}

fn write(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let page = merged_pair(&mut undo, before)?.page(0);
    Ok(Scene::new(page.range(), before, After::Stamp(after), undo, move |returned, _| {
        page.fill(after);
        returned();
        Ok(Change::Happened)
    }))
}

fn unmergeable(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let pair = merged_pair(&mut undo, before)?;
    let page = pair.page(0);
    Ok(Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, _| {
        pair.madvise(via, libc::MADV_UNMERGEABLE).map_err(pair.failed("MADV_UNMERGEABLE"))?;
        returned();
        Ok(Change::Happened)
    }))
}
