// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mapped files: copy-on-write of a private mapping, truncation and hole punching (by this process and by another),
//! and writeback, which takes the right to write away.
//!
//! Notifier sequence: a hole or a truncation is `unmap_mapping_range`: one range_start in every mm that maps the
//! part, before the page cache lets go of the pages (truncation does it once more after). Writeback is
//! `folio_mkclean` -> `page_vma_mkclean_one`: one range_start for each dirty page, from whichever task writes back.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use mmu_notifier::PAGE_SIZE;

use super::Outcome::{NotMappable, Prevented, Stale, WriteStale};
use super::mem::{self, Plug, RW, Region, memfd};
use super::process::Child;
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via, both};

pub(super) const EVENTS: &[&[Event]] = &[
    &[Event::new("private_file_cow", "do_wp_page -> wp_page_copy", Via::Fault, cow)
        .expect(
            Prevented,
            Stale,
            "the first write leaves the page cache; pinning for writing does it already",
        )
        .needs(&[Need::DiskFile])],
    &both!("truncate", "truncate_setsize -> unmap_mapping_range", truncate, |e| e.expect(
        Stale,
        Stale,
        "the page is past the end of the file: access faults"
    )),
    &[Event::new(
        "truncate/other_process",
        "truncate_setsize -> unmap_mapping_range",
        Via::OtherProcess,
        truncate,
    )
    .expect(Stale, Stale, "as truncate, in another task's context")],
    &both!("punch_hole", "shmem_fallocate -> unmap_mapping_range", punch, |e| e.expect(
        Stale,
        Stale,
        "the file gives the page up; the next touch gets a fresh one"
    )),
    &[Event::new(
        "punch_hole/other_process",
        "shmem_fallocate -> unmap_mapping_range",
        Via::OtherProcess,
        punch,
    )
    .expect(Stale, Stale, "as punch_hole, in another task's context")],
    &both!("fsync_writeback", "folio_clear_dirty_for_io -> folio_mkclean", writeback, |e| e
        .expect(
            NotMappable,
            WriteStale,
            "write-protected to catch the next store; shared disk files refuse long pins"
        )
        .needs(&[Need::DiskFile])),
];

/// A file without a name in the arena's directory, filled with `stamp`.
pub(super) fn disk_file(arena: &Arena, pages: u64, stamp: u64) -> Result<OwnedFd, DisturbError> {
    let fill = |file: &File| {
        let page = stamp.to_ne_bytes().repeat((PAGE_SIZE / 8) as usize);
        (0..pages).try_for_each(|n| file.write_all_at(&page, n * PAGE_SIZE))?;
        file.sync_all()
    };
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE);
    options.open(arena.dir()).and_then(|file| fill(&file).map(|()| file.into())).map_err(|source| {
        DisturbError::Call { what: "O_TMPFILE in the arena's directory", range: None, source }
    })
}

fn cow(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let fd = disk_file(arena, 1, before)?;
    let region = Region::map(&mut undo, 1, RW, libc::MAP_PRIVATE, Some(&fd))?;
    region.load();
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, _| {
        region.fill(after);
        returned();
        Ok(Change::Happened)
    }))
}

fn ftruncate(via: Via, fd: i32, len: u64) -> io::Result<u64> {
    // SAFETY: shortens a file that only the scene maps.
    unsafe {
        mem::call(via, libc::SYS_ftruncate, [fd as u64, len, 0, 0, 0, 0], || {
            libc::ftruncate(fd, len.cast_signed()).into()
        })
    }
}

fn fallocate_punch(via: Via, fd: i32, at: u64, len: u64) -> io::Result<u64> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a hole in a file that only the scene maps.
    unsafe {
        mem::call(via, libc::SYS_fallocate, [fd as u64, mode as u64, at, len, 0, 0], || {
            libc::fallocate(fd, mode, at.cast_signed(), len.cast_signed()).into()
        })
    }
}

/// Map page 1 of a shared memfd, and have `change` done to the file by this process or by another one.
fn shared(
    arena: &mut Arena,
    via: Via,
    what: &'static str,
    refilled: bool,
    change: fn(Via, i32) -> io::Result<u64>,
) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let fd = memfd(2, before)?;
    let region = Region::map(&mut undo, 2, RW, libc::MAP_SHARED, Some(&fd))?;
    region.page(1).fill(before);
    let page = region.page(1);
    let raw = fd.as_raw_fd();
    let task = move || change(Via::RawSyscall, raw).is_ok();
    let other = match via {
        Via::OtherProcess => Some(Child::fork(Via::Libc, Some(&task)).map_err(page.failed("fork"))?),
        _ => None,
    };
    let end = if refilled { After::Stamp(after) } else { After::Faults };
    Ok(Scene::new(page.range(), before, end, undo, move |returned, undo| {
        Plug::hold(undo, page)?;
        match other {
            Some(mut child) => child.run().map_err(page.failed(what))?,
            None => change(via, fd.as_raw_fd()).map(drop).map_err(page.failed(what))?,
        }
        returned();
        if refilled {
            page.fill(after);
        }
        Ok(Change::Happened)
    }))
}

fn truncate(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    shared(arena, via, "ftruncate", false, |via, fd| ftruncate(via, fd, PAGE_SIZE))
}

fn punch(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    shared(arena, via, "fallocate", true, |via, fd| fallocate_punch(via, fd, PAGE_SIZE, PAGE_SIZE))
}

fn writeback(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, old, before) = (Undo::default(), arena.stamp(), arena.stamp());
    let fd = disk_file(arena, 1, old)?;
    let region = Region::map(&mut undo, 1, RW, libc::MAP_SHARED, Some(&fd))?;
    region.fill(before);
    Ok(Scene::new(region.range(), before, After::Stamp(before), undo, move |returned, _| {
        let raw = fd.as_raw_fd();
        // SAFETY: fsync changes no content.
        unsafe { mem::call(via, libc::SYS_fsync, [raw as u64, 0, 0, 0, 0, 0], || libc::fsync(raw).into()) }
            .map_err(region.failed("fsync"))?;
        returned();
        Ok(Change::Happened)
    }))
}
