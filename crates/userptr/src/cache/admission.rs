// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which ranges are worth an entry.

use interleave::{AtomicU64, Ordering};
use mmu_notifier::{Access, Range};

const SLOTS: usize = 1024;

/// Which ranges get an entry. What is not admitted is registered for one lease: right, and slower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Admit {
    /// All.
    #[default]
    Always,
    /// Those asked for a second time, and those of at least so many bytes: keeps an allocator's churn from driving
    /// out what is used again, and with a source of userfaultfd from making its munmap slower.
    SecondUse {
        /// Bytes from which a range is admitted at once.
        or_bytes: u64,
    },
}

/// Ranges asked for lately, by hash: an answer may be wrong either way, at the cost of an entry or a use.
pub(super) struct Recent(Box<[AtomicU64]>);

impl Recent {
    pub(super) fn new() -> Recent {
        Recent((0..SLOTS).map(|_| AtomicU64::new(0)).collect())
    }

    pub(super) fn admits(&self, rule: Admit, range: Range, access: Access) -> bool {
        match rule {
            Admit::Always => true,
            Admit::SecondUse { or_bytes } if range.len() >= or_bytes => true,
            Admit::SecondUse { .. } => {
                let hash = interleave::mix(range.start() ^ access as u64, range.len()) | 1;
                self.0[hash as usize % SLOTS].swap(hash, Ordering::Relaxed) == hash
            }
        }
    }
}
