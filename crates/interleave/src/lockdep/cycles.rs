// SPDX-License-Identifier: MIT OR Apache-2.0
//! Orders among lock classes that belong to one exploration, and not to the process.

use super::graph::{Edges, GRAPH};
use super::{Report, Site, report};
use crate::class::Node;
use crate::task::Held;

#[derive(Debug, Default)]
pub(crate) struct Cycles {
    edges: Edges,
    /// One bit for each ordered pair of nodes; made when it is first needed.
    seen: Vec<u64>,
}

impl Cycles {
    /// `node` is about to be taken at `site` while `outer` is held. A report, if that contradicts what is known.
    pub(crate) fn add(&mut self, outer: Held, node: Node, same_lock: bool, site: Site) -> Option<Report> {
        let outer_site = outer.site?;
        if same_lock {
            return Some(report::same_lock(GRAPH.lock().link(outer.node, outer_site, node, site)));
        }
        if self.seen.is_empty() {
            self.seen.resize(Node::MAX * Node::MAX / 64, 0);
        }
        let pair = outer.node.index() * Node::MAX + node.index();
        let (word, bit) = (&mut self.seen[pair / 64], 1 << (pair % 64));
        if *word & bit != 0 {
            return None;
        }
        *word |= bit;
        let cycle = self.edges.add((outer.node, outer_site, node, site))?;
        Some(report::order(GRAPH.lock().links(&cycle)))
    }
}
