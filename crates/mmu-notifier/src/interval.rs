// SPDX-License-Identifier: MIT OR Apache-2.0
//! An index of ranges that answers "which of them overlap this one?" in O(log n + hits), without allocating.
//!
//! A B+ tree in an arena. Every node, leaf or inner, is the same three columns sorted by start: where an entry's
//! ranges begin (`starts`), the last byte past any of them (`ends`), and what it points to (`ptrs`: a slot in a leaf, a
//! child above). An entry can hold a hit iff it starts before the end asked for and ends after the start
//! asked for, so one pair of comparisons over the columns prunes leaves and subtrees alike.
//!
//! Invariants (checked by `check` in the property tests):
//! * `starts` is ascending in a node, and through the leaves from left to right; an inner entry holds the least
//!   start and the greatest end of its child; unused entries have start `NOWHERE` and so never match;
//! * all leaves are at the same depth; every node off the right spine is at least `MIN` full, and the root of more
//!   than one level has two children, so the depth is O(log n) whatever was removed;
//! * a slot knows its leaf and a node its parent: removal starts at the leaf and never searches, so any number of
//!   equal ranges costs no more than distinct ones.

use crate::Range;

mod balance;
mod node;

use node::{Entry, NONE, Node};

/// Levels that 2^32 entries can need: the root has two children, all others `MIN`.
const MAX_DEPTH: usize = 17;
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
        // A slot whose generations are used up is given up: a key is never another's.
        if slot.generation != 0 {
            self.free_slots.push(key.slot);
        }
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

    /// Like [`IntervalIndex::overlaps`], for a caller who cannot borrow the index all the while:
    /// [`IntervalIndex::next`] goes on where the cursor stands. The index must not change in between, or entries
    /// are missed.
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
