// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many atomic words that are one object under exploration: page-table pages, bitmaps.
//!
//! A scenario with a few page tables would have thousands of objects, and an execution pays for each when it begins. As
//! one object, accesses to different words are taken to depend on each other: a few executions more, never fewer.

use std::panic::Location;
use std::sync::atomic as plain;

use crate::atomic::{Ordering, explored};
use crate::birth::{Birth, ObjectKind};
use crate::digest::mix;
use crate::here::Here;
use crate::world::OpKind;

/// Words of a quad.
const QUAD: usize = 4;
/// Words of a cache line.
const LINE: usize = 2 * QUAD;

struct Quad([plain::AtomicU64; QUAD]);

#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "reached by address")] [Quad; LINE / QUAD]);

/// A fixed number of atomic `u64`; each eight of them, from the first on, are a cache line. Any context; not in statics.
pub struct AtomicWords {
    lines: Box<[Line]>,
    len: usize,
    /// As many as there are whole.
    quads: usize,
    /// One less than there are, if that is a power of two; 0 otherwise.
    mask: usize,
    /// What a change of any word changes; kept under exploration only.
    hash: plain::AtomicU64,
    birth: Birth,
}

impl AtomicWords {
    /// `count` words that begin as `value`, in the world of the calling thread.
    #[track_caller]
    pub fn new(count: usize, value: u64) -> AtomicWords {
        let quad = || Quad(std::array::from_fn(|_| plain::AtomicU64::new(value)));
        let line = || Line([quad(), quad()]);
        AtomicWords {
            lines: (0..count.div_ceil(LINE).max(1)).map(|_| line()).collect(),
            len: count,
            quads: count / QUAD,
            mask: if count.is_power_of_two() { count - 1 } else { 0 },
            hash: plain::AtomicU64::new(0),
            birth: Birth::here(ObjectKind::Atomic, None, Location::caller(), || Some(0)),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// None?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// One of them.
    ///
    /// # Panics
    /// If there is no word `index`.
    #[inline(always)]
    pub fn word(&self, index: usize) -> AtomicWord<'_> {
        assert!(index < self.len);
        // SAFETY: `new` made as many lines as `len` words need, one after the other, and none is ever taken away.
        let word = unsafe { &*self.lines.as_ptr().cast::<plain::AtomicU64>().add(index) };
        AtomicWord { all: self, word }
    }

    /// One of as many as a power of two says, counted around; of any other number the first.
    #[inline(always)]
    pub fn around(&self, index: usize) -> AtomicWord<'_> {
        debug_assert!(self.len.is_power_of_two());
        // SAFETY: `mask` is less than `len`, or 0, where `new` made a line too; none is ever taken away.
        let word = unsafe { &*self.lines.as_ptr().cast::<plain::AtomicU64>().add(index & self.mask) };
        AtomicWord { all: self, word }
    }

    /// The four from `4 * n` on, if there are as many.
    #[inline(always)]
    pub fn get_quad(&self, n: usize) -> Option<AtomicQuad<'_>> {
        if n >= self.quads {
            return None;
        }
        // SAFETY: `new` made as many lines as `len` words need, which are quads one after the other, and none is ever taken
        // away.
        let quad = unsafe { &*self.lines.as_ptr().cast::<Quad>().add(n) };
        Some(AtomicQuad { all: self, quad })
    }

    /// The four from `4 * n` on.
    ///
    /// # Panics
    /// If there are not as many.
    #[inline(always)]
    pub fn quad(&self, n: usize) -> AtomicQuad<'_> {
        self.get_quad(n).unwrap_or_else(|| panic!("{n} of {} fours", self.quads))
    }
}

/// Four of [`AtomicWords`] that are half a cache line.
#[derive(Clone, Copy)]
pub struct AtomicQuad<'a> {
    all: &'a AtomicWords,
    quad: &'a Quad,
}

impl<'a> AtomicQuad<'a> {
    /// One of them.
    ///
    /// # Panics
    /// If `n` is not below four.
    #[inline(always)]
    pub fn word(self, n: usize) -> AtomicWord<'a> {
        AtomicWord { all: self.all, word: &self.quad.0[n] }
    }

    /// Asks for its cache line and waits for nothing: no access, and no more than a hint.
    #[inline(always)]
    pub fn prefetch(self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which has no effect on memory and takes any address.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(self.quad).cast());
        }
    }
}

/// One of [`AtomicWords`]. Its methods are those of [`AtomicU64`](crate::AtomicU64).
#[derive(Clone, Copy)]
pub struct AtomicWord<'a> {
    all: &'a AtomicWords,
    word: &'a plain::AtomicU64,
}

impl AtomicWord<'_> {
    /// As the other atomics' `access`.
    #[track_caller]
    #[cold]
    #[inline(never)]
    fn access<R>(self, kind: OpKind, access: impl FnOnce(&plain::AtomicU64) -> R) -> R {
        let site = Location::caller();
        let Some(world) = self.all.birth.world(site) else { return access(self.word) };
        let counted = || {
            let before = self.word.load(Ordering::Relaxed);
            let result = access(self.word);
            let after = self.word.load(Ordering::Relaxed);
            if before != after {
                let change = self.part(before) ^ self.part(after);
                self.all.hash.fetch_xor(change, Ordering::Relaxed);
            }
            result
        };
        let told = || match kind {
            OpKind::Load => self.word.load(Ordering::Relaxed),
            _ => self.all.hash.load(Ordering::Relaxed),
        };
        explored(world, self.all.birth, kind, site, counted, told)
    }

    /// What a word that has `value` contributes to the hash of all.
    fn part(self, value: u64) -> u64 {
        let bytes = std::ptr::from_ref(self.word).addr() - self.all.lines.as_ptr().addr();
        mix((bytes / size_of::<u64>()) as u64, value)
    }

    /// Its value.
    #[track_caller]
    #[inline(always)]
    pub fn load(self, order: Ordering) -> u64 {
        if self.all.birth.is_plain() {
            return self.word.load(order);
        }
        self.access(OpKind::Load, |word| word.load(order))
    }

    /// As [`load`](Self::load), of a path that has asked where it is.
    #[track_caller]
    #[inline(always)]
    pub fn load_here(self, here: Here, order: Ordering) -> u64 {
        if here.is_plain() {
            debug_assert!(self.all.birth.is_plain(), "an object born under exploration is used outside it");
            return self.word.load(order);
        }
        self.load(order)
    }

    /// As [`store`](Self::store), of a path that has asked where it is.
    #[track_caller]
    #[inline(always)]
    pub fn store_here(self, here: Here, value: u64, order: Ordering) {
        if here.is_plain() {
            debug_assert!(self.all.birth.is_plain(), "an object born under exploration is used outside it");
            return self.word.store(value, order);
        }
        self.store(value, order);
    }

    /// Sets its value.
    #[track_caller]
    #[inline(always)]
    pub fn store(self, value: u64, order: Ordering) {
        if self.all.birth.is_plain() {
            return self.word.store(value, order);
        }
        self.access(OpKind::Store, |word| word.store(value, order));
    }

    /// Sets its value. The value before.
    #[track_caller]
    #[inline(always)]
    pub fn swap(self, value: u64, order: Ordering) -> u64 {
        if self.all.birth.is_plain() {
            return self.word.swap(value, order);
        }
        self.access(OpKind::Rmw, |word| word.swap(value, order))
    }

    /// As std's `fetch_add`. The value before.
    #[track_caller]
    #[inline(always)]
    pub fn fetch_add(self, value: u64, order: Ordering) -> u64 {
        if self.all.birth.is_plain() {
            return self.word.fetch_add(value, order);
        }
        self.access(OpKind::Rmw, |word| word.fetch_add(value, order))
    }

    /// As std's `fetch_sub`. The value before.
    #[track_caller]
    #[inline(always)]
    pub fn fetch_sub(self, value: u64, order: Ordering) -> u64 {
        if self.all.birth.is_plain() {
            return self.word.fetch_sub(value, order);
        }
        self.access(OpKind::Rmw, |word| word.fetch_sub(value, order))
    }

    /// As std's `fetch_or`. The value before.
    #[track_caller]
    #[inline(always)]
    pub fn fetch_or(self, bits: u64, order: Ordering) -> u64 {
        if self.all.birth.is_plain() {
            return self.word.fetch_or(bits, order);
        }
        self.access(OpKind::Rmw, |word| word.fetch_or(bits, order))
    }

    /// As std's `fetch_and`. The value before.
    #[track_caller]
    #[inline(always)]
    pub fn fetch_and(self, bits: u64, order: Ordering) -> u64 {
        if self.all.birth.is_plain() {
            return self.word.fetch_and(bits, order);
        }
        self.access(OpKind::Rmw, |word| word.fetch_and(bits, order))
    }

    /// Sets its value to `new` if it is `current`. The value before, as `Ok` if it was set.
    ///
    /// # Errors
    /// The value found, if it was not `current`.
    #[track_caller]
    #[inline(always)]
    pub fn compare_exchange(
        self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        if self.all.birth.is_plain() {
            return self.word.compare_exchange(current, new, success, failure);
        }
        self.access(OpKind::Rmw, |word| word.compare_exchange(current, new, success, failure))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explore::{Config, Strategy, explore};
    use crate::scope;

    #[test]
    fn words_are_told_apart() {
        let words = AtomicWords::new(3, 5);
        words.word(1).store(7, Ordering::SeqCst);
        assert_eq!(words.word(2).fetch_or(2, Ordering::SeqCst), 5);
        let values: Vec<_> = (0..words.len()).map(|n| words.word(n).load(Ordering::SeqCst)).collect();
        assert_eq!(values, [5, 7, 7]);
    }

    #[test]
    fn quads_are_the_words_in_order() {
        let words = AtomicWords::new(12, 0);
        for n in 0..words.len() {
            words.quad(n / QUAD).word(n % QUAD).store(n as u64, Ordering::Relaxed);
        }
        assert!((0..words.len()).all(|n| words.word(n).load(Ordering::Relaxed) == n as u64));
    }

    /// Two threads that add to a word without care; a value cache that confused words would miss it.
    #[test]
    fn a_lost_update_is_found_by_every_strategy() {
        for strategy in [Strategy::ValueCache, Strategy::Dpor, Strategy::Plain] {
            let report = explore(&Config::new(strategy), |cx| {
                let words = AtomicWords::new(2, 0);
                let add = |index| {
                    let word = words.word(index);
                    word.store(word.load(Ordering::SeqCst) + 1, Ordering::SeqCst);
                };
                scope(cx, |s, _| {
                    s.spawn("a", |_| [0, 1].into_iter().for_each(add));
                    s.spawn("b", |_| [1, 0].into_iter().for_each(add));
                });
                let sum: u64 = (0..2).map(|n| words.word(n).load(Ordering::SeqCst)).sum();
                assert_eq!(sum, 4);
            });
            assert_eq!(report.failures.len(), 1, "{strategy:?}");
        }
    }
}
