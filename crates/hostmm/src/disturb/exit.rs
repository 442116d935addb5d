// SPDX-License-Identifier: MIT OR Apache-2.0
//! exit: the whole address space goes.
//!
//! Notifier sequence: `exit_mmap` -> `mmu_notifier_release`: the one callback that is not about a range. Nobody
//! inside the process lives to hear it, and a source that watches from outside has lost its subject: the row exists
//! to say so.

use super::Outcome::NotMappable;
use super::mem::Region;
use super::process::Child;
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Via};

pub(super) const EVENTS: &[&[Event]] =
    &[&[Event::new("exit/other_process", "exit_mmap -> mmu_notifier_release", Via::OtherProcess, exit)
        .expect(
            NotMappable,
            NotMappable,
            "the memory is the child's and ends with it: nobody is left to be told",
        )
        .not_kvm()]];

/// The watched page is a child's (at the same address, this process has its own).
fn exit(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let (mut undo, before) = (Undo::default(), arena.stamp());
    let region = Region::stamped(&mut undo, 1, before)?;
    let mut child = Child::fork(Via::Libc, None).map_err(region.failed("fork"))?;
    Ok(Scene::new(region.range(), before, After::Stamp(before), undo, move |returned, _| {
        child.kill();
        returned();
        Ok(Change::Happened)
    }))
}
