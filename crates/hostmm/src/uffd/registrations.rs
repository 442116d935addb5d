// SPDX-License-Identifier: MIT OR Apache-2.0
//! How many watches hold each page registered.
//!
//! Invariants: segments are disjoint, every count is at least 1, and neighbours that touch differ in their count.
//! Registration in the kernel is one flag per VMA, so pages stay registered until their last watch lets go.

use std::collections::BTreeMap;

use mmu_notifier::Range;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    end: u64,
    watches: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Registrations {
    by_start: BTreeMap<u64, Segment>,
}

impl Registrations {
    /// The most VMAs that the kernel may have made for this: each isolated segment cuts one in three.
    pub(super) fn vmas(&self) -> usize {
        2 * self.by_start.len()
    }

    /// One watch more on `range`.
    pub(super) fn hold(&mut self, range: Range) {
        self.cut(range);
        let mut at = range.start();
        while at < range.end() {
            match self.by_start.range_mut(at..range.end()).next() {
                Some((&start, segment)) if start == at => {
                    segment.watches += 1;
                    at = segment.end;
                }
                next => {
                    let end = next.map_or(range.end(), |(&start, _)| start);
                    self.by_start.insert(at, Segment { end, watches: 1 });
                    at = end;
                }
            }
        }
        self.join(range);
    }

    /// One watch less on `range`, all of which it held. The pages that nobody holds any more.
    pub(super) fn release(&mut self, range: Range) -> Vec<Range> {
        self.cut(range);
        let mut free: Vec<Range> = Vec::new();
        let starts: Vec<u64> = self.by_start.range(range.start()..range.end()).map(|(&s, _)| s).collect();
        for start in starts {
            let Some(segment) = self.by_start.get_mut(&start) else { continue };
            segment.watches -= 1;
            if segment.watches == 0 {
                free.extend(Range::new(start, segment.end - start));
                self.by_start.remove(&start);
            }
        }
        self.join(range);
        free
    }

    /// The pages of `range` that no watch holds.
    pub(super) fn unheld(&self, range: Range) -> Vec<Range> {
        let mut gaps = Vec::new();
        let mut at = range.start();
        let before = self.by_start.range(..=range.start()).next_back().map(|(&s, _)| s);
        for (&start, segment) in self.by_start.range(before.unwrap_or(0)..range.end()) {
            if start > at {
                gaps.extend(Range::new(at, start - at));
            }
            at = at.max(segment.end);
        }
        if at < range.end() {
            gaps.extend(Range::new(at, range.end() - at));
        }
        gaps
    }

    /// No segment crosses an end of `range`.
    fn cut(&mut self, range: Range) {
        for at in [range.start(), range.end()] {
            if let Some((_, segment)) = self.by_start.range_mut(..at).next_back()
                && segment.end > at
            {
                let upper = *segment;
                segment.end = at;
                self.by_start.insert(at, upper);
            }
        }
    }

    /// Puts together what touches and is equal, in and around `range`.
    fn join(&mut self, range: Range) {
        let first = self.by_start.range(..range.start()).next_back().map_or(range.start(), |(&s, _)| s);
        let starts: Vec<u64> = self.by_start.range(first..=range.end()).map(|(&s, _)| s).collect();
        let mut last: Option<u64> = None;
        for start in starts {
            let segment = self.by_start[&start];
            if let Some(low) = last
                && let Some(lower) = self.by_start.get_mut(&low)
                && lower.end == start
                && lower.watches == segment.watches
            {
                lower.end = segment.end;
                self.by_start.remove(&start);
            } else {
                last = Some(start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_notifier::PAGE_SIZE;
    use proptest::prelude::*;

    fn pages(start: u64, n: u64) -> Range {
        Range::new((start + 1) * PAGE_SIZE, n * PAGE_SIZE).unwrap()
    }

    fn expand(ranges: &[Range]) -> Vec<u64> {
        ranges.iter().flat_map(|r| r.iter_pages()).map(|p| p.vpn() - 1).collect()
    }

    #[test]
    fn neighbours_are_one_segment() {
        let mut r = Registrations::default();
        (0..1000).for_each(|i| r.hold(pages(i, 1)));
        assert_eq!(r.vmas(), 2);
        assert_eq!(expand(&r.release(pages(500, 1))), [500]);
        assert_eq!(r.vmas(), 4);
    }

    proptest! {
        #[test]
        fn agrees_with_a_count_per_page(
            ops in prop::collection::vec((0u64..40, 1u64..12, any::<bool>(), any::<prop::sample::Index>()), 1..100),
        ) {
            let mut real = Registrations::default();
            let mut count = [0u32; 64];
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (start, n, hold, pick) in ops {
                if hold || held.is_empty() {
                    real.hold(pages(start, n));
                    held.push((start, n));
                    (start..start + n).for_each(|p| count[p as usize] += 1);
                } else {
                    let (start, n) = held.swap_remove(pick.index(held.len()));
                    (start..start + n).for_each(|p| count[p as usize] -= 1);
                    let want: Vec<u64> = (start..start + n).filter(|&p| count[p as usize] == 0).collect();
                    prop_assert_eq!(expand(&real.release(pages(start, n))), want);
                }
                let want: Vec<u64> = (start..start + n).filter(|&p| count[p as usize] == 0).collect();
                prop_assert_eq!(expand(&real.unheld(pages(start, n))), want);
                let runs = (0..64).filter(|&p| count[p] != 0 && (p == 0 || count[p - 1] != count[p])).count();
                prop_assert_eq!(real.vmas(), 2 * runs);
            }
        }
    }
}
