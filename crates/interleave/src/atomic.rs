// SPDX-License-Identifier: MIT OR Apache-2.0
//! Atomics and fences.
use std::sync::atomic as plain;

pub use std::sync::atomic::Ordering;

/// As [`std::sync::atomic::fence`].
#[track_caller]
#[inline]
pub fn fence(order: Ordering) {
    plain::fence(order);
}

macro_rules! atomic {
    ($(#[$doc:meta])* $name:ident, $value:ty, [$($op:ident),*]) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub struct $name {
            value: plain::$name,
        }

        impl $name {
            /// An atomic that begins as `value`.
            #[track_caller]
            #[inline]
            pub fn new(value: $value) -> Self {
                Self::const_new(value)
            }

            /// An atomic in a static.
            #[inline]
            pub const fn const_new(value: $value) -> Self {
                Self { value: plain::$name::new(value) }
            }

            /// Its value.
            #[track_caller]
            #[inline]
            pub fn load(&self, order: Ordering) -> $value {
                self.value.load(order)
            }

            /// Sets its value.
            #[track_caller]
            #[inline]
            pub fn store(&self, value: $value, order: Ordering) {
                self.value.store(value, order);
            }

            /// Sets its value and returns the one before.
            #[track_caller]
            #[inline]
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                self.value.swap(value, order)
            }

            $(
                /// As the method of the same name of std's atomic: returns the value before.
                #[track_caller]
                #[inline]
                pub fn $op(&self, value: $value, order: Ordering) -> $value {
                    self.value.$op(value, order)
                }
            )*

            /// Sets its value to `new` if it is `current`; the value before, as `Ok` if it was.
            ///
            /// # Errors
            /// The value found, if it was not `current`.
            #[track_caller]
            #[inline]
            pub fn compare_exchange(&self, current: $value, new: $value, success: Ordering, failure: Ordering) -> Result<$value, $value> {
                self.value.compare_exchange(current, new, success, failure)
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
    };
}

atomic!(/// An atomic flag.
    AtomicBool, bool, [fetch_or, fetch_and, fetch_xor]);
atomic!(/// An atomic `u32`.
    AtomicU32, u32, [fetch_add, fetch_sub, fetch_or, fetch_and, fetch_xor, fetch_max, fetch_min]);
atomic!(/// An atomic `u64`.
    AtomicU64, u64, [fetch_add, fetch_sub, fetch_or, fetch_and, fetch_xor, fetch_max, fetch_min]);
atomic!(/// An atomic `i64`.
    AtomicI64, i64, [fetch_add, fetch_sub, fetch_or, fetch_and, fetch_xor, fetch_max, fetch_min]);
atomic!(/// An atomic `usize`.
    AtomicUsize, usize, [fetch_add, fetch_sub, fetch_or, fetch_and, fetch_xor, fetch_max, fetch_min]);
