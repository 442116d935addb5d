// SPDX-License-Identifier: MIT OR Apache-2.0
//! remap_file_pages: another page of the same shared file at the address. Emulated with mmap since 4.0.
//!
//! Notifier sequence: as MAP_FIXED; userfaultfd hears nothing.

use super::Outcome::Stale;
use super::mem::{RW, Region, memfd};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Via, both};

pub(super) const EVENTS: &[&[Event]] =
    &[&both!("remap_file_pages", "remap_file_pages -> do_mmap(MAP_FIXED) -> unmap_vmas", remap, |e| e
        .expect(Stale, Stale, "the file's second page where its first was"))];

fn remap(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let fd = memfd(2, before)?;
    let region = Region::map(&mut undo, 2, RW, libc::MAP_SHARED, Some(&fd))?;
    region.page(0).fill(before);
    region.page(1).fill(after);
    let page = region.page(0);
    Ok(Scene::new(page.range(), before, After::Stamp(after), undo, move |returned, _| {
        page.remap_file_pages(via, 1).map_err(page.failed("remap_file_pages"))?;
        returned();
        page.load();
        Ok(Change::Happened)
    }))
}
