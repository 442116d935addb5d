// SPDX-License-Identifier: MIT OR Apache-2.0
//! One node of the index: three columns of [`FANOUT`] entries, and what can be asked of them alone.

use crate::Range;

/// Entries of a node.
pub(super) const FANOUT: usize = 16;
/// Fewest entries of a node off the right spine.
pub(super) const MIN: usize = FANOUT / 4;
pub(super) const NONE: u32 = u32::MAX;
/// After every address.
pub(super) const NOWHERE: u64 = 1 << 62;

#[derive(Debug, Clone)]
#[repr(align(64))]
pub(super) struct Node {
    pub(super) starts: [u64; FANOUT],
    pub(super) ends: [u64; FANOUT],
    pub(super) ptrs: [u32; FANOUT],
    pub(super) parent: u32,
    pub(super) len: u16,
    pub(super) leaf: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) ptr: u32,
}

impl Node {
    pub(super) fn new(leaf: bool) -> Node {
        Node {
            starts: [NOWHERE; FANOUT],
            ends: [0; FANOUT],
            ptrs: [NONE; FANOUT],
            parent: NONE,
            len: 0,
            leaf,
        }
    }

    pub(super) fn len(&self) -> usize {
        usize::from(self.len)
    }

    pub(super) fn entry(&self, i: usize) -> Entry {
        Entry { start: self.starts[i], end: self.ends[i], ptr: self.ptrs[i] }
    }

    pub(super) fn set(&mut self, i: usize, e: Entry) {
        (self.starts[i], self.ends[i], self.ptrs[i]) = (e.start, e.end, e.ptr);
    }

    pub(super) fn insert(&mut self, at: usize, e: Entry) {
        let len = self.len();
        self.starts.copy_within(at..len, at + 1);
        self.ends.copy_within(at..len, at + 1);
        self.ptrs.copy_within(at..len, at + 1);
        self.set(at, e);
        self.len += 1;
    }

    pub(super) fn remove(&mut self, at: usize) {
        let len = self.len();
        self.starts.copy_within(at + 1..len, at);
        self.ends.copy_within(at + 1..len, at);
        self.ptrs.copy_within(at + 1..len, at);
        self.truncate(len - 1);
    }

    pub(super) fn truncate(&mut self, len: usize) {
        for i in len..self.len() {
            self.set(i, Entry { start: NOWHERE, end: 0, ptr: NONE });
        }
        self.len = len as u16;
    }

    pub(super) fn max_end(&self) -> u64 {
        self.ends.iter().copied().fold(0, u64::max)
    }

    pub(super) fn position(&self, ptr: u32) -> usize {
        self.ptrs.iter().position(|&p| p == ptr).expect("a parent lists its child, a leaf its slot")
    }

    /// First entry that starts after `start`.
    pub(super) fn upper_bound(&self, start: u64) -> usize {
        self.starts.iter().filter(|&&s| s <= start).count()
    }

    pub(super) fn range(&self, i: usize) -> Range {
        Range::from_bounds(self.starts[i], self.ends[i])
    }

    /// Bit `i`: entry `i` can hold an overlap. Addresses have 47 bits, so the sign of a difference compares them, and
    /// the sign of both at once needs no branch and no compare: most of a lookup is spent here.
    pub(super) fn overlaps(&self, range: Range) -> u16 {
        let mut mask = 0;
        for i in 0..FANOUT {
            let starts_before = self.starts[i].wrapping_sub(range.end());
            let ends_after = range.start().wrapping_sub(self.ends[i]);
            mask |= (((starts_before & ends_after) >> 63) as u16) << i;
        }
        mask
    }
}
