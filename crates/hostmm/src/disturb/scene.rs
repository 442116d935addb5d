// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a set-up hands out: the watched memory, the change that is about to happen to it, and the way back.
//!
//! Invariant: the undo steps of a scene run in the reverse order of their set-up, once, on drop, also when the set-up
//! itself fails half way.

use std::path::{Path, PathBuf};

use mmu_notifier::Range;

use super::mem::Region;
use super::{DisturbError, Via};

/// Where scenes take what they share: a directory for files and fresh stamps.
#[derive(Debug)]
pub struct Arena {
    dir: PathBuf,
    next: u64,
}

impl Arena {
    /// An arena whose files live in `dir`; a disk file system lets the writeback events run.
    pub fn new(dir: impl Into<PathBuf>) -> Arena {
        Arena { dir: dir.into(), next: 1 }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A number that no page of this process holds yet. Never 0, which is what fresh memory reads.
    pub(super) fn stamp(&mut self) -> u64 {
        self.next += 1;
        // An odd multiplier keeps the numbers distinct and spreads them over all eight bytes.
        (self.next ^ (u64::from(std::process::id()) << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }
}

/// What the CPU sees at the watched address when the change is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The first page of the watched range is filled with this number.
    Stamp(u64),
    /// A read faults: not mapped, no right to read, past the end of the file, or a guard.
    Faults,
}

/// Whether the kernel did it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The memory has changed as [`Scene::after`] says.
    Happened,
    /// The kernel was asked and declined: the memory is as it was before.
    Refused,
}

pub(super) type Action = Box<dyn FnOnce(&mut dyn FnMut(), &mut Undo) -> Result<Change, DisturbError> + Send>;

/// The way back, as a stack.
#[derive(Default)]
pub(super) struct Undo(Vec<Step>);

enum Step {
    Unmap(Region),
    Run(Box<dyn FnOnce() + Send>),
}

impl Undo {
    pub(super) fn push(&mut self, step: impl FnOnce() + Send + 'static) {
        self.0.push(Step::Run(Box::new(step)));
    }

    /// Keep `thing` until everything that was set up after it is undone.
    pub(super) fn keep(&mut self, thing: impl Send + 'static) {
        self.push(move || drop(thing));
    }

    /// The scene has mapped `region`: unmap it in the end.
    pub(super) fn own(&mut self, region: Region) {
        self.0.push(Step::Unmap(region));
    }

    /// The scene's `region` is a hole now. Any thread may map memory of its own there, so it must not be unmapped.
    pub(super) fn disown(&mut self, region: Region) {
        let mut kept = Vec::with_capacity(self.0.len() + 1);
        for step in self.0.drain(..) {
            match step {
                Step::Unmap(owned) => kept.extend(owned.without(region).map(Step::Unmap)),
                run => kept.push(run),
            }
        }
        self.0 = kept;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some(step) = self.0.pop() {
            match step {
                Step::Unmap(region) => drop(region.munmap(Via::Libc)),
                Step::Run(run) => run(),
            }
        }
    }
}

/// Memory of this process that is about to change.
pub struct Scene {
    watched: Range,
    changed: Range,
    before: u64,
    after: After,
    action: Option<Action>,
    undo: Undo,
}

impl Scene {
    pub(super) fn new(
        watched: Range,
        before: u64,
        after: After,
        undo: Undo,
        action: impl FnOnce(&mut dyn FnMut(), &mut Undo) -> Result<Change, DisturbError> + Send + 'static,
    ) -> Scene {
        Scene { watched, changed: watched, before, after, action: Some(Box::new(action)), undo }
    }

    /// The kernel will name `changed` instead of the watched page.
    pub(super) fn changing(mut self, changed: Range) -> Scene {
        self.changed = changed;
        self
    }

    /// The page that a device is given.
    #[must_use]
    pub fn watched(&self) -> Range {
        self.watched
    }

    /// What a notifier is expected to report some part of: the watched page, or more where the kernel names more.
    #[must_use]
    pub fn changed(&self) -> Range {
        self.changed
    }

    /// The number that fills the watched page now, eight bytes at a time, in native byte order.
    #[must_use]
    pub fn before(&self) -> u64 {
        self.before
    }

    /// What the CPU sees afterwards, if the change happens.
    #[must_use]
    pub fn after(&self) -> After {
        self.after
    }

    /// Can a thread that reads the watched page see this change? Where not, an [`Observer`](super::Observer) has
    /// nothing to wait for, and its reads would get in the way of reclaim, migration and merging.
    #[must_use]
    pub fn is_visible(&self) -> bool {
        self.after != After::Stamp(self.before)
    }

    /// Make the change, once.
    ///
    /// `returned` is called on this thread as soon as the changing system call (or the faulting access) is over: at
    /// once after it where this process makes it, on sight where a kernel thread does. What follows, such as a
    /// second mapping at the same address, comes after that call. May sleep, up to some seconds where a kernel
    /// thread has to act.
    ///
    /// # Errors
    /// [`DisturbError`] if the change could not be made. A change that the kernel declines on account of a pin is no
    /// error but [`Change::Refused`].
    pub fn disturb(&mut self, returned: &mut dyn FnMut()) -> Result<Change, DisturbError> {
        let action = self.action.take().ok_or(DisturbError::Spent)?;
        action(returned, &mut self.undo)
    }
}

impl std::fmt::Debug for Scene {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scene")
            .field("watched", &self.watched)
            .field("changed", &self.changed)
            .field("after", &self.after)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalogue;
    use super::super::mem::{PRIVATE, RW};
    use super::*;

    fn mapped(region: Region) -> bool {
        region.madvise(Via::Libc, libc::MADV_NORMAL).is_ok()
    }

    #[test]
    fn what_a_scene_gave_up_is_not_unmapped() {
        let mut undo = Undo::default();
        let region = Region::map(&mut undo, 5, RW, PRIVATE, None).unwrap();
        undo.disown(region.page(2));
        drop(undo);
        let parts = [region.part(0, 2), region.page(2), region.part(3, 2)];
        assert_eq!(parts.map(mapped), [false, true, false]);
        region.page(2).munmap(Via::Libc).unwrap();
    }

    #[test]
    fn a_region_without_a_hole_is_what_is_left_of_it() {
        let mut undo = Undo::default();
        let region = Region::map(&mut undo, 6, RW, PRIVATE, None).unwrap();
        let without = |first, pages| region.part(1, 3).without(region.part(first, pages)).collect::<Vec<_>>();
        assert_eq!(without(2, 1), [region.page(1), region.page(3)]);
        assert_eq!(without(0, 2), [region.part(2, 2)]);
        assert_eq!(without(3, 3), [region.part(1, 2)]);
        assert_eq!(without(0, 6), []);
        assert_eq!(without(5, 1), [region.part(1, 3)]);
    }

    #[test]
    fn undo_runs_backwards_and_once() {
        let (sender, order) = std::sync::mpsc::channel();
        let mut undo = Undo::default();
        for n in 0..3 {
            let sender = sender.clone();
            undo.push(move || sender.send(n).unwrap());
        }
        drop((undo, sender));
        assert_eq!(order.iter().collect::<Vec<_>>(), [2, 1, 0]);
    }

    #[test]
    fn a_scene_is_disturbed_once() {
        let event = catalogue().into_iter().find(|e| e.name == "madv_dontneed/raw").unwrap();
        let mut scene = event.setup(&mut Arena::new("/nonexistent")).unwrap();
        assert_eq!(scene.disturb(&mut || {}).unwrap(), Change::Happened);
        assert!(matches!(scene.disturb(&mut || {}), Err(DisturbError::Spent)));
    }

    #[test]
    fn a_set_up_that_fails_says_what_failed() {
        let event = catalogue().into_iter().find(|e| e.name == "fsync_writeback/raw").unwrap();
        let error = event.setup(&mut Arena::new("/nonexistent")).unwrap_err();
        assert!(error.to_string().starts_with("O_TMPFILE in the arena's directory"), "{error}");
    }
}
