// SPDX-License-Identifier: MIT OR Apache-2.0
//! State that the checking needs and the program does not have.

use std::fmt;
use std::panic::Location;

use parking_lot::Mutex;

use crate::birth::{Birth, ObjectKind};
use crate::world::OpKind;

/// A value that is looked at and changed together with the step before: never a point where threads switch, so that
/// checking adds no schedule; but known to the explorer, so that no order of two accesses is left out.
///
/// Outside exploration it is a lock of its own, held for one call.
pub struct Ghost<T> {
    value: Mutex<T>,
    birth: Birth,
    digest: Option<fn(&T) -> u64>,
}

impl<T> Ghost<T> {
    /// A ghost in the world of the calling thread.
    #[track_caller]
    pub fn new(value: T) -> Ghost<T> {
        let birth = Birth::here(ObjectKind::Ghost, None, Location::caller(), || None);
        Ghost { value: Mutex::new(value), birth, digest: None }
    }

    /// A ghost that can be hashed, to recognise a state.
    #[track_caller]
    pub fn with_digest(value: T, digest: fn(&T) -> u64) -> Ghost<T> {
        let birth = Birth::here(ObjectKind::Ghost, None, Location::caller(), || Some(digest(&value)));
        Ghost { value: Mutex::new(value), birth, digest: Some(digest) }
    }

    /// Changes it. `f` must use no facade.
    #[track_caller]
    pub fn update<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        self.access(OpKind::Ghost, f)
    }

    /// Looks at it. `f` must use no facade.
    #[track_caller]
    pub fn read<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        self.access(OpKind::GhostRead, |value| f(value))
    }

    #[track_caller]
    fn access<R>(&self, kind: OpKind, f: impl FnOnce(&mut T) -> R) -> R {
        let site = Location::caller();
        let world = self.birth.world(site).filter(|world| !world.aborting());
        let op = self.birth.op(kind, None, site);
        if let Some(world) = world {
            world.point(&op);
        }
        let mut value = self.value.lock();
        let result = f(&mut value);
        if let Some(world) = world {
            let digest = self.digest.filter(|_| world.hashes()).map_or(0, |digest| digest(&value));
            drop(value);
            world.done(&op, digest);
        }
        result
    }

    /// Takes the value out.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

impl<T: fmt::Debug> fmt::Debug for Ghost<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}
