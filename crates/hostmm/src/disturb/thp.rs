// SPDX-License-Identifier: MIT OR Apache-2.0
//! Transparent huge pages: small pages collapse into a huge one, and a huge mapping is split again.
//!
//! Notifier sequence: a collapse fires one range_start over the whole 2 MiB and moves every page; it gives up if one
//! is pinned. A split (`__split_huge_pmd`) fires one over the whole 2 MiB too, beside the one of the part that is
//! dropped or protected; the frames stay.

use mmu_notifier::PAGE_SIZE;

use super::Outcome::{Coherent, Prevented, Stale};
use super::mem::{PMD_SIZE, Region};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via, both};

const MADV_COLLAPSE: i32 = 25;

pub(super) const EVENTS: &[&[Event]] = &[
    &both!(
        "thp_collapse",
        "madvise_collapse -> hpage_collapse_scan_pmd -> collapse_huge_page",
        collapse,
        |e| e
            .expect(Prevented, Stale, "every small page moves into the huge one; a pin makes it give up")
            .needs(&[Need::Thp, Need::PageFrames])
    ),
    &both!("thp_split_dontneed", "zap_pmd_range -> __split_huge_pmd", split_dontneed, |e| e
        .expect(Coherent, Coherent, "a neighbour is dropped: this part of the huge page stays")
        .uffd()
        .needs(&[Need::Thp, Need::PageFrames])),
    &both!("thp_split_mprotect", "change_pmd_range -> __split_huge_pmd", split_mprotect, |e| e
        .expect(Coherent, Coherent, "a neighbour is protected: this part of the huge page stays")
        .needs(&[Need::Thp, Need::PageFrames])),
];

/// The small page that is watched, and the neighbour whose change splits.
const WATCHED: u64 = 3;
const NEIGHBOUR: u64 = 5;

fn collapse(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::huge(&mut undo, 1)?;
    region.madvise(Via::Libc, libc::MADV_NOHUGEPAGE).map_err(region.failed("MADV_NOHUGEPAGE"))?;
    region.fill(before);
    let page = region.page(WATCHED);
    let scene = Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, _| {
        // Not before now: khugepaged may collapse it from here on.
        region.madvise(Via::Libc, libc::MADV_HUGEPAGE).map_err(region.failed("MADV_HUGEPAGE"))?;
        // EAGAIN also means a page on its way to the LRU lists: once is no refusal yet.
        let mut tries = 0;
        loop {
            match region.madvise(via, MADV_COLLAPSE) {
                Ok(_) => break,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINVAL)) => {
                    tries += 1;
                    if tries == 10 {
                        return Ok(Change::Refused);
                    }
                }
                Err(e) => return Err(region.failed("MADV_COLLAPSE")(e)),
            }
        }
        returned();
        Ok(Change::Happened)
    });
    Ok(scene.changing(region.range()))
}

/// A populated huge page.
fn huge(undo: &mut Undo, stamp: u64) -> Result<Region, DisturbError> {
    let region = Region::huge(undo, 1)?;
    region.madvise(Via::Libc, libc::MADV_HUGEPAGE).map_err(region.failed("MADV_HUGEPAGE"))?;
    region.fill(stamp);
    let small = PMD_SIZE / PAGE_SIZE;
    let (first, last) = (region.page(0).pfn()?, region.page(small - 1).pfn()?);
    match (first, last) {
        (Some(first), Some(last))
            if first.get().is_multiple_of(small) && last.get() == first.get() + small - 1 =>
        {
            Ok(region)
        }
        // No huge page was free: make one.
        _ => region.madvise(Via::Libc, MADV_COLLAPSE).map(|_| region).map_err(region.failed("MADV_COLLAPSE")),
    }
}

fn split(
    arena: &mut Arena,
    change: impl FnOnce(Region) -> std::io::Result<u64> + Send + 'static,
) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = huge(&mut undo, before)?;
    let page = region.page(WATCHED);
    let scene = Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, _| {
        change(region.page(NEIGHBOUR)).map_err(region.failed("madvise or mprotect"))?;
        returned();
        Ok(Change::Happened)
    });
    Ok(scene.changing(region.range()))
}

fn split_dontneed(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    split(arena, move |part| part.madvise(via, libc::MADV_DONTNEED))
}

fn split_mprotect(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    split(arena, move |part| part.mprotect(via, libc::PROT_READ))
}
