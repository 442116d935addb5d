// SPDX-License-Identifier: MIT OR Apache-2.0
//! An index of ranges that answers "which of them overlap this one?" in O(log n + hits), without allocating.
//!
//! A B+ tree in an arena. Every node, leaf or inner, is the same three columns sorted by start: where an entry's
//! ranges begin (`starts`), the last byte past any of them (`ends`), and what it points to (`ptrs`: a slot in a leaf, a
//! child above). An entry can hold a hit iff it starts before the end asked for and ends after the start
//! asked for, so one pair of comparisons over the columns prunes leaves and subtrees alike.
//!
//! Invariants (checked by `check` in the property tests):
//! * `starts` is ascending in a node, and through the leaves from left to right; an inner entry holds the least start and
//!   the greatest end of its child; unused entries have start [`NOWHERE`] and so never match;
//! * all leaves are at the same depth; every node off the right spine is at least [`MIN`] full, and the root of more than one
//!   level has two children, so the depth is O(log n) whatever was removed;
//! * a slot knows its leaf and a node its parent: removal starts at the leaf and never searches, so any number of
//!   equal ranges costs no more than distinct ones.

use crate::Range;

/// Entries of a node.
const FANOUT: usize = 16;
/// Fewest entries of a node off the right spine.
const MIN: usize = FANOUT / 4;
/// Levels that 2^32 entries can need: the root has two children, all others [`MIN`].
const MAX_DEPTH: usize = 17;
const NONE: u32 = u32::MAX;
/// After every address.
const NOWHERE: u64 = 1 << 62;

/// Names one entry of an [`IntervalIndex`]; never reused for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    slot: u32,
    generation: u32,
}

impl Key {
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.slot) << 32 | u64::from(self.generation)
    }

    pub(crate) fn from_bits(bits: u64) -> Key {
        Key { slot: (bits >> 32) as u32, generation: bits as u32 }
    }
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    leaf: u32,
    value: Option<T>,
}

#[derive(Debug, Clone)]
#[repr(align(64))]
struct Node {
    starts: [u64; FANOUT],
    ends: [u64; FANOUT],
    ptrs: [u32; FANOUT],
    parent: u32,
    len: u16,
    leaf: bool,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    start: u64,
    end: u64,
    ptr: u32,
}

impl Node {
    fn new(leaf: bool) -> Node {
        Node {
            starts: [NOWHERE; FANOUT],
            ends: [0; FANOUT],
            ptrs: [NONE; FANOUT],
            parent: NONE,
            len: 0,
            leaf,
        }
    }

    fn len(&self) -> usize {
        usize::from(self.len)
    }

    fn entry(&self, i: usize) -> Entry {
        Entry { start: self.starts[i], end: self.ends[i], ptr: self.ptrs[i] }
    }

    fn set(&mut self, i: usize, e: Entry) {
        (self.starts[i], self.ends[i], self.ptrs[i]) = (e.start, e.end, e.ptr);
    }

    fn insert(&mut self, at: usize, e: Entry) {
        let len = self.len();
        self.starts.copy_within(at..len, at + 1);
        self.ends.copy_within(at..len, at + 1);
        self.ptrs.copy_within(at..len, at + 1);
        self.set(at, e);
        self.len += 1;
    }

    fn remove(&mut self, at: usize) {
        let len = self.len();
        self.starts.copy_within(at + 1..len, at);
        self.ends.copy_within(at + 1..len, at);
        self.ptrs.copy_within(at + 1..len, at);
        self.truncate(len - 1);
    }

    fn truncate(&mut self, len: usize) {
        for i in len..self.len() {
            self.set(i, Entry { start: NOWHERE, end: 0, ptr: NONE });
        }
        self.len = len as u16;
    }

    fn max_end(&self) -> u64 {
        self.ends.iter().copied().fold(0, u64::max)
    }

    fn position(&self, ptr: u32) -> usize {
        self.ptrs.iter().position(|&p| p == ptr).expect("a parent lists its child, a leaf its slot")
    }

    /// First entry that starts after `start`.
    fn upper_bound(&self, start: u64) -> usize {
        self.starts.iter().filter(|&&s| s <= start).count()
    }

    fn range(&self, i: usize) -> Range {
        Range::from_bounds(self.starts[i], self.ends[i])
    }

    /// Bit `i`: entry `i` can hold an overlap. Addresses have 47 bits, so the sign of a difference compares them, and
    /// the sign of both at once needs no branch and no compare: most of a lookup is spent here.
    fn overlaps(&self, range: Range) -> u16 {
        let mut mask = 0;
        for i in 0..FANOUT {
            let starts_before = self.starts[i].wrapping_sub(range.end());
            let ends_after = range.start().wrapping_sub(self.ends[i]);
            mask |= (((starts_before & ends_after) >> 63) as u16) << i;
        }
        mask
    }
}

/// Ranges with values, found by overlap. Equal ranges may be inserted any number of times.
#[derive(Debug)]
pub struct IntervalIndex<T> {
    nodes: Vec<Node>,
    free_nodes: Vec<u32>,
    slots: Vec<Slot<T>>,
    free_slots: Vec<u32>,
    root: u32,
    len: usize,
}

impl<T> Default for IntervalIndex<T> {
    fn default() -> Self {
        IntervalIndex::new()
    }
}

impl<T> IntervalIndex<T> {
    /// An empty index; allocates nothing until the first insertion.
    pub const fn new() -> IntervalIndex<T> {
        IntervalIndex {
            nodes: Vec::new(),
            free_nodes: Vec::new(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            root: NONE,
            len: 0,
        }
    }

    /// Number of entries.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// No entries?
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entry named by `key`, if it has not been removed.
    pub fn get(&self, key: Key) -> Option<(Range, &T)> {
        let slot = self.slots.get(key.slot as usize).filter(|s| s.generation == key.generation)?;
        let value = slot.value.as_ref()?;
        let leaf = &self.nodes[slot.leaf as usize];
        Some((leaf.range(leaf.position(key.slot)), value))
    }

    /// Adds an entry in O(log n).
    ///
    /// # Panics
    /// With more than 2^32 - 1 entries.
    pub fn insert(&mut self, range: Range, value: T) -> Key {
        let slot = self.new_slot(value);
        if self.root == NONE {
            self.root = self.new_node(true);
        }
        let entry = Entry { start: range.start(), end: range.end(), ptr: slot };
        let mut at = self.root;
        let mut rightmost = true;
        while !self.nodes[at as usize].leaf {
            let node = &mut self.nodes[at as usize];
            let child = node.upper_bound(entry.start).saturating_sub(1);
            node.starts[child] = node.starts[child].min(entry.start);
            node.ends[child] = node.ends[child].max(entry.end);
            rightmost &= child + 1 == node.len();
            at = node.ptrs[child];
        }
        self.slots[slot as usize].leaf = at;
        let pos = self.nodes[at as usize].upper_bound(entry.start);
        self.insert_entry(at, pos, entry, rightmost);
        self.len += 1;
        Key { slot, generation: self.slots[slot as usize].generation }
    }

    /// Takes an entry out in O(log n); `None` if it is out already.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.slot as usize).filter(|s| s.generation == key.generation)?;
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        let leaf = slot.leaf;
        self.free_slots.push(key.slot);
        self.len -= 1;
        let pos = self.nodes[leaf as usize].position(key.slot);
        self.nodes[leaf as usize].remove(pos);
        self.repair(leaf);
        Some(value)
    }

    /// The entries that overlap `range`, in order of their start; entries of equal start in order of insertion.
    pub fn overlaps(&self, range: Range) -> Overlaps<'_, T> {
        Overlaps { index: self, cursor: self.cursor(range) }
    }

    /// Like [`IntervalIndex::overlaps`], for a caller who cannot borrow the index all the while: [`IntervalIndex::next`] goes on
    /// where the cursor stands. The index must not change in between, or entries are missed.
    pub fn cursor(&self, range: Range) -> Cursor {
        let mut cursor = Cursor { range, depth: 0, path: [(0, 0); MAX_DEPTH] };
        if self.root != NONE {
            cursor.push(self.root, self.nodes[self.root as usize].overlaps(range));
        }
        cursor
    }

    /// The next entry that overlaps the cursor's range.
    pub fn next(&self, cursor: &mut Cursor) -> Option<(Key, Range, &T)> {
        while cursor.depth > 0 {
            let (at, mask) = &mut cursor.path[cursor.depth - 1];
            if *mask == 0 {
                cursor.depth -= 1;
                continue;
            }
            let i = mask.trailing_zeros() as usize;
            *mask &= *mask - 1;
            let node = self.nodes.get(*at as usize)?;
            let ptr = node.ptrs[i];
            if !node.leaf {
                let child = self.nodes.get(ptr as usize)?;
                cursor.push(ptr, child.overlaps(cursor.range));
                continue;
            }
            let slot = self.slots.get(ptr as usize)?;
            if let Some(value) = &slot.value {
                return Some((Key { slot: ptr, generation: slot.generation }, node.range(i), value));
            }
        }
        None
    }

    fn new_slot(&mut self, value: T) -> u32 {
        if let Some(slot) = self.free_slots.pop() {
            self.slots[slot as usize].value = Some(value);
            return slot;
        }
        assert!(self.slots.len() < NONE as usize, "an index holds at most 2^32 - 1 entries");
        self.slots.push(Slot { generation: 0, leaf: NONE, value: Some(value) });
        (self.slots.len() - 1) as u32
    }

    fn new_node(&mut self, leaf: bool) -> u32 {
        if let Some(at) = self.free_nodes.pop() {
            self.nodes[at as usize] = Node::new(leaf);
            return at;
        }
        self.nodes.push(Node::new(leaf));
        (self.nodes.len() - 1) as u32
    }

    /// Tells what `ptr` points to that it now hangs under `node`.
    fn adopt(&mut self, node: u32, from: usize) {
        for i in from..self.nodes[node as usize].len() {
            let Node { leaf, ptrs, .. } = &self.nodes[node as usize];
            let ptr = ptrs[i] as usize;
            if *leaf {
                self.slots[ptr].leaf = node;
            } else {
                self.nodes[ptr].parent = node;
            }
        }
    }

    /// Puts `entry` at `pos` of `at`; splits as far up as needed. `rightmost`: `at` is on the right spine, where a split
    /// leaves the left node full, so that ascending insertion packs the tree.
    fn insert_entry(&mut self, at: u32, pos: usize, entry: Entry, rightmost: bool) {
        if self.nodes[at as usize].len() < FANOUT {
            self.nodes[at as usize].insert(pos, entry);
            return;
        }
        let leaf = self.nodes[at as usize].leaf;
        let right = self.new_node(leaf);
        let keep = if rightmost && pos == FANOUT { FANOUT } else { FANOUT / 2 };
        for i in keep..FANOUT {
            let moved = self.nodes[at as usize].entry(i);
            self.nodes[right as usize].insert(i - keep, moved);
        }
        self.nodes[at as usize].truncate(keep);
        if pos > keep || keep == FANOUT {
            self.nodes[right as usize].insert(pos - keep, entry);
        } else {
            self.nodes[at as usize].insert(pos, entry);
        }
        self.adopt(right, 0);

        if at == self.root {
            let root = self.new_node(false);
            self.root = root;
            let left = self.summary(at);
            self.nodes[root as usize].insert(0, left);
            self.nodes[at as usize].parent = root;
        }
        let parent = self.nodes[at as usize].parent;
        let pos = self.nodes[parent as usize].position(at);
        let summary = self.summary(at);
        self.nodes[parent as usize].set(pos, summary);
        self.nodes[right as usize].parent = parent;
        let summary = self.summary(right);
        self.insert_entry(parent, pos + 1, summary, rightmost);
    }

    /// What the parent says about `at`.
    fn summary(&self, at: u32) -> Entry {
        let node = &self.nodes[at as usize];
        Entry { start: node.starts[0], end: node.max_end(), ptr: at }
    }

    /// After entries of `at` were removed: makes every ancestor right again, merges or refills what became too small.
    fn repair(&mut self, mut at: u32) {
        loop {
            if at == self.root {
                return self.shrink_root();
            }
            let parent = self.nodes[at as usize].parent;
            let pos = self.nodes[parent as usize].position(at);
            if self.nodes[at as usize].len() < MIN && self.nodes[parent as usize].len() > 1 {
                let left = if pos > 0 { pos - 1 } else { pos };
                self.level(parent, left);
            } else if self.nodes[at as usize].len() == 0 {
                self.nodes[parent as usize].remove(pos);
                self.free_nodes.push(at);
            } else {
                let summary = self.summary(at);
                self.nodes[parent as usize].set(pos, summary);
            }
            at = parent;
        }
    }

    /// Merges children `left` and `left + 1` of `parent` if they fit into one node, else shares their entries equally.
    fn level(&mut self, parent: u32, left: usize) {
        let (a, b) = (self.nodes[parent as usize].ptrs[left], self.nodes[parent as usize].ptrs[left + 1]);
        let (na, nb) = (self.nodes[a as usize].len(), self.nodes[b as usize].len());
        let keep = if na + nb <= FANOUT { na + nb } else { (na + nb) / 2 };
        if keep >= na {
            for i in 0..keep - na {
                let moved = self.nodes[b as usize].entry(i);
                self.nodes[a as usize].insert(na + i, moved);
            }
            for _ in 0..keep - na {
                self.nodes[b as usize].remove(0);
            }
            self.adopt(a, na);
        } else {
            for i in (keep..na).rev() {
                let moved = self.nodes[a as usize].entry(i);
                self.nodes[b as usize].insert(0, moved);
            }
            self.nodes[a as usize].truncate(keep);
            self.adopt(b, 0);
        }
        let summary = self.summary(a);
        self.nodes[parent as usize].set(left, summary);
        if self.nodes[b as usize].len() == 0 {
            self.nodes[parent as usize].remove(left + 1);
            self.free_nodes.push(b);
        } else {
            let summary = self.summary(b);
            self.nodes[parent as usize].set(left + 1, summary);
        }
    }

    /// A root with a single child gives way to it; an empty tree has no root.
    fn shrink_root(&mut self) {
        while self.root != NONE {
            let root = &self.nodes[self.root as usize];
            let next = match (root.len(), root.leaf) {
                (0, _) => NONE,
                (1, false) => root.ptrs[0],
                _ => return,
            };
            self.free_nodes.push(self.root);
            self.root = next;
            if next != NONE {
                self.nodes[next as usize].parent = NONE;
            }
        }
    }
}

/// Where a search stands; see [`IntervalIndex::cursor`].
#[derive(Debug, Clone)]
pub struct Cursor {
    range: Range,
    depth: usize,
    /// Node and the entries of it that are still to be visited, from the root down.
    path: [(u32, u16); MAX_DEPTH],
}

impl Cursor {
    fn push(&mut self, node: u32, mask: u16) {
        self.path[self.depth] = (node, mask);
        self.depth += 1;
    }
}

/// Iterator of [`IntervalIndex::overlaps`].
#[derive(Debug, Clone)]
pub struct Overlaps<'a, T> {
    index: &'a IntervalIndex<T>,
    cursor: Cursor,
}

impl<'a, T> Iterator for Overlaps<'a, T> {
    type Item = (Key, Range, &'a T);

    fn next(&mut self) -> Option<Self::Item> {
        self.index.next(&mut self.cursor)
    }
}

#[cfg(test)]
mod tests;
