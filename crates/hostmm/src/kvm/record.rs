// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tracepoint says of one range, and what a callback is told of it.

use super::layout::Kind;
use mmu_notifier::Range;

/// One range, as the kernel announced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What is announced.
    pub kind: Kind,
    /// First byte.
    pub start: u64,
    /// First byte after it; up to `u64::MAX` (clear_refs announces the whole address space so).
    pub end: u64,
    /// The CPU that it was announced on.
    pub cpu: u32,
    /// Process id of the task that changes the memory, in the initial pid namespace: this process, another one
    /// (truncate, process_madvise) or a kernel thread (ksmd, kcompactd).
    pub tgid: u32,
    /// Its thread id.
    pub pid: u32,
    /// CLOCK_MONOTONIC in nanoseconds; 0 where the source does not know.
    pub ktime_ns: u64,
}

impl Record {
    pub(crate) fn from_words(w: [u64; 5]) -> Record {
        Record {
            kind: if w[0] >> 32 == Kind::Age as u64 { Kind::Age } else { Kind::Unmap },
            cpu: w[0] as u32,
            start: w[1],
            end: w[2],
            tgid: (w[3] >> 32) as u32,
            pid: w[3] as u32,
            ktime_ns: w[4],
        }
    }

    /// The part of `range` that it touches; all of it if the record is odd.
    pub(crate) fn within(&self, range: Range) -> Range {
        let (start, end) = (self.start.max(range.start()), self.end.min(range.end()));
        let part = end.checked_sub(start).and_then(|len| Range::enclosing(start, len).ok());
        part.unwrap_or(range)
    }

    /// The pages that it is about; `None` if there are none in user space. An empty or backward range is taken to be
    /// everything, as in [`Record::overlaps`].
    pub(crate) fn pages(&self) -> Option<Range> {
        if self.start >= self.end {
            return Some(Range::ALL);
        }
        let end = self.end.min(Range::ALL.end());
        Range::enclosing(self.start, end.checked_sub(self.start)?).ok()
    }

    /// Does it touch `range`? An empty or backward range is taken to touch everything.
    pub fn overlaps(&self, range: Range) -> bool {
        self.start >= self.end || (self.start < range.end() && range.start() < self.end)
    }
}

/// What a callback is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// A range that overlaps the subscription's.
    Range(Record),
    /// Records were lost: anything may have changed.
    Everything,
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_notifier::PAGE_SIZE;
    use proptest::prelude::*;

    fn record(start: u64, end: u64) -> Record {
        Record::from_words([0, start, end, 0, 0])
    }

    #[test]
    fn words_come_out_as_the_program_put_them_in() {
        let got = Record::from_words([1 << 32 | 3, 0x1000, 0x3000, 7 << 32 | 8, 9]);
        let want =
            Record { kind: Kind::Age, start: 0x1000, end: 0x3000, cpu: 3, tgid: 7, pid: 8, ktime_ns: 9 };
        assert_eq!(got, want);
    }

    #[test]
    fn odd_records_are_about_everything_and_others_about_their_pages() {
        assert_eq!(record(5, 5).pages(), Some(Range::ALL));
        assert_eq!(record(0, u64::MAX).pages(), Some(Range::ALL));
        assert_eq!(record(u64::MAX - 1, u64::MAX).pages(), None);
        assert_eq!(record(0x1000, 0x2000).pages(), Range::new(0x1000, 0x1000).ok());
    }

    proptest! {
        /// The index is asked with `pages`, the public predicate is `overlaps`: they must agree on whole pages.
        #[test]
        fn pages_and_overlaps_agree(start in 0_u64..40, end in 0_u64..40, at in 0_u64..30, len in 1_u64..8) {
            let record = record(start * PAGE_SIZE, end * PAGE_SIZE);
            let range = Range::new(at * PAGE_SIZE, len * PAGE_SIZE).unwrap();
            prop_assert_eq!(record.pages().is_some_and(|pages| pages.overlaps(range)), record.overlaps(range));
            prop_assert!(range.contains(record.within(range)));
        }
    }
}
