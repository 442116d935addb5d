// SPDX-License-Identifier: MIT OR Apache-2.0
//! The first write to memory that was only read so far: the shared zero page gives way to a page of one's own.
//!
//! Notifier sequence: `do_wp_page` -> `wp_page_copy`: range_start over the page.

use super::Outcome::{Prevented, Stale};
use super::mem::{PRIVATE, RW, Region};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Via};

pub(super) const EVENTS: &[&[Event]] =
    &[&[Event::new("zero_page_write", "do_wp_page -> wp_page_copy", Via::Fault, write).expect(
        Prevented,
        Stale,
        "the zero page is replaced at the first write; pinning for writing does it already",
    )]];

fn write(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, after) = (Undo::default(), arena.stamp());
    let region = Region::map(&mut undo, 1, RW, PRIVATE, None)?;
    let before = region.load();
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, _| {
        region.fill(after);
        returned();
        Ok(Change::Happened)
    }))
}
