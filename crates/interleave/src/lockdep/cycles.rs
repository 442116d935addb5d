// SPDX-License-Identifier: MIT OR Apache-2.0
//! Orders among lock classes that belong to one exploration, and not to the process.

use std::collections::HashSet;

use super::graph::{Edges, GRAPH};
use super::{Report, Site, report};
use crate::class::Node;
use crate::task::Held;

#[derive(Debug, Default)]
pub(crate) struct Cycles {
    edges: Edges,
    seen: HashSet<(usize, usize)>,
}

impl Cycles {
    /// `node` is about to be taken at `site` while `outer` is held. A report, if that contradicts what is known.
    pub(crate) fn add(&mut self, outer: Held, node: Node, same_lock: bool, site: Site) -> Option<Report> {
        let first = self.seen.insert((outer.node.index(), node.index()));
        if !first && !same_lock {
            return None;
        }
        let new = (outer.node, outer.site?, node, site);
        let cycle = if first { self.edges.add(new)? } else { vec![new] };
        let mut links = GRAPH.lock().links(&cycle);
        let again = same_lock && links.len() == 1;
        if again { links.pop().map(report::same_lock) } else { Some(report::order(links)) }
    }
}
