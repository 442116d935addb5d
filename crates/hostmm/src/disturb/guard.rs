// SPDX-License-Identifier: MIT OR Apache-2.0
//! MADV_GUARD_INSTALL (6.13): the page is thrown away and a guard marker takes its place; every access faults.
//!
//! Notifier sequence: `madvise_guard_install` zaps what is there first: one range_start over the advised part.

use super::Outcome::Stale;
use super::mem::Region;
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via, both};

const MADV_GUARD_INSTALL: i32 = 102;

pub(super) const EVENTS: &[&[Event]] =
    &[&both!("madv_guard_install", "madvise_guard_install -> zap_page_range_single", install, |e| e
        .expect(Stale, Stale, "the page is gone and access faults; userfaultfd says nothing")
        .needs(&[Need::Guard]))];

fn install(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Faults, undo, move |returned, _| {
        region.madvise(via, MADV_GUARD_INSTALL).map_err(region.failed("madvise"))?;
        returned();
        Ok(Change::Happened)
    }))
}
