// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a hit reads of an entry, beside its state in half a cache line.
//!
//! Of a leased entry it is the entry's own: it is set before it comes alive, and again after it is taken apart.
//!
//! Half a line, because where registrations are many each hit waits for memory: the more of them the caches hold, the
//! fewer do.

use interleave::{AtomicQuad, AtomicWord, Here, Ordering};
use mmu_notifier::primary::Count;
use mmu_notifier::{PAGE_SHIFT, Range};

use super::slab::USERS;

/// The mark of an entry that the device may write.
pub(super) const WRITE: u64 = 1;
/// The mark of an entry for one lease and no more.
pub(super) const ONCE: u64 = 2;

/// The words of an entry that anybody may read at any time.
#[derive(Clone, Copy)]
pub(super) struct Head<'c>(pub(super) AtomicQuad<'c>);

/// The words of a head: its first page and how many, see [`Pages`].
const PAGES: usize = 0;
/// Where the mm counts the range, or [`NEVER`]; and [`USED`].
const KEY: usize = 1;
/// With a key what is counted there while the range has not changed; without one the mm's era when it last had not.
const STAMP: usize = 2;

/// Leased since the clock's hand passed.
const USED: u64 = 1 << 63;
/// No key.
const NEVER: u64 = USED - 1;
/// No era, in an entry.
const NO_STAMP: u64 = u64::MAX;
/// No era, of an mm: unlike that of any entry.
pub(super) const NO_ERA: u64 = u64::MAX - 1;

/// Where the mm counts, as it is found.
#[derive(Clone, Copy)]
pub(super) struct Key(u64);

impl Key {
    /// `None`: it does not count.
    #[inline(always)]
    pub(super) fn get(self) -> Option<u64> {
        if self.0 & NEVER == NEVER { None } else { Some(self.0 & NEVER) }
    }
}

/// Pages of user space, in a word: the first above, how many below. More than 2 TiB count as so much, and are found by what
/// is asked of these.
#[derive(Clone, Copy)]
pub(super) struct Pages(u64);

impl Pages {
    const COUNT_BITS: u32 = 29;
    const COUNT: u64 = (1 << Pages::COUNT_BITS) - 1;

    fn of(range: Range) -> Pages {
        Pages(range.start() >> PAGE_SHIFT << Pages::COUNT_BITS | range.pages().min(Pages::COUNT))
    }

    fn count(self) -> u64 {
        self.0 & Pages::COUNT
    }

    #[inline(always)]
    pub(super) fn contain(self, want: Range) -> bool {
        let before = (want.start() >> PAGE_SHIFT).wrapping_sub(self.0 >> Pages::COUNT_BITS);
        before < self.count() && want.pages() <= self.count() - before
    }
}

impl<'c> Head<'c> {
    #[inline(always)]
    fn word(&self, word: usize) -> AtomicWord<'c> {
        self.0.word(USERS + word)
    }

    /// By the owner of an entry that is being built; `count`: see [`Subscription::count_at`].
    pub(super) fn set(&self, range: Range, count: Option<Count>) {
        let Count { key, value } = count.unwrap_or(Count { key: NEVER, value: NO_STAMP });
        debug_assert!(key <= NEVER, "a key has 63 bits");
        self.word(KEY).store(key | USED, Ordering::Relaxed);
        self.word(STAMP).store(value, Ordering::Relaxed);
        // Release: a reader who finds it here finds the state of this life, or a later one.
        self.word(PAGES).store(Pages::of(range).0, Ordering::Release);
    }

    pub(super) fn bytes(&self) -> u64 {
        Pages(self.word(PAGES).load(Ordering::Relaxed)).count() << PAGE_SHIFT
    }

    /// Between two looks at the state that say the same they are the entry's own.
    #[inline(always)]
    pub(super) fn pages(&self, here: Here) -> Pages {
        Pages(self.word(PAGES).load_here(here, Ordering::Acquire))
    }

    #[inline(always)]
    pub(super) fn key(&self, here: Here) -> Key {
        Key(self.word(KEY).load_here(here, Ordering::Relaxed))
    }

    #[inline(always)]
    pub(super) fn stamp(&self, here: Here) -> u64 {
        self.word(STAMP).load_here(here, Ordering::Relaxed)
    }

    /// Of a leased entry without a key.
    pub(super) fn set_stamp(&self, era: u64) {
        self.word(STAMP).store(era, Ordering::Relaxed);
    }

    /// Of a leased entry, whose key nobody changes. Written only if it changes: threads that use one entry share the line.
    #[inline(always)]
    pub(super) fn touch(&self, here: Here, key: Key) {
        if key.0 & USED == 0 {
            self.word(KEY).store_here(here, key.0 | USED, Ordering::Relaxed);
        }
    }

    /// Was it used since it was asked last?
    pub(super) fn take_used(&self) -> bool {
        self.word(KEY).fetch_and(!USED, Ordering::Relaxed) & USED != 0
    }
}
