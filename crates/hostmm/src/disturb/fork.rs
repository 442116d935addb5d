// SPDX-License-Identifier: MIT OR Apache-2.0
//! fork and the copy-on-write break that follows, by the parent and by the child.
//!
//! Notifier sequence: `dup_mmap` -> `copy_page_range`: one range_start over each copy-on-write vma, in the parent; a
//! pinned page is copied for the child at once and the parent's entry stays writable. The first write of the parent
//! breaks the sharing: range_start over the page. The child's write changes the child's memory only.

use super::Outcome::{Coherent, Stale, WriteStale};
use super::mem::Region;
use super::process::Child;
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Via, both};

pub(super) const EVENTS: &[&[Event]] = &[
    &both!("fork_parent_write", "copy_page_range; then do_wp_page -> wp_page_copy", parent_writes, |e| e
        .expect(
            Coherent,
            Stale,
            "the parent moves to a copy; a pinned page was copied for the child instead"
        )),
    &both!("fork_child_write", "copy_page_range; the child's wp_page_copy", child_writes, |e| e.expect(
        Coherent,
        WriteStale,
        "the parent keeps its page, write-protected unless pinned: a device's write reaches the child too"
    )),
];

fn parent_writes(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        undo.keep(Child::fork(via, None).map_err(region.failed("fork"))?);
        region.fill(after);
        returned();
        Ok(Change::Happened)
    }))
}

fn child_writes(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, other) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Stamp(before), undo, move |returned, undo| {
        let write = || {
            region.fill(other);
            true
        };
        let mut child = Child::fork(via, Some(&write)).map_err(region.failed("fork"))?;
        returned();
        child.run().map_err(region.failed("write in the child"))?;
        undo.keep(child);
        Ok(Change::Happened)
    }))
}
