// SPDX-License-Identifier: MIT OR Apache-2.0
//! munmap and what replaces a mapping: munmap then mmap at the same address, by one thread and by two, `free` of a
//! large chunk, and MAP_FIXED over a live mapping.
//!
//! Notifier sequence: `vms_clear_ptes` -> `unmap_vmas`: one range_start over the whole unmapped span, page tables
//! cleared, range_end. With MAP_FIXED the old mapping is cleared inside the same mmap call.

use interleave::{MaySleep, scope};
use mmu_notifier::PAGE_SIZE;

use super::Outcome::Stale;
use super::mem::{PRIVATE, Plug, RW, Region, memfd};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Via, both};

pub(super) const EVENTS: &[&[Event]] = &[
    &both!("munmap", "__vm_munmap -> vms_clear_ptes -> unmap_vmas", unmap, |e| e
        .expect(Stale, Stale, "the address is gone, the device's page lives on")
        .uffd()),
    &both!("munmap_mmap", "__vm_munmap -> unmap_vmas; then a new vma and fault", remap, |e| e
        .expect(Stale, Stale, "another page at the same address")
        .uffd()),
    &both!("munmap_mmap_other_thread", "as munmap_mmap; the mmap is another thread's", race, |e| e
        .expect(Stale, Stale, "another thread's page as soon as the address is free")
        .uffd()),
    &[Event::new("free_large", "free -> munmap: as munmap", Via::Libc, free)
        .expect(Stale, Stale, "a chunk above the mmap threshold is unmapped by free")
        .uffd()],
    &both!("map_fixed_anon", "__mmap_region -> vms_clear_ptes -> unmap_vmas", overlay_anon, |e| e
        .expect(Stale, Stale, "the new mapping is there when the call returns")
        .uffd()),
    &both!("map_fixed_memfd", "__mmap_region -> vms_clear_ptes -> unmap_vmas", overlay_memfd, |e| e
        .expect(Stale, Stale, "as map_fixed_anon, with shared memory on top")
        .uffd()),
];

fn unmap(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Faults, undo, move |returned, undo| {
        region.munmap(via).map_err(region.failed("munmap"))?;
        returned();
        undo.disown(region);
        Ok(Change::Happened)
    }))
}

fn remap(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        region.munmap(via).map_err(region.failed("munmap"))?;
        returned();
        undo.disown(region);
        region.mmap(via, RW, PRIVATE | libc::MAP_FIXED_NOREPLACE, None).map_err(region.failed("mmap"))?;
        undo.own(region);
        Plug::frames(undo)?;
        region.fill(after);
        Ok(Change::Happened)
    }))
}

fn race(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    // Many pages keep the unmapping thread inside the kernel for a while.
    let region = Region::stamped(&mut undo, 64, before)?;
    let page = region.page(0);
    Ok(Scene::new(page.range(), before, After::Stamp(after), undo, move |returned, undo| {
        let (unmapped, mapped) = MaySleep::enter(|cx| {
            scope(cx, |threads, cx| {
                let taker = threads.spawn("taker", move |_| {
                    let flags = PRIVATE | libc::MAP_FIXED_NOREPLACE;
                    let start = std::time::Instant::now();
                    let mapped = loop {
                        match page.mmap(via, RW, flags, None) {
                            Err(e)
                                if e.raw_os_error() == Some(libc::EEXIST)
                                    && start.elapsed().as_secs() < 5 => {}
                            done => break done,
                        }
                    };
                    let mut taken = Undo::default();
                    let filled = mapped.map_err(page.failed("mmap")).and_then(|_| {
                        taken.own(page);
                        Plug::frames(&mut taken)?;
                        page.fill(after);
                        Ok(())
                    });
                    (filled, taken)
                });
                let unmapped = region.munmap(via);
                returned();
                (unmapped, taker.join(cx))
            })
        });
        unmapped.map_err(region.failed("munmap"))?;
        undo.disown(region);
        // The other thread panics nowhere; if it did, its panic is ours.
        let (filled, taken) = mapped.unwrap_or_else(|p| std::panic::resume_unwind(p.payload));
        undo.keep(taken);
        filled.map(|()| Change::Happened)
    }))
}

fn free(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let before = arena.stamp();
    // glibc never raises its mmap threshold above 32 MiB, so this chunk is always a mapping of its own.
    let len = 40 << 20;
    // SAFETY: an allocation; the pointer is checked.
    let chunk = unsafe { libc::malloc(len) } as u64;
    if chunk == 0 {
        let source = std::io::Error::last_os_error();
        return Err(DisturbError::Call { what: "malloc", range: None, source });
    }
    let mut undo = Undo::default();
    // SAFETY: a page in the middle of our own chunk, up to the free below.
    let page = unsafe { Region::adopt((chunk + (len as u64) / 2).next_multiple_of(PAGE_SIZE), PAGE_SIZE) };
    page.fill(before);
    undo.keep(Chunk(chunk));
    Ok(Scene::new(page.range(), before, After::Faults, undo, move |returned, undo| {
        // The chunk is the only thing on the stack: dropping it is the free.
        drop(std::mem::take(undo));
        returned();
        Ok(Change::Happened)
    }))
}

/// A chunk of malloc, freed on drop.
struct Chunk(u64);

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: our own allocation, freed once.
        unsafe { libc::free(self.0 as *mut libc::c_void) };
    }
}

fn overlay_anon(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        region.mmap(via, RW, PRIVATE | libc::MAP_FIXED, None).map_err(region.failed("mmap"))?;
        returned();
        Plug::frames(undo)?;
        region.fill(after);
        Ok(Change::Happened)
    }))
}

fn overlay_memfd(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    let fd = memfd(1, after)?;
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, _| {
        region.mmap(via, RW, libc::MAP_SHARED | libc::MAP_FIXED, Some(&fd)).map_err(region.failed("mmap"))?;
        returned();
        Ok(Change::Happened)
    }))
}
