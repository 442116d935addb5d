// SPDX-License-Identifier: MIT OR Apache-2.0
//! What every exclusive lock is made of: parking_lot's one-byte lock, and the world that it was born in.
//!
//! Under exploration the world decides who gets a lock, and the lock is then taken by a try that must succeed.

use parking_lot::lock_api::RawMutex as _;

use crate::birth::{Birth, ObjectKind};
use crate::class::LockClass;
use crate::lockdep::Site;
use crate::world::{Op, OpKind, World};

pub(crate) struct RawLock {
    raw: parking_lot::RawMutex,
    birth: Birth,
}

impl RawLock {
    pub(crate) const fn plain() -> RawLock {
        RawLock { raw: parking_lot::RawMutex::INIT, birth: Birth::CONST }
    }

    #[inline]
    pub(crate) fn here(
        kind: ObjectKind,
        class: Option<&'static LockClass>,
        site: Site,
        bare: bool,
        digest: impl FnOnce() -> Option<u64>,
    ) -> RawLock {
        RawLock { raw: parking_lot::RawMutex::INIT, birth: Birth::of_lock(kind, class, site, bare, digest) }
    }

    #[inline(always)]
    pub(crate) fn lock(&self, class: Option<&'static LockClass>, site: Site) {
        match self.birth.world(site) {
            None => self.raw.lock(),
            Some(world) => grant(world, self.birth, OpKind::Lock, class, site, &|| self.raw.try_lock()),
        }
    }

    /// A look, without locking, at what only holders change.
    #[inline(always)]
    pub(crate) fn look(&self, site: Site) {
        if let Some(world) = self.birth.world(site)
            && !world.aborting()
        {
            world.point(&self.birth.op(OpKind::Load, None, site));
        }
    }

    #[inline(always)]
    pub(crate) fn try_lock(&self, class: Option<&'static LockClass>, site: Site) -> bool {
        match self.birth.world(site) {
            None => self.raw.try_lock(),
            Some(world) => attempt(world, self.birth, OpKind::TryLock, class, site, &|| self.raw.try_lock()),
        }
    }

    /// Unlocks; `digest` of the data is computed under exploration only.
    ///
    /// # Safety
    /// The caller holds the lock.
    #[inline(always)]
    pub(crate) unsafe fn unlock(
        &self,
        class: Option<&'static LockClass>,
        site: Site,
        digest: impl FnOnce() -> u64,
    ) {
        match self.birth.world(site) {
            // SAFETY: the caller holds the lock.
            None => unsafe { self.raw.unlock() },
            Some(world) => release(
                world,
                self.birth.op(OpKind::Unlock, class, site),
                digest,
                // SAFETY: the caller holds the lock, and `release` calls this once.
                || unsafe { self.raw.unlock() },
            ),
        }
    }
}

/// Waits until the world grants `kind`, then takes the thing itself.
///
/// # Panics
/// If the world grants what cannot be taken.
#[cold]
#[inline(never)]
pub(crate) fn grant(
    world: &dyn World,
    birth: Birth,
    kind: OpKind,
    class: Option<&'static LockClass>,
    site: Site,
    take: &dyn Fn() -> bool,
) {
    let op = birth.op(kind, class, site);
    if world.aborting() {
        // Most locks are free; one that is not will be when its holder has been unwound.
        while !take() {
            world.point(&op);
        }
        return;
    }
    if world.off(&op) {
        enter_without(world, &op, take);
        return;
    }
    world.point(&op);
    assert!(take(), "the world granted {op:?}, which cannot be taken");
}

/// Passes a lock that is switched off, if the world does not unwind it.
fn enter_without(world: &dyn World, op: &Op, take: &dyn Fn() -> bool) {
    if world.enter_without(op) {
        assert!(take(), "the world let a thread into {op:?}, which is held");
    }
}

/// Asks the world whether a try succeeds, then takes the thing itself.
///
/// # Panics
/// If the world grants what cannot be taken.
#[cold]
#[inline(never)]
pub(crate) fn attempt(
    world: &dyn World,
    birth: Birth,
    kind: OpKind,
    class: Option<&'static LockClass>,
    site: Site,
    take: &dyn Fn() -> bool,
) -> bool {
    if world.aborting() {
        return take();
    }
    let op = birth.op(kind, class, site);
    if world.off(&op) {
        enter_without(world, &op, take);
        return true;
    }
    let granted = world.point(&op);
    assert!(!granted || take(), "the world granted {op:?}, which cannot be taken");
    granted
}

/// Gives when dropped: a thread that is unwound before it could let a thing go must not keep it from the others.
struct Giving<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for Giving<F> {
    fn drop(&mut self) {
        if let Some(give) = self.0.take() {
            give();
        }
    }
}

/// Lets a thing go, first in earnest and then in the world; if it was taken at all.
#[cold]
#[inline(never)]
pub(crate) fn release(world: &dyn World, op: Op, digest: impl FnOnce() -> u64, give: impl FnOnce()) {
    if world.leave_without(&op) {
        return;
    }
    let giving = Giving(Some(give));
    if world.aborting() {
        return;
    }
    world.point(&op);
    let digest = world.hashes().then(digest);
    drop(giving);
    if let Some(digest) = digest {
        world.done(&op, digest);
    }
}
