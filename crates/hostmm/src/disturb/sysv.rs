// SPDX-License-Identifier: MIT OR Apache-2.0
//! System V shared memory: shmdt and another segment at the same address, and SHM_REMAP straight over the first.
//!
//! Notifier sequence: as munmap and as MAP_FIXED; userfaultfd hears neither.

use super::Outcome::Stale;
use super::mem::{self, PRIVATE, Region};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via, both};
use mmu_notifier::PAGE_SIZE;

pub(super) const EVENTS: &[&[Event]] = &[
    &both!("shmdt_shmat", "ksys_shmdt -> do_vmi_align_munmap; do_shmat", detach, |e| e
        .expect(Stale, Stale, "another segment at the same address")
        .needs(&[Need::SysV])),
    &both!("shm_remap", "do_shmat -> do_mmap(MAP_FIXED) -> unmap_vmas", remap, |e| e
        .expect(Stale, Stale, "another segment over the first, in one call")
        .needs(&[Need::SysV])),
];

/// A segment that vanishes with its last attachment.
fn segment() -> Result<(i32, Undo), DisturbError> {
    // SAFETY: creates a segment of our own.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, PAGE_SIZE as usize, 0o600 | libc::IPC_CREAT) };
    if id == -1 {
        return Err(DisturbError::Call {
            what: "shmget",
            range: None,
            source: std::io::Error::last_os_error(),
        });
    }
    let mut undo = Undo::default();
    undo.push(move || {
        // SAFETY: our own segment.
        unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    });
    Ok((id, undo))
}

/// Two segments, the first of them attached and filled.
fn attached(undo: &mut Undo, before: u64) -> Result<(Region, i32), DisturbError> {
    let ((first, one), (second, two)) = (segment()?, segment()?);
    undo.keep((one, two));
    // A place that is ours: shmat over it with SHM_REMAP.
    let region = Region::map(undo, 1, libc::PROT_NONE, PRIVATE, None)?;
    region.shmat(Via::Libc, first, libc::SHM_REMAP).map_err(region.failed("shmat"))?;
    region.fill(before);
    Ok((region, second))
}

fn fill_other(second: i32, stamp: u64) -> Result<(), DisturbError> {
    let mut undo = Undo::default();
    let elsewhere = Region::map(&mut undo, 1, mem::RW, PRIVATE, None)?;
    elsewhere.shmat(Via::Libc, second, libc::SHM_REMAP).map_err(elsewhere.failed("shmat"))?;
    elsewhere.fill(stamp);
    Ok(())
}

fn detach(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let (region, second) = attached(&mut undo, before)?;
    fill_other(second, after)?;
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, undo| {
        region.shmdt(via).map_err(region.failed("shmdt"))?;
        returned();
        undo.disown(region);
        region.shmat(via, second, 0).map_err(region.failed("shmat"))?;
        undo.own(region);
        region.load();
        Ok(Change::Happened)
    }))
}

fn remap(arena: &mut Arena, via: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before, after) = (Undo::default(), arena.stamp(), arena.stamp());
    let (region, second) = attached(&mut undo, before)?;
    fill_other(second, after)?;
    Ok(Scene::new(region.range(), before, After::Stamp(after), undo, move |returned, _| {
        region.shmat(via, second, libc::SHM_REMAP).map_err(region.failed("shmat"))?;
        returned();
        region.load();
        Ok(Change::Happened)
    }))
}
