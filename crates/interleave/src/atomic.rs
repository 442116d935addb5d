// SPDX-License-Identifier: MIT OR Apache-2.0
//! Atomics and fences.
//!
//! Plainly they are std's, behind two predicted branches: which world the thread is in, and which one the atomic
//! was born in. That is half a nanosecond on a load and nothing that shows on a read-modify-write
//! (benches/locks.rs). The second branch could go, at the price that an atomic which leaks out of an exploration
//! is used unseen. Under exploration each access is a scheduling point, and memory is sequentially consistent
//! whatever the ordering says: weak memory is not explored.

use std::fmt;
use std::panic::Location;
use std::sync::atomic as plain;

pub use std::sync::atomic::Ordering;

use crate::birth::{Birth, ObjectKind};
use crate::here::Here;
use crate::lockdep::Site;
use crate::world::{self, OpKind, World};

/// A fence, as [`std::sync::atomic::fence`].
///
/// # Panics
/// If `order` is `Relaxed`.
#[track_caller]
#[inline]
pub fn fence(order: Ordering) {
    world::note(OpKind::Fence);
    plain::fence(order);
}

/// A value in an atomic as the world is told of it.
trait Word: Copy {
    fn word(self) -> u64;
}

macro_rules! words {
    ($($t:ty),*) => {$(
        impl Word for $t {
            fn word(self) -> u64 {
                self as u64
            }
        }
    )*};
}
words!(bool, u32, u64, i64, usize);

/// Announces an access, does it, and says what came of it: `access` returns its result, and the value to tell.
#[cold]
#[inline(never)]
pub(crate) fn explored<R>(
    world: &dyn World,
    birth: Birth,
    kind: OpKind,
    site: Site,
    access: impl FnOnce() -> R,
    value: impl FnOnce() -> u64,
) -> R {
    if world.aborting() {
        return access();
    }
    let op = birth.op(kind, None, site);
    world.point(&op);
    let result = access();
    world.done(&op, value());
    result
}

macro_rules! atomic {
    ($name:ident, $value:ty, $doc:literal, [$($op:ident),*]) => {
        #[doc = $doc]
        pub struct $name {
            value: plain::$name,
            birth: Birth,
        }

        impl $name {
            /// An atomic that begins as `value`, in the world of the calling thread.
            #[track_caller]
            #[inline]
            pub fn new(value: $value) -> Self {
                let birth = Birth::here(ObjectKind::Atomic, None, Location::caller(), || Some(value.word()));
                Self { value: plain::$name::new(value), birth }
            }

            /// An atomic in a static; it cannot be used under exploration.
            #[inline]
            pub const fn const_new(value: $value) -> Self {
                Self { value: plain::$name::new(value), birth: Birth::CONST }
            }

            /// Where [`Birth::is_plain`] is not so. Apart from the operations, each of which would otherwise hold its
            /// closure twice, and be too big to be inlined.
            #[track_caller]
            #[cold]
            #[inline(never)]
            fn access<R>(&self, kind: OpKind, access: impl FnOnce(&plain::$name) -> R) -> R {
                let site = Location::caller();
                match self.birth.world(site) {
                    None => access(&self.value),
                    Some(world) => explored(
                        world,
                        self.birth,
                        kind,
                        site,
                        || access(&self.value),
                        || self.value.load(Ordering::Relaxed).word(),
                    ),
                }
            }

            /// Its value.
            #[track_caller]
            #[inline(always)]
            pub fn load(&self, order: Ordering) -> $value {
                if self.birth.is_plain() {
                    return self.value.load(order);
                }
                self.access(OpKind::Load, |v| v.load(order))
            }

            /// As [`load`](Self::load), of a path that has asked where it is.
            #[track_caller]
            #[inline(always)]
            pub fn load_here(&self, here: Here, order: Ordering) -> $value {
                if here.is_plain() {
                    debug_assert!(self.birth.is_plain(), "an object born under exploration is used outside it");
                    return self.value.load(order);
                }
                self.load(order)
            }

            /// As [`store`](Self::store), of a path that has asked where it is.
            #[track_caller]
            #[inline(always)]
            pub fn store_here(&self, here: Here, value: $value, order: Ordering) {
                if here.is_plain() {
                    debug_assert!(self.birth.is_plain(), "an object born under exploration is used outside it");
                    return self.value.store(value, order);
                }
                self.store(value, order);
            }

            /// Sets its value.
            #[track_caller]
            #[inline(always)]
            pub fn store(&self, value: $value, order: Ordering) {
                if self.birth.is_plain() {
                    return self.value.store(value, order);
                }
                self.access(OpKind::Store, |v| v.store(value, order));
            }

            /// Sets its value. The value before.
            #[track_caller]
            #[inline(always)]
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                if self.birth.is_plain() {
                    return self.value.swap(value, order);
                }
                self.access(OpKind::Rmw, |v| v.swap(value, order))
            }

            $(
                #[doc = concat!("As std's `", stringify!($op), "`. The value before.")]
                #[track_caller]
                #[inline(always)]
                pub fn $op(&self, value: $value, order: Ordering) -> $value {
                    if self.birth.is_plain() {
                        return self.value.$op(value, order);
                    }
                    self.access(OpKind::Rmw, |v| v.$op(value, order))
                }
            )*

            /// Sets its value to `new` if it is `current`. The value before, as `Ok` if it was set.
            ///
            /// # Errors
            /// The value found, if it was not `current`.
            #[track_caller]
            #[inline(always)]
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                if self.birth.is_plain() {
                    return self.value.compare_exchange(current, new, success, failure);
                }
                self.access(OpKind::Rmw, |v| v.compare_exchange(current, new, success, failure))
            }

            /// The value for a [`Digest`](crate::Digest): no access, and no scheduling point. To be looked at where
            /// nobody changes it.
            #[inline]
            pub fn peek(&self) -> $value {
                self.value.load(Ordering::Relaxed)
            }

            /// Which atomic it is, for a [`Digest`](crate::Digest) of what refers to it: the same in every execution
            /// in which the same thread makes it as its n-th object. 0 outside exploration.
            pub fn identity(&self) -> u64 {
                let engine = world::active().and_then(World::engine);
                engine.map_or(0, |engine| engine.key_of(self.birth.op(OpKind::Load, None, Location::caller()).object))
            }

            /// The value, without an atomic access: nobody else has it.
            #[inline]
            pub fn get_mut(&mut self) -> &mut $value {
                self.value.get_mut()
            }

            /// Takes the value out.
            #[inline]
            pub fn into_inner(self) -> $value {
                self.value.into_inner()
            }
        }

        impl Default for $name {
            #[track_caller]
            fn default() -> Self {
                Self::new(<$value>::default())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.value.fmt(f)
            }
        }
    };
}

atomic!(
    AtomicBool,
    bool,
    "An atomic flag. Any context; in statics: [`const_new`](Self::const_new), plain only.",
    [fetch_or, fetch_and, fetch_xor]
);
atomic!(
    AtomicU32,
    u32,
    "An atomic `u32`. Any context; in statics: [`const_new`](Self::const_new), plain only.",
    [fetch_add, fetch_sub, fetch_or, fetch_and, fetch_xor, fetch_max, fetch_min]
);
atomic!(
    AtomicU64,
    u64,
    "An atomic `u64`. Any context; in statics: [`const_new`](Self::const_new), plain only.",
    [fetch_add, fetch_sub, fetch_or, fetch_and, fetch_xor, fetch_max, fetch_min]
);
atomic!(
    AtomicI64,
    i64,
    "An atomic `i64`. Any context; in statics: [`const_new`](Self::const_new), plain only.",
    [fetch_add, fetch_sub, fetch_or, fetch_and, fetch_xor, fetch_max, fetch_min]
);
atomic!(
    AtomicUsize,
    usize,
    "An atomic `usize`. Any context; in statics: [`const_new`](Self::const_new), plain only.",
    [fetch_add, fetch_sub, fetch_or, fetch_and, fetch_xor, fetch_max, fetch_min]
);
