// SPDX-License-Identifier: MIT OR Apache-2.0
//! The graph itself: which class was held while which was taken, and where first.
//!
//! Invariant: the edges have no cycle. An order that would close one is reported and not added, so that one mistake
//! is one report and later ones are not blamed on it. A pair that was looked at, added or not, is marked in [`SEEN`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::{Link, Site};
use crate::class::Node;

const WORDS: usize = Node::MAX / 64;

/// One bit for each ordered pair of nodes. A stale zero costs a look under the lock, and a one is never taken back.
static SEEN: [[AtomicU64; WORDS]; Node::MAX] = [const { [const { AtomicU64::new(0) }; WORDS] }; Node::MAX];

pub(super) static GRAPH: Mutex<Graph> = Mutex::new(Graph { names: Vec::new(), edges: Edges::new() });

/// The word that has the [`bit`] of `inner` set if the pair was looked at.
#[inline(always)]
pub(super) fn seen_word(outer: Node, inner: Node) -> u64 {
    SEEN[outer.index() % Node::MAX][inner.index() / 64 % WORDS].load(Ordering::Relaxed)
}

#[inline(always)]
pub(super) fn bit(inner: Node) -> u64 {
    1 << (inner.index() % 64)
}

pub(super) struct Graph {
    /// Name and subclass of each node, from node one on.
    names: Vec<(&'static str, usize)>,
    edges: Edges,
}

/// `(outer, inner)` to the places where each was taken when the order was first seen.
#[derive(Debug, Default)]
pub(super) struct Edges(BTreeMap<(usize, usize), (Site, Site)>);

/// One order: the class held and where, the class taken and where.
pub(super) type Edge = (Node, Site, Node, Site);

impl Graph {
    pub(super) fn register(&mut self, name: &'static str, subclass: usize) -> Option<Node> {
        let node = Node::new(self.names.len() + 1)?;
        self.names.push((name, subclass));
        Some(node)
    }

    pub(super) fn size(&self) -> (usize, usize) {
        (self.names.len(), self.edges.0.len())
    }

    pub(super) fn name(&self, node: Node) -> String {
        match node.index().checked_sub(1).and_then(|i| self.names.get(i)) {
            Some((name, 0)) => (*name).to_owned(),
            Some((name, subclass)) => format!("{name}/{subclass}"),
            None => "(unchecked)".to_owned(),
        }
    }

    pub(super) fn link(&self, outer: Node, outer_site: Site, inner: Node, inner_site: Site) -> Link {
        Link {
            outer: self.name(outer),
            outer_node: outer,
            outer_site,
            inner: self.name(inner),
            inner_node: inner,
            inner_site,
        }
    }

    /// Looks at an order for the first time. If it contradicts what is known: the cycle, the new order first.
    pub(super) fn add(
        &mut self,
        outer: Node,
        outer_site: Site,
        inner: Node,
        inner_site: Site,
    ) -> Option<Vec<Link>> {
        let bit = bit(inner);
        let word = &SEEN[outer.index()][inner.index() / 64];
        if word.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return None;
        }
        let cycle = self.edges.add((outer, outer_site, inner, inner_site))?;
        Some(self.links(&cycle))
    }

    pub(super) fn links(&self, cycle: &[Edge]) -> Vec<Link> {
        cycle.iter().map(|&(outer, from, inner, to)| self.link(outer, from, inner, to)).collect()
    }
}

impl Edges {
    pub(super) const fn new() -> Edges {
        Edges(BTreeMap::new())
    }

    /// Adds an order that was not looked at before, or answers the cycle that it would close, itself first.
    pub(super) fn add(&mut self, new: Edge) -> Option<Vec<Edge>> {
        let (outer, outer_site, inner, inner_site) = new;
        if outer == inner {
            return Some(vec![new]);
        }
        if let Some(path) = self.path(inner.index(), outer.index()) {
            let back = path.windows(2).filter_map(|pair| {
                let (from, to) = (pair[0], pair[1]);
                let &(from_site, to_site) = self.0.get(&(from, to))?;
                Some((Node::new(from)?, from_site, Node::new(to)?, to_site))
            });
            return Some(std::iter::once(new).chain(back).collect());
        }
        self.0.insert((outer.index(), inner.index()), (outer_site, inner_site));
        None
    }

    /// A shortest path along edges.
    fn path(&self, from: usize, to: usize) -> Option<Vec<usize>> {
        let mut came_from: BTreeMap<usize, usize> = BTreeMap::from([(from, from)]);
        let mut queue = VecDeque::from([from]);
        while let Some(node) = queue.pop_front() {
            if node == to {
                let mut path = vec![to];
                while let Some(&last) = path.last()
                    && last != from
                {
                    path.push(*came_from.get(&last)?);
                }
                path.reverse();
                return Some(path);
            }
            for (&(_, next), _) in self.0.range((node, 0)..=(node, usize::MAX)) {
                if let std::collections::btree_map::Entry::Vacant(slot) = came_from.entry(next) {
                    slot.insert(node);
                    queue.push_back(next);
                }
            }
        }
        None
    }
}
