// SPDX-License-Identifier: MIT OR Apache-2.0
//! The watches by address: an intrusive treap with the greatest end of each subtree, owned by the monitor thread.
//!
//! Its nodes carry the links, so neither insertion nor removal allocates. Expected depth is O(log n); finding the
//! watches that overlap an event costs O(log n + hits).
//!
//! Invariants: ordered by (start, address of the node); a parent's priority is not below its children's; `max_end` is
//! the greatest end in the subtree; every node in the tree is alive and in no other tree.

use std::ptr::NonNull;

use mmu_notifier::Range;

use super::node::Node;

type Tree = Option<NonNull<Node>>;

/// What the index keeps in a node.
pub(super) struct Links {
    left: Tree,
    right: Tree,
    priority: u32,
    max_end: u64,
}

impl Links {
    pub(super) fn new(range: Range) -> Links {
        Links { left: None, right: None, priority: 0, max_end: range.end() }
    }
}

/// See the module.
pub(super) struct Index {
    root: Tree,
    random: u32,
}

// SAFETY: the monitor thread that it moves to is the only one that touches the links of its nodes.
unsafe impl Send for Index {}

/// # Safety
/// `node` is alive, and the caller holds the index that it is in, so nobody else touches its links.
unsafe fn links<'a>(node: NonNull<Node>) -> &'a mut Links {
    // SAFETY: the promise above; no caller in this file keeps two of these for one node.
    unsafe { &mut *node.as_ref().links.get() }
}

fn range(node: NonNull<Node>) -> Range {
    // SAFETY: nodes that this file handles are alive, and `range` is immutable.
    unsafe { node.as_ref().range }
}

fn key(node: NonNull<Node>) -> (u64, usize) {
    (range(node).start(), node.as_ptr().addr())
}

/// # Safety
/// As [`links`], for `node` and its children.
unsafe fn refresh(node: NonNull<Node>) {
    // SAFETY: the promise above, and a node is never its own child.
    unsafe {
        let (left, right) = (links(node).left, links(node).right);
        let left = left.map_or(0, |n| links(n).max_end);
        let right = right.map_or(0, |n| links(n).max_end);
        links(node).max_end = range(node).end().max(left).max(right);
    }
}

/// The nodes below `at`, and the others.
///
/// # Safety
/// As [`links`], for the tree.
unsafe fn split(tree: Tree, at: (u64, usize)) -> (Tree, Tree) {
    let Some(node) = tree else { return (None, None) };
    // SAFETY: the promise above, for subtrees too.
    unsafe {
        if key(node) < at {
            let (low, high) = split(links(node).right, at);
            links(node).right = low;
            refresh(node);
            (Some(node), high)
        } else {
            let (low, high) = split(links(node).left, at);
            links(node).left = high;
            refresh(node);
            (low, Some(node))
        }
    }
}

/// One tree of two, of which the first is wholly below the second.
///
/// # Safety
/// As [`links`], for both trees.
unsafe fn merge(low: Tree, high: Tree) -> Tree {
    let (Some(a), Some(b)) = (low, high) else { return low.or(high) };
    // SAFETY: the promise above, for subtrees too.
    unsafe {
        if links(a).priority >= links(b).priority {
            let right = merge(links(a).right, high);
            links(a).right = right;
            refresh(a);
            low
        } else {
            let left = merge(low, links(b).left);
            links(b).left = left;
            refresh(b);
            high
        }
    }
}

/// # Safety
/// As [`links`], for the tree.
unsafe fn visit(tree: Tree, start: u64, end: u64, f: &mut impl FnMut(NonNull<Node>)) {
    let Some(node) = tree else { return };
    // SAFETY: the promise above, for subtrees too. `f` is given the node, and has no way to the links.
    unsafe {
        if links(node).max_end <= start {
            return;
        }
        visit(links(node).left, start, end, f);
        if range(node).start() < end {
            if range(node).end() > start {
                f(node);
            }
            visit(links(node).right, start, end, f);
        }
    }
}

impl Index {
    pub(super) fn new() -> Index {
        Index { root: None, random: 0x9E37_79B9 }
    }

    /// # Safety
    /// `node` is in no index and stays alive until it has been removed or drained.
    pub(super) unsafe fn insert(&mut self, node: NonNull<Node>) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 17;
        self.random ^= self.random << 5;
        // SAFETY: the promise above, and `self` is borrowed mutably.
        unsafe {
            *links(node) = Links { priority: self.random, ..Links::new(range(node)) };
            let (low, high) = split(self.root, key(node));
            self.root = merge(merge(low, Some(node)), high);
        }
    }

    /// # Safety
    /// `node` is in this index.
    pub(super) unsafe fn remove(&mut self, node: NonNull<Node>) {
        let (start, address) = key(node);
        // SAFETY: the promise above; the keys are distinct, so the middle tree is the node alone.
        unsafe {
            let (low, rest) = split(self.root, (start, address));
            let (_node, high) = split(rest, (start, address + 1));
            self.root = merge(low, high);
        }
    }

    /// Calls `f` for every node that shares a page with `[start, end)`, in order.
    pub(super) fn overlapping(&mut self, start: u64, end: u64, mut f: impl FnMut(NonNull<Node>)) {
        // SAFETY: every node in the index is alive, and `self` is borrowed mutably.
        unsafe { visit(self.root, start, end, &mut f) };
    }

    /// Some node.
    pub(super) fn any(&self) -> Option<NonNull<Node>> {
        self.root
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_notifier::PAGE_SIZE;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_list(
            ops in prop::collection::vec((0u64..64, 1u64..16, any::<bool>(), any::<prop::sample::Index>()), 1..120),
        ) {
            let mut index = Index::new();
            let mut list: Vec<Box<Node>> = Vec::new();
            for (start, pages, insert, pick) in ops {
                if insert || list.is_empty() {
                    let range = Range::new((start + 1) * PAGE_SIZE, pages * PAGE_SIZE).unwrap();
                    list.push(Box::new(Node::new(range, None)));
                    // SAFETY: boxed until the end of the test, and in this index alone.
                    unsafe { index.insert(NonNull::from(list.last().unwrap().as_ref())) };
                } else {
                    let node = list.swap_remove(pick.index(list.len()));
                    // SAFETY: it is in the index.
                    unsafe { index.remove(NonNull::from(node.as_ref())) };
                }
                let (from, to) = ((start / 2) * PAGE_SIZE, (start / 2 + pages) * PAGE_SIZE);
                let mut found = Vec::new();
                index.overlapping(from, to, |n| found.push(n.as_ptr().addr()));
                found.sort_unstable();
                let mut want: Vec<usize> = list
                    .iter()
                    .filter(|n| n.range.start() < to && from < n.range.end())
                    .map(|n| std::ptr::from_ref(n.as_ref()).addr())
                    .collect();
                want.sort_unstable();
                prop_assert_eq!(found, want);
            }
            while let Some(node) = index.any() {
                // SAFETY: it is in the index.
                unsafe { index.remove(node) };
            }
        }
    }
}
