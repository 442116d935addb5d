// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lock classes: all locks with one role share one class, and the rules of order are about classes.
//!
//! A class gets its number, a [`Node`] of the lock-class graph, when a lock of it is first taken; each subclass in use
//! has a node of its own. When the numbers run out the class stays unchecked, and that is reported once.

use std::fmt;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::lockdep;

/// Subclasses of a class, zero included: as many as the kernel has.
pub const MAX_SUBCLASSES: usize = 8;

/// A class and subclass in the lock-class graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Node(u16);

impl Node {
    /// Nodes that the graph has room for.
    pub(crate) const MAX: usize = 512;
    /// For classes beyond those. Never has an edge.
    pub(crate) const UNCHECKED: Node = Node(0);

    pub(crate) fn new(index: usize) -> Option<Node> {
        u16::try_from(index).ok().filter(|_| index < Node::MAX).map(Node)
    }

    #[inline(always)]
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// The class of a lock. One static for each role: `static MMAP_LOCK: LockClass = LockClass::new("mmap_lock");`
///
/// Two classes are two even if their names are the same.
pub struct LockClass {
    name: &'static str,
    /// One more than the index of each subclass's node; zero if it has none yet.
    nodes: [AtomicU16; MAX_SUBCLASSES],
}

impl LockClass {
    /// A class called `name`, in the words of the field.
    pub const fn new(name: &'static str) -> LockClass {
        LockClass { name, nodes: [const { AtomicU16::new(0) }; MAX_SUBCLASSES] }
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The node of `subclass`; one that is out of range is as the last.
    #[inline(always)]
    pub(crate) fn node(&self, subclass: u8) -> Node {
        let subclass = (subclass as usize).min(MAX_SUBCLASSES - 1);
        match self.nodes[subclass].load(Ordering::Relaxed) {
            0 => self.register(subclass),
            n => Node(n - 1),
        }
    }

    #[cold]
    #[inline(never)]
    fn register(&self, subclass: usize) -> Node {
        lockdep::register(self.name, subclass, &self.nodes[subclass])
    }

    /// The nodes that it has so far.
    pub(crate) fn registered(&self) -> impl Iterator<Item = Node> {
        self.nodes.iter().filter_map(|n| n.load(Ordering::Relaxed).checked_sub(1).map(Node))
    }
}

impl fmt::Debug for LockClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockClass({})", self.name)
    }
}
