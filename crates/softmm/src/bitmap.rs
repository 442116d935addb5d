// SPDX-License-Identifier: MIT OR Apache-2.0
//! The free lists of a machine: which of a fixed number of things are taken.
//!
//! Atomic words and no lock, so that something can be given back in any context. The lowest free one is handed out
//! first: deterministic, and soon a second life for what was freed too early. Taking costs a scan from the start.

use interleave::{AtomicU64, Ordering};

/// One bit a thing, set while it is taken; bits past the last thing are always set.
pub(crate) struct Bitmap {
    words: Box<[AtomicU64]>,
    bits: usize,
    /// How many takings from now one fails though there is enough; 0 is never.
    fail_nth: AtomicU64,
}

impl Bitmap {
    pub(crate) fn new(bits: usize) -> Bitmap {
        let words: Box<[AtomicU64]> = (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        if !bits.is_multiple_of(64) {
            words[bits / 64].store(u64::MAX << (bits % 64), Ordering::SeqCst);
        }
        Bitmap { words, bits, fail_nth: AtomicU64::new(0) }
    }

    pub(crate) fn fail_nth(&self, n: u64) {
        self.fail_nth.store(n, Ordering::SeqCst);
    }

    /// The failure that was asked for has not come yet.
    pub(crate) fn failure_is_due(&self) -> bool {
        self.fail_nth.load(Ordering::SeqCst) != 0
    }

    fn fails_now(&self) -> bool {
        self.failure_is_due() && self.fail_nth.fetch_sub(1, Ordering::SeqCst) == 1
    }

    pub(crate) fn take_lowest(&self) -> Option<usize> {
        if self.fails_now() {
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
