// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reclaim: swap-out asked for by the program, and page ageing by the kernel.
//!
//! Notifier sequence of a swap-out: `shrink_folio_list` -> `try_to_unmap_one`: range_start over the page; a pinned
//! page is passed over. Ageing is `clear_young` (the kernel's `kvm_age_hva`): nothing but the accessed bit changes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use mmu_notifier::PAGE_SIZE;

use super::Outcome::{Coherent, Prevented, Stale};
use crate::sys::mm;

use super::mem::{self, Plug, Region, pause_for};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via, both};
use crate::page::{Frame, Pagemap, PidOrSelf};
use crate::setting::SwapSpace;

pub(super) const EVENTS: &[&[Event]] = &[
    &both!("madv_pageout_swap", "madvise_pageout -> reclaim_pages -> try_to_unmap", pageout, |e| e
        .expect(Prevented, Stale, "the next touch swaps it in to another page; a pinned page is passed over")
        .needs(&[Need::Swap, Need::PageFrames])),
    &[Event::new("page_ageing", "damon_folio_mkold -> mmu_notifier_clear_young", Via::KernelThread, ageing)
        .expect(
            Coherent,
            Coherent,
            "only the accessed bit goes; a device has to say whether it used the page",
        )
        .needs(&[Need::Damon, Need::PageFrames])],
];

/// MADV_PAGEOUT until the page is gone. `false` if the kernel keeps it.
///
/// Reclaim passes over a page that is in some CPU's batch of pages on their way to the LRU lists, so every CPU's are
/// drained first.
pub(super) fn page_out(page: Region, via: Via) -> Result<bool, DisturbError> {
    let old = page.pfn()?;
    for _ in 0..20 {
        mm::drain_lru_batches(page.range());
        page.madvise(via, libc::MADV_PAGEOUT).map_err(page.failed("MADV_PAGEOUT"))?;
        // Not `is_none`: an observer's read may have faulted another page in already.
        if page.pfn()? != old {
            return Ok(true);
        }
        pause_for(Duration::from_millis(2));
    }
    Ok(false)
}

fn pageout(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let space = SwapSpace::add();
    undo.keep(space.map_err(|source| DisturbError::Call { what: "swap space", range: None, source })?);
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Stamp(before), undo, move |returned, undo| {
        if !page_out(region, via)? {
            return Ok(Change::Refused);
        }
        returned();
        Plug::frames(undo)?;
        region.load();
        Ok(Change::Happened)
    }))
}

/// Enough pages for DAMON, which samples a few thousand addresses of the whole machine, to hit one soon.
const AGEING_PAGES: u64 = (64 << 20) / PAGE_SIZE;
const AGEING_LIMIT: Duration = Duration::from_secs(20);
/// kpageflags: the kernel has cleared the accessed bits and nobody has touched the page since.
const KPF_IDLE: u64 = 1 << 25;

fn ageing(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::map(&mut undo, AGEING_PAGES, mem::RW, mem::PRIVATE, None)?;
    region.madvise(Via::Libc, libc::MADV_NOHUGEPAGE).map_err(region.failed("MADV_NOHUGEPAGE"))?;
    region.fill(before);
    let page = region.page(0);
    let scene = Scene::new(page.range(), before, After::Stamp(before), undo, move |returned, _| {
        let idle_before = idle_pages(region)?;
        let aged =
            mem::wait_for(AGEING_LIMIT, Duration::from_millis(20), || Ok(idle_pages(region)? > idle_before))?;
        if !aged {
            let millis = AGEING_LIMIT.as_millis();
            return Err(DisturbError::Timeout { what: "ageing", range: region.range(), millis });
        }
        returned();
        Ok(Change::Happened)
    });
    Ok(scene.changing(region.range()))
}

/// How many pages of the region does the kernel hold for idle?
fn idle_pages(region: Region) -> Result<usize, DisturbError> {
    let failed =
        |source| DisturbError::Call { what: "/proc/kpageflags", range: Some(region.range()), source };
    let flags = File::open("/proc/kpageflags").map_err(failed)?;
    let mut idle = 0;
    for entry in Pagemap::open(PidOrSelf::Myself)?.entries(region.range())? {
        let Frame::Present(pfn) = entry.frame() else { continue };
        let mut word = [0; 8];
        flags.read_exact_at(&mut word, pfn.get() * 8).map_err(failed)?;
        idle += usize::from(u64::from_ne_bytes(word) & KPF_IDLE != 0);
    }
    Ok(idle)
}
