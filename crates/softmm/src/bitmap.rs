// SPDX-License-Identifier: MIT OR Apache-2.0
//! The free lists of a machine: which of a fixed number of things are taken.
//!
//! Atomic words and no lock, so that something can be given back in any context. The lowest free one is handed out
//! first: deterministic, and soon a second life for what was freed too early. Taking costs a scan from the start.

use crate::fail::FailNth;
use interleave::{AtomicU64, Ordering};

/// One bit a thing, set while it is taken; bits past the last thing are always set.
pub(crate) struct Bitmap {
    words: Box<[AtomicU64]>,
    bits: usize,
    pub(crate) fail: FailNth,
}

impl Bitmap {
    pub(crate) fn new(bits: usize) -> Bitmap {
        let words: Box<[AtomicU64]> = (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        if !bits.is_multiple_of(64) {
            words[bits / 64].store(u64::MAX << (bits % 64), Ordering::SeqCst);
        }
        Bitmap { words, bits, fail: FailNth::never() }
    }

    pub(crate) fn take_lowest(&self) -> Option<usize> {
        if self.fail.fails_now() {
            return None;
        }
        for (i, word) in self.words.iter().enumerate() {
            let mut seen = word.load(Ordering::SeqCst);
            while seen != u64::MAX {
                let bit = seen.trailing_ones();
                match word.compare_exchange(seen, seen | 1 << bit, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => return Some(i * 64 + bit as usize),
                    Err(now) => seen = now,
                }
            }
        }
        None
    }

    pub(crate) fn give_back(&self, index: usize) {
        let mask = 1 << (index % 64);
        let before = self.words[index / 64].fetch_and(!mask, Ordering::SeqCst);
        assert_ne!(before & mask, 0, "{index} given back twice");
    }

    pub(crate) fn zeros(&self) -> usize {
        self.words.iter().map(|w| w.load(Ordering::SeqCst).count_zeros() as usize).sum()
    }

    pub(crate) fn bits(&self) -> usize {
        self.bits
    }
}
