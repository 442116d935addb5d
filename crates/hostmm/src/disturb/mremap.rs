// SPDX-License-Identifier: MIT OR Apache-2.0
//! mremap: move, shrink, grow (with a move, and in place), MREMAP_DONTUNMAP, and another mapping moved onto ours.
//!
//! Notifier sequence of a move: range_start over the destination (it is cleared first, with MREMAP_FIXED), one over
//! the source while `move_page_tables` takes its entries, one more over the source when it is unmapped. The page
//! itself stays: it is the address that changes.

use mmu_notifier::PAGE_SIZE;

use super::Outcome::{Coherent, Stale};
use super::mem::{PRIVATE, Plug, Region};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Via, both};

pub(super) const EVENTS: &[&[Event]] = &[
    &both!("mremap_move", "mremap_to -> move_vma -> move_page_tables, unmap_source_vma", moved, |e| e
        .expect(Stale, Stale, "the page is elsewhere now; the old address is a hole")
        .uffd()),
    &both!("mremap_shrink", "shrink_vma -> do_vmi_munmap -> unmap_vmas", shrink, |e| e
        .expect(Stale, Stale, "the tail is unmapped")
        .uffd()),
    &both!("mremap_grow_move", "expand_vma -> move_vma -> move_page_tables", grow_move, |e| e
        .expect(Stale, Stale, "no room to grow: the whole mapping moves")
        .uffd()),
    &both!("mremap_grow_in_place", "expand_vma_in_place", grow, |e| e
        .expect(Coherent, Coherent, "control: the page stays, and growing into a hole notifies nothing")
        .not_kvm()),
    &both!("mremap_dontunmap", "move_vma -> move_page_tables, vma kept", dontunmap, |e| e
        .expect(Stale, Stale, "the old address stays mapped and gets a fresh page")
        .uffd()),
    &both!("mremap_onto", "mremap_to -> do_munmap of the target -> move_page_tables", onto, |e| e
        .expect(Stale, Stale, "another mapping's page is moved onto the address")
        .uffd()),
];

fn moved(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    let target = Region::map(&mut undo, 1, libc::PROT_NONE, PRIVATE, None)?;
    Ok(Scene::new(region.range(), before, After::Faults, undo, move |returned, undo| {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        region.mremap(via, PAGE_SIZE, flags, Some(target)).map_err(region.failed("mremap"))?;
        returned();
        undo.disown(region);
        Ok(Change::Happened)
    }))
}

fn shrink(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::stamped(&mut undo, 4, before)?;
    let tail = region.page(3);
    Ok(Scene::new(tail.range(), before, After::Faults, undo, move |returned, undo| {
        region.mremap(via, 3 * PAGE_SIZE, 0, None).map_err(region.failed("mremap"))?;
        returned();
        undo.disown(tail);
        Ok(Change::Happened)
    }))
}

fn grow_move(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    // The inaccessible last page is another vma: there is no room behind the first.
    let region = Region::stamped(&mut undo, 2, before)?;
    region.page(1).mprotect(Via::Libc, libc::PROT_NONE).map_err(region.failed("mprotect"))?;
    let page = region.page(0);
    Ok(Scene::new(page.range(), before, After::Faults, undo, move |returned, undo| {
        let flags = libc::MREMAP_MAYMOVE;
        let new = page.mremap(via, 2 * PAGE_SIZE, flags, None).map_err(page.failed("mremap"))?;
        returned();
        undo.own(new);
        undo.disown(page);
        Ok(Change::Happened)
    }))
}

fn grow(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::stamped(&mut undo, 2, before)?;
    let (page, room) = (region.page(0), region.page(1));
    room.munmap(Via::Libc).map_err(room.failed("munmap"))?;
    undo.disown(room);
    Ok(Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, undo| {
        page.mremap(via, 2 * PAGE_SIZE, 0, None).map_err(page.failed("mremap"))?;
        returned();
        undo.own(room);
        Ok(Change::Happened)
    }))
}

fn dontunmap(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        let new = region.mremap(via, PAGE_SIZE, flags, None).map_err(region.failed("mremap"))?;
        returned();
        undo.own(new);
        // The old frame lives on at the new address, so the fault below cannot get it.
        region.fill(after);
        Ok(Change::Happened)
    }))
}

fn onto(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    let other = Region::stamped(&mut undo, 1, after)?;
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        other.mremap(via, PAGE_SIZE, flags, Some(region)).map_err(region.failed("mremap"))?;
        returned();
        undo.disown(other);
        Plug::frames(undo)?;
        Ok(Change::Happened)
    }))
}
