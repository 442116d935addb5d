// SPDX-License-Identifier: MIT OR Apache-2.0
//! When and where the changes were, for drawing: every one of them as long as that is not too many, then every second,
//! every fourth, ...

use std::collections::HashMap;

/// Points kept at most.
const KEPT: usize = 1 << 20;

/// One change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) at: u64,
    pub(super) start: u64,
    pub(super) pages: u64,
    pub(super) mm: u32,
    pub(super) cause: u32,
}

/// The points that are kept.
#[derive(Debug)]
pub(super) struct Timeline {
    pub(super) points: Vec<Point>,
    /// Each stands for so many.
    pub(super) weight: u64,
    seen: u64,
    pub(super) causes: Vec<String>,
    numbers: HashMap<String, u32>,
}

impl Default for Timeline {
    fn default() -> Timeline {
        Timeline { points: Vec::new(), weight: 1, seen: 0, causes: Vec::new(), numbers: HashMap::new() }
    }
}

impl Timeline {
    pub(super) fn add(&mut self, at: u64, mm: usize, start: u64, pages: u64, cause: &str) {
        self.seen += 1;
        if !self.seen.is_multiple_of(self.weight) {
            return;
        }
        if self.points.len() == KEPT {
            let mut odd = false;
            self.points.retain(|_| {
                odd = !odd;
                odd
            });
            self.weight *= 2;
        }
        let cause = match self.numbers.get(cause) {
            Some(number) => *number,
            None => {
                let number = self.causes.len() as u32;
                self.causes.push(cause.to_owned());
                self.numbers.insert(cause.to_owned(), number);
                number
            }
        };
        self.points.push(Point { at, start, pages, mm: mm as u32, cause });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_points_are_thinned_and_still_stand_for_all() {
        let mut timeline = Timeline::default();
        let n = 3 * KEPT as u64;
        for at in 0..n {
            timeline.add(at, 0, at * 4096, 1, "munmap");
        }
        assert!(timeline.points.len() <= KEPT);
        let stands_for = timeline.points.len() as u64 * timeline.weight;
        assert!(stands_for.abs_diff(n) <= timeline.weight * 2, "{stands_for} of {n}");
    }
}
