// SPDX-License-Identifier: MIT OR Apache-2.0
//! mprotect: the page stays, the right to it goes.
//!
//! Notifier sequence: `change_protection`: one range_start (MMU_NOTIFY_PROTECTION_VMA) over the part of the vma whose
//! rights change; none if nothing changes.

use super::Outcome::{Stale, WriteStale};
use super::mem::Region;
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Via, both};

pub(super) const EVENTS: &[&[Event]] = &[
    &both!("mprotect_read", "mprotect_fixup -> change_protection", read_only, |e| e.expect(
        WriteStale,
        WriteStale,
        "the same page, but writing is forbidden now: a device that has it writable writes on"
    )),
    &both!("mprotect_none", "mprotect_fixup -> change_protection", none, |e| e.expect(
        Stale,
        Stale,
        "the program may not read what the device still reads"
    )),
];

fn read_only(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    protect(arena, via, libc::PROT_READ)
}

fn none(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    protect(arena, via, libc::PROT_NONE)
}

fn protect(arena: &mut Arena, via: Via, prot: i32) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    let after = if prot == libc::PROT_NONE { After::Faults } else { After::Stamp(before) };
    Ok(Scene::new(region.range(), before, after, undo, move |returned, _| {
        region.mprotect(via, prot).map_err(region.failed("mprotect"))?;
        returned();
        Ok(Change::Happened)
    }))
}
