// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the index stays a tree of logarithmic depth: splits on insertion, merges and refills on removal.

use super::IntervalIndex;
use super::node::{Entry, FANOUT, MIN, NONE, Node};

impl<T> IntervalIndex<T> {
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

    /// Puts `entry` at `pos` of `at`; splits as far up as needed. `rightmost`: `at` is on the right spine, where a
    /// split leaves the left node full, so that ascending insertion packs the tree.
    pub(super) fn insert_entry(&mut self, at: u32, pos: usize, entry: Entry, rightmost: bool) {
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
    pub(super) fn summary(&self, at: u32) -> Entry {
        let node = &self.nodes[at as usize];
        Entry { start: node.starts[0], end: node.max_end(), ptr: at }
    }

    /// After entries of `at` were removed: makes every ancestor right again, merges or refills what became too small.
    pub(super) fn repair(&mut self, mut at: u32) {
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
