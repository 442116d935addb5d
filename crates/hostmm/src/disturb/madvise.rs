// SPDX-License-Identifier: MIT OR Apache-2.0
//! madvise that throws pages away: DONTNEED, DONTNEED_LOCKED, FREE, REMOVE, and process_madvise of oneself; and COLD,
//! which changes nothing and is the control.
//!
//! Notifier sequence: DONTNEED and FREE fire one range_start for the advised part of each vma, empty or not, holding
//! no more than the per-vma lock (6.16 on); REMOVE is a hole punch and notifies through the file's mappings; COLD
//! fires nothing.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::Outcome::{Coherent, Prevented, Stale};
use super::mem::{self, Plug, RW, Region, memfd};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via, both};

const MADV_DONTNEED_LOCKED: i32 = 24;

pub(super) const EVENTS: &[&[Event]] = &[
    &both!("madv_dontneed", "madvise_dontneed_single_vma -> zap_page_range_single_batched", dontneed, |e| e
        .expect(Stale, Stale, "dropped; the next touch gets a fresh page")
        .uffd()),
    &both!("madv_dontneed_locked", "madvise_dontneed_single_vma on a locked vma", dontneed_locked, |e| e
        .expect(Stale, Stale, "as DONTNEED; hooks that filter advice miss it")
        .uffd()),
    &[Event::new(
        "process_madvise_self/raw",
        "vector_madvise -> madvise_dontneed_single_vma",
        Via::RawSyscall,
        process,
    )
    .expect(Stale, Stale, "as DONTNEED, through a pidfd")
    .uffd()
    .needs(&[Need::ProcessMadvise])],
    &both!("madv_free_rewrite", "madvise_free_single_vma -> madvise_free_pte_range", free_rewrite, |e| e
        .expect(Coherent, Coherent, "rewritten before reclaim: the page is kept")
        .uffd()),
    &both!(
        "madv_free_reclaim",
        "madvise_free_single_vma; shrink_folio_list -> try_to_unmap",
        free_reclaim,
        |e| e
            .expect(Prevented, Stale, "reclaim drops the lazily freed page, unless it is pinned")
            .uffd()
            .needs(&[Need::PageFrames])
    ),
    &both!("madv_remove", "madvise_remove -> shmem_fallocate -> unmap_mapping_range", remove, |e| e
        .expect(Stale, Stale, "a hole in the shared file; the next touch gets a fresh page")
        .uffd()),
    &both!("madv_cold", "madvise_cold -> madvise_cold_or_pageout_pte_range", cold, |e| e
        .expect(Coherent, Coherent, "control: only the page's age changes")
        .not_kvm()),
];

fn advise(arena: &mut Arena, via: Via, advice: i32, locked: bool) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    if locked {
        region.mlock().map_err(region.failed("mlock"))?;
    }
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        region.madvise(via, advice).map_err(region.failed("madvise"))?;
        returned();
        Plug::frames(undo)?;
        region.fill(after);
        Ok(Change::Happened)
    }))
}

fn dontneed(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    advise(arena, via, libc::MADV_DONTNEED, false)
}

fn dontneed_locked(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    advise(arena, via, MADV_DONTNEED_LOCKED, true)
}

fn free_rewrite(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    advise(arena, via, libc::MADV_FREE, false)
}

fn process(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    let pid = u64::from(std::process::id());
    // SAFETY: names no memory; libc has no function for it, so the event is declared for the raw call alone.
    let pidfd = unsafe { mem::call(via, libc::SYS_pidfd_open, [pid, 0, 0, 0, 0, 0], || -1) }
        .map_err(region.failed("pidfd_open"))?;
    // SAFETY: the call has just returned this descriptor, to us alone.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        let iov = [region.addr(), region.range().len()];
        let args = [pidfd.as_raw_fd() as u64, (&raw const iov) as u64, 1, libc::MADV_DONTNEED as u64, 0, 0];
        // SAFETY: `iov` names the scene's own memory, and outlives the call.
        unsafe { mem::call(via, libc::SYS_process_madvise, args, || -1) }
            .map_err(region.failed("process_madvise"))?;
        returned();
        Plug::frames(undo)?;
        region.fill(after);
        Ok(Change::Happened)
    }))
}

fn free_reclaim(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        region.madvise(via, libc::MADV_FREE).map_err(region.failed("madvise"))?;
        returned();
        for tries in 0.. {
            if super::reclaim::page_out(region, via)? {
                break;
            }
            if tries == 3 {
                return Ok(Change::Refused);
            }
            // MADV_FREE passes a page over that is in another CPU's batch on its way to the LRU lists; it stays
            // dirty then, and without swap cannot go.
            region.madvise(via, libc::MADV_FREE).map_err(region.failed("madvise"))?;
        }
        Plug::frames(undo)?;
        region.fill(after);
        Ok(Change::Happened)
    }))
}

fn remove(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let fd = memfd(1, before)?;
    let region = Region::map(&mut undo, 1, RW, libc::MAP_SHARED, Some(&fd))?;
    region.load();
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        Plug::hold(undo, region)?;
        region.madvise(via, libc::MADV_REMOVE).map_err(region.failed("madvise"))?;
        returned();
        region.fill(after);
        Ok(Change::Happened)
    }))
}

fn cold(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Stamp(before), undo, move |returned, _| {
        region.madvise(via, libc::MADV_COLD).map_err(region.failed("madvise"))?;
        returned();
        Ok(Change::Happened)
    }))
}
