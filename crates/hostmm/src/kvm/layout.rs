// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the counters lie in the map that program and process share.
//!
//! ```text
//! byte 0    unmap: global, wide         one cache line: a wide range bumps both
//! byte 64   age:   global, wide
//! byte 128  records lost
//! byte 4096 unmap: one word per bucket
//!     then  age:   one word per bucket
//! ```
//!
//! Every word only ever grows (by one, atomically, 64 bits: no wrap in this life), so the sum of any set of them changes
//! if and only if one of them does.

use super::OpenError;
use mmu_notifier::Range;

/// Counters per part of the address space: which of the program's registrations may be stale.
///
/// The bucket of an address is `(address >> granule_shift) % count`: neighbours get different buckets, and addresses
/// that are `count` granules apart share one, which can only cause a needless re-check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buckets {
    /// How many; a power of two, at most 2^16.
    pub count: u32,
    /// log2 of the bytes that one bucket stands for; 12 to 30.
    pub granule_shift: u32,
    /// A range over more granules than this bumps one `wide` counter, which everybody looks at, instead; 1 to 512.
    pub wide: u32,
}

impl Default for Buckets {
    /// 8192 buckets of 64 KiB (64 KiB of counters; addresses 512 MiB apart alias), wide beyond 4 MiB.
    ///
    /// 64 KiB is about what one registration takes, and a huge page (2 MiB, which the kernel announces whole when it
    /// splits one) is then 32 increments, some 150 ns beside the microseconds that the split takes.
    fn default() -> Buckets {
        Buckets { count: 8192, granule_shift: 16, wide: 64 }
    }
}

/// The map's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) buckets: Option<Buckets>,
    pub(crate) age: bool,
}

/// What a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// invalidate_range_start: the translations of the range are about to change.
    Unmap,
    /// clear_flush_young or clear_young: the accessed bits of the range were taken. Nothing is invalidated.
    Age,
}

pub(crate) const LOST: u32 = 128;
const TABLE: u32 = 4096;
/// A [`super::Watch`] over more buckets than this goes by the global counter alone.
pub(crate) const SUM_MAX: u64 = 32;

impl Layout {
    pub(crate) fn check(self) -> Result<Layout, OpenError> {
        let Some(b) = self.buckets else { return Ok(self) };
        let good = b.count.is_power_of_two()
            && b.count <= 1 << 16
            && (12..=30).contains(&b.granule_shift)
            && (1..=512).contains(&b.wide);
        if good { Ok(self) } else { Err(OpenError::Options(format!("{b:?} is out of bounds"))) }
    }

    /// Bytes of the map's value: whole pages.
    pub(crate) fn map_len(self) -> u32 {
        let tables = if self.age { 2 } else { 1 };
        let table = self.buckets.map_or(0, |b| (b.count * 8).next_multiple_of(4096));
        TABLE + tables * table
    }

    pub(crate) fn global(kind: Kind) -> u32 {
        match kind {
            Kind::Unmap => 0,
            Kind::Age => 64,
        }
    }

    pub(crate) fn wide(kind: Kind) -> u32 {
        Layout::global(kind) + 8
    }

    /// Offset of the bucket table of `kind`.
    pub(crate) fn table(self, kind: Kind) -> u32 {
        match kind {
            Kind::Unmap => TABLE,
            Kind::Age => TABLE + self.buckets.map_or(0, |b| (b.count * 8).next_multiple_of(4096)),
        }
    }

    /// Offsets of the words that move when something in `range` does, the wide counter first; `None` where only the
    /// global counter can tell.
    #[inline]
    pub(crate) fn words(self, kind: Kind, range: Range) -> Option<impl Iterator<Item = u32>> {
        let b = self.buckets?;
        let first = range.start() >> b.granule_shift;
        let last = (range.end() - 1) >> b.granule_shift;
        if last - first >= SUM_MAX.min(u64::from(b.count)) {
            return None;
        }
        let bucket = move |granule: u64| self.table(kind) + 8 * (granule & u64::from(b.count - 1)) as u32;
        Some(std::iter::once(Layout::wide(kind)).chain((first..=last).map(bucket)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout { buckets: Some(Buckets { count: 1024, granule_shift: 16, wide: 64 }), age: true }
    }

    #[test]
    fn tables_do_not_overlap_and_fit_the_map() {
        let l = layout();
        assert_eq!(l.table(Kind::Unmap), 4096);
        assert_eq!(l.table(Kind::Age), 4096 + 8192);
        assert_eq!(l.map_len(), 4096 + 2 * 8192);
        assert_eq!(Layout { buckets: None, age: true }.map_len(), 4096);
    }

    #[test]
    fn a_range_looks_at_wide_and_at_every_bucket_that_it_touches() {
        let l = layout();
        let words = |range| l.words(Kind::Unmap, range).unwrap().collect::<Vec<_>>();
        let one = Range::new(0x1_0000, 0x1000).unwrap();
        assert_eq!(words(one), vec![8, 4096 + 8]);
        let straddling = Range::new(0x1_f000, 0x2000).unwrap();
        assert_eq!(words(straddling), vec![8, 4096 + 8, 4096 + 16]);
        let wrapped = Range::new(1024 << 16, 0x1000).unwrap();
        assert_eq!(words(wrapped), vec![8, 4096]);
        assert!(l.words(Kind::Unmap, Range::ALL).is_none());
    }

    #[test]
    fn odd_bucket_counts_are_refused() {
        for b in [
            Buckets { count: 1000, ..Buckets::default() },
            Buckets { count: 0, ..Buckets::default() },
            Buckets { granule_shift: 11, ..Buckets::default() },
            Buckets { wide: 0, ..Buckets::default() },
        ] {
            assert!(Layout { buckets: Some(b), age: false }.check().is_err());
        }
    }
}
