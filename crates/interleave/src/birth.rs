// SPDX-License-Identifier: MIT OR Apache-2.0
//! The world that an object was born in, in four bytes.
//!
//! Bit 31 says that it was born under exploration, bits 12..31 are its number there, and bits 0..12 say where in the
//! source it was born: an index into a table of places that only grows. Zero is a constant initialiser.
//! The word never changes, so that checking it on the plain path is a predicted branch on the object's own line.

use std::panic::Location;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::class::LockClass;
use crate::lockdep::Site;
use crate::world::{self, Id, Op, OpKind, World};

const SITE_BITS: u32 = 12;
const SITES: usize = 1 << SITE_BITS;
const EXPLORED: u32 = 1 << 31;
const MAX_ID: u32 = (EXPLORED >> SITE_BITS) - 1;

/// What kind of object was born, with what an engine must know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ObjectKind {
    Mutex,
    RwLock,
    SpinLock,
    Semaphore,
    WaitQueue,
    Atomic,
    Once,
    Ghost,
}

/// A new object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Born {
    pub(crate) kind: ObjectKind,
    pub(crate) class: Option<&'static LockClass>,
    pub(crate) site: Site,
    /// The permits of a semaphore, the value of an atomic, the digest of guarded data; `None` if it has no digest.
    pub(crate) value: Option<u64>,
    /// A lock that guards no data.
    pub(crate) bare: bool,
}

/// Where an object was born.
#[derive(Clone, Copy)]
pub(crate) struct Birth(u32);

impl Birth {
    /// By a constant initialiser: plain.
    pub(crate) const CONST: Birth = Birth(0);

    /// Here and now; `value` is computed under exploration only.
    #[inline]
    pub(crate) fn here(
        kind: ObjectKind,
        class: Option<&'static LockClass>,
        site: Site,
        value: impl FnOnce() -> Option<u64>,
    ) -> Birth {
        Birth::of_lock(kind, class, site, false, value)
    }

    /// As [`Birth::here`]; `bare`: a lock that guards no data.
    #[inline]
    pub(crate) fn of_lock(
        kind: ObjectKind,
        class: Option<&'static LockClass>,
        site: Site,
        bare: bool,
        value: impl FnOnce() -> Option<u64>,
    ) -> Birth {
        match world::active() {
            None => Birth(place(site)),
            Some(world) => Birth::explored(world, &Born { kind, class, site, value: value(), bare }),
        }
    }

    #[cold]
    #[inline(never)]
    fn explored(world: &dyn World, born: &Born) -> Birth {
        if world.aborting() {
            // It cannot outlive the unwinding, and nothing checks births until that ends.
            return Birth(EXPLORED | place(born.site));
        }
        let id = world.birth(born);
        assert!(
            id <= MAX_ID,
            "more than {MAX_ID} objects in one execution: the scenario is too big to explore"
        );
        Birth(EXPLORED | (id << SITE_BITS) | place(born.site))
    }

    /// Does an operation on this object run plainly? `false` may also mean that it must not run here at all.
    #[inline(always)]
    pub(crate) fn is_plain(self) -> bool {
        world::active().is_none() && self.0 & EXPLORED == 0
    }

    /// The world in which an operation on this object runs.
    #[inline(always)]
    pub(crate) fn world(self, site: Site) -> Option<&'static dyn World> {
        let world = world::active();
        let explored = self.0 & EXPLORED != 0;
        if world.is_none() && !explored {
            return None;
        }
        if world.is_some() && explored {
            return world;
        }
        self.other(world, site)
    }

    #[cold]
    #[inline(never)]
    fn other(self, world: Option<&'static dyn World>, site: Site) -> Option<&'static dyn World> {
        let explored = self.0 & EXPLORED != 0;
        if std::thread::panicking() || world.is_some_and(World::aborting) {
            return world;
        }
        let (born, used) = if explored { ("under", "outside") } else { ("outside", "under") };
        let place = match self.site() {
            Some(place) => format!("at {place}"),
            None => "by a constant initialiser".to_owned(),
        };
        panic!(
            "an object born {born} exploration {place} is used {used} it at {site}: make one in each world"
        );
    }

    /// The operation `kind` on this object.
    pub(crate) fn op(self, kind: OpKind, class: Option<&'static LockClass>, site: Site) -> Op {
        let object = (self.0 & EXPLORED != 0).then_some((self.0 & !EXPLORED) >> SITE_BITS as Id);
        Op { kind, object, class, site }
    }

    fn site(self) -> Option<Site> {
        let site = PLACES[self.0 as usize % SITES].load(Ordering::Relaxed);
        // SAFETY: the table holds null, or pointers made from `&'static Location` by `place`.
        unsafe { site.as_ref() }
    }
}

static PLACES: [AtomicPtr<Location<'static>>; SITES] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; SITES];

/// The index of `site`, or zero if the table has no room near its hash.
#[inline]
fn place(site: Site) -> u32 {
    let pointer = std::ptr::from_ref(site).cast_mut();
    let hash = (pointer.addr() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SITE_BITS);
    for probe in 0..16 {
        let index = (hash as usize + probe) % SITES;
        if index == 0 {
            continue;
        }
        let found = PLACES[index].load(Ordering::Relaxed);
        let claimed = found.is_null()
            && match PLACES[index].compare_exchange(found, pointer, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => true,
                Err(winner) => winner == pointer,
            };
        if claimed || found == pointer {
            return index as u32;
        }
    }
    0
}
