// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the counters lie in the map that program and process share.
//!
//! ```text
//! byte 0    unmap: global
//! byte 64   age:   global
//! byte 128  records lost
//! byte 4096 unmap: one word per bucket, then one word per wide bucket
//!     then  age:   the same
//! ```
//!
//! Every word only ever grows (by one, atomically, 64 bits: no wrap in this life), so the sum of any set of them changes
//! if and only if one of them does.
//!
//! # Wide changes
//!
//! A granule has a bucket, and so has a *wide granule*, which is [`Buckets::wide`] of them. A change of a few granules
//! moves their buckets. A longer one moves the wide buckets of the wide granules that lie in it whole, and the buckets
//! of the granules at its two ends. Whoever looks at the bucket and at the wide bucket of each of his granules sees both.
//! So a long change costs the mm no more than some hundred increments, is told of as exactly as a short one, and leaves
//! everybody else's words alone: the source counts the changes of every VM of the machine.

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
    /// Granules in a wide one; a power of two, at most 512. A change of more granules than this is counted in wide ones,
    /// which share buckets only where they are [`Buckets::WIDE_COUNT`] wide granules apart.
    pub wide: u32,
}

impl Buckets {
    /// How many buckets the wide granules have.
    pub const WIDE_COUNT: u32 = 2048;
    /// A change of more wide granules than this (1 GiB by default) moves all of these buckets.
    pub const WIDE_MOST: u32 = 256;

    /// log2 of the granules in a wide one.
    pub(crate) fn wide_shift(self) -> u32 {
        self.wide.trailing_zeros()
    }
}

impl Default for Buckets {
    /// 8192 buckets of 64 KiB (64 KiB of counters; addresses 512 MiB apart alias), and beyond 4 MiB 2048 buckets of that
    /// (16 KiB; addresses 8 GiB apart alias).
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

impl Layout {
    pub(crate) fn check(self) -> Result<Layout, OpenError> {
        let Some(b) = self.buckets else { return Ok(self) };
        let good = b.count.is_power_of_two()
            && b.count <= 1 << 16
            && (12..=30).contains(&b.granule_shift)
            && b.wide.is_power_of_two()
            && b.wide <= 512;
        if good { Ok(self) } else { Err(OpenError::Options(format!("{b:?} is out of bounds"))) }
    }

    /// Bytes of the map's value: whole pages.
    pub(crate) fn map_len(self) -> u32 {
        let tables = if self.age { 2 } else { 1 };
        TABLE + tables * self.buckets.map_or(0, |b| table_len(b.count) + table_len(Buckets::WIDE_COUNT))
    }

    pub(crate) fn global(kind: Kind) -> u32 {
        match kind {
            Kind::Unmap => 0,
            Kind::Age => 64,
        }
    }

    /// Offset of the buckets of `kind`.
    pub(crate) fn table(self, kind: Kind) -> u32 {
        match kind {
            Kind::Unmap => TABLE,
            Kind::Age => self.wide_table(Kind::Unmap) + table_len(Buckets::WIDE_COUNT),
        }
    }

    /// Offset of the wide buckets of `kind`.
    pub(crate) fn wide_table(self, kind: Kind) -> u32 {
        self.table(kind) + self.buckets.map_or(0, |b| table_len(b.count))
    }

    /// The first and the last granule that `range` touches; `None` where it touches more than there are buckets, so that only
    /// the global counter can tell.
    pub(crate) fn granules(self, range: Range) -> Option<(u64, u64)> {
        let b = self.buckets?;
        let (first, last) = (range.start() >> b.granule_shift, (range.end() - 1) >> b.granule_shift);
        (last - first < u64::from(b.count)).then_some((first, last))
    }

    /// Offsets of the words that move when something in `range` does, those of wide granules first; `None` where only
    /// the global counter can tell.
    pub(crate) fn words(self, kind: Kind, range: Range) -> Option<impl Iterator<Item = u32>> {
        let b = self.buckets?;
        let (first, last) = self.granules(range)?;
        let (table, wide_table) = (self.table(kind), self.wide_table(kind));
        let bucket = move |granule: u64| table + 8 * (granule & u64::from(b.count - 1)) as u32;
        let wide = move |granule: u64| wide_table + 8 * (granule & u64::from(Buckets::WIDE_COUNT - 1)) as u32;
        let wides = (first >> b.wide_shift()..=last >> b.wide_shift()).map(wide);
        Some(wides.chain((first..=last).map(bucket)))
    }
}

/// Bytes of a table of `count` words: whole pages.
fn table_len(count: u32) -> u32 {
    (8 * count).next_multiple_of(4096)
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
        assert_eq!(l.wide_table(Kind::Unmap), 4096 + 8192);
        assert_eq!(l.table(Kind::Age), 4096 + 8192 + 16384);
        assert_eq!(l.wide_table(Kind::Age) + 16384, l.map_len());
        assert_eq!(Layout { buckets: None, age: true }.map_len(), 4096);
    }

    #[test]
    fn a_range_looks_at_every_bucket_and_wide_bucket_that_it_touches() {
        let l = layout();
        let (table, wide) = (l.table(Kind::Unmap), l.wide_table(Kind::Unmap));
        let words = |range| l.words(Kind::Unmap, range).unwrap().collect::<Vec<_>>();
        let one = Range::new(0x1_0000, 0x1000).unwrap();
        assert_eq!(words(one), vec![wide, table + 8]);
        let straddling = Range::new(0x3f_f000, 0x2000).unwrap();
        assert_eq!(words(straddling), vec![wide, wide + 8, table + 8 * 63, table + 8 * 64]);
        let wrapped = Range::new(2048 << 22, 0x1000).unwrap();
        assert_eq!(words(wrapped), vec![wide, table]);
        assert!(l.words(Kind::Unmap, Range::ALL).is_none());
    }

    #[test]
    fn odd_bucket_counts_are_refused() {
        for b in [
            Buckets { count: 1000, ..Buckets::default() },
            Buckets { count: 0, ..Buckets::default() },
            Buckets { granule_shift: 11, ..Buckets::default() },
            Buckets { wide: 0, ..Buckets::default() },
            Buckets { wide: 48, ..Buckets::default() },
            Buckets { wide: 1024, ..Buckets::default() },
        ] {
            assert!(Layout { buckets: Some(b), age: false }.check().is_err());
        }
    }
}
