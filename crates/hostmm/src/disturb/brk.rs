// SPDX-License-Identifier: MIT OR Apache-2.0
//! brk: the heap shrinks and grows again over the same addresses.
//!
//! Notifier sequence: `do_brk_munmap` -> `unmap_vmas`: one range_start over the pages given back.
//!
//! The break belongs to malloc as well. Set-up leaves malloc a megabyte of free memory below the scene's pages, so
//! that it need not move the break meanwhile; if it does all the same, the change is refused with
//! [`DisturbError::BreakMoved`] before any memory is lost.

use mmu_notifier::PAGE_SIZE;

use super::Outcome::Stale;
use super::mem::{Plug, Region, call};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Via, both};

pub(super) const EVENTS: &[&[Event]] =
    &[&both!("brk_shrink", "do_brk -> do_vmi_align_munmap -> unmap_vmas", shrink, |e| e
        .expect(Stale, Stale, "the heap gave the page back and got another one at the same address")
        .uffd())];

const PAGES: u64 = 16;

fn failed(source: std::io::Error) -> DisturbError {
    DisturbError::Call { what: "brk", range: None, source }
}

/// Where the break is.
fn current() -> Result<u64, DisturbError> {
    // SAFETY: asks only.
    match unsafe { libc::sbrk(0) } as i64 {
        -1 => Err(failed(std::io::Error::last_os_error())),
        at => Ok(at as u64),
    }
}

/// Move the break to `to`. libc's `sbrk` adds to the break that libc remembers, so the raw call, which libc does not
/// see, must always be followed by one that puts the break back.
fn set(via: Via, to: u64) -> Result<(), DisturbError> {
    let now = current()?;
    let by = to.wrapping_sub(now).cast_signed();
    // SAFETY: only the scene's own pages are above `to`; the caller has compared the break.
    let got = unsafe {
        call(via, libc::SYS_brk, [to, 0, 0, 0, 0, 0], || {
            if libc::sbrk(by as isize) as i64 == -1 { -1 } else { to.cast_signed() }
        })
    }
    .map_err(failed)?;
    if got == to { Ok(()) } else { Err(failed(std::io::Error::from_raw_os_error(libc::ENOMEM))) }
}

/// Is the break where the scene left it?
fn expect_break(ours: u64) -> Result<(), DisturbError> {
    let now = current()?;
    if now == ours { Ok(()) } else { Err(DisturbError::BreakMoved { ours, now }) }
}

fn shrink(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    // SAFETY: allocations, freed below; below the mmap threshold, so they come from the heap.
    let reserve: Vec<u64> = (0..16).map(|_| unsafe { libc::malloc(64 << 10) } as u64).collect();
    let old = current()?;
    let bottom = old.next_multiple_of(PAGE_SIZE);
    let top = bottom + PAGES * PAGE_SIZE;
    let grown = set(Via::Libc, top);
    for chunk in reserve {
        // SAFETY: allocated above, freed once.
        unsafe { libc::free(chunk as *mut libc::c_void) };
    }
    grown?;
    undo.push(move || {
        if expect_break(top).is_ok() {
            let _ = set(Via::Libc, old);
        }
    });
    // SAFETY: the pages that the break grew by; nobody else asked for them.
    let region = unsafe { Region::adopt(bottom, PAGES * PAGE_SIZE) };
    region.fill(before);
    let last = region.page(PAGES - 1);
    Ok(Scene::new(last.range(), before, After::Stamp(after), undo, move |returned, undo| {
        expect_break(top)?;
        set(via, top - PAGE_SIZE)?;
        returned();
        Plug::frames(undo)?;
        set(via, top)?;
        last.fill(after);
        Ok(Change::Happened)
    }))
}
