// SPDX-License-Identifier: MIT OR Apache-2.0
//! Depth-first search: the executions in the order of a tree, each but the first sharing a prefix with the one before.
//!
//! A node is a scheduling decision. Which of the enabled threads are tried there depends on the reduction:
//! * none: all, or all within the preemption bound;
//! * sleep sets: not those whose step was tried before in a place that commutes with all that came in between;
//! * source-DPOR: those without which a race seen later could not happen the other way round ([`dpor`](super::dpor)).
//!
//! With a cache, an execution ends where it comes to a state that has been explored. Sleep sets are not used with it:
//! a state reached asleep has not been explored in full.

use std::rc::Rc;

use super::access::{Access, conflict};
use super::dpor::Analysis;
use super::exec::{Exec, Set, Tid, members};
use super::hash::{Keys, mix};
use super::search::{Choice, Pick};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reduction {
    None,
    Sleep,
    Dpor,
}

/// A thread that need not be tried, and what its step would do.
#[derive(Clone)]
struct Sleeper {
    tid: Tid,
    footprint: Rc<[Access]>,
}

pub(super) struct Node {
    pub(super) enabled: Set,
    pub(super) chosen: Tid,
    /// Threads to try, those tried included.
    pub(super) backtrack: Set,
    /// Threads asleep when the node was made.
    pub(super) asleep: Set,
    sleep: Vec<Sleeper>,
    /// Threads tried before `chosen`.
    done: Vec<Sleeper>,
    tried: Set,
    /// Who would go on without a preemption.
    current: Option<Tid>,
    /// Preemptions before this node.
    preemptions: u32,
    /// What `chosen` was about to do.
    pending: u64,
}

impl Node {
    /// Preemptions up to and with this node.
    fn preemptions(&self) -> u32 {
        self.preemptions + u32::from(self.current.is_some_and(|current| current != self.chosen))
    }
}

pub(super) struct Path {
    nodes: Vec<Node>,
    depth: usize,
    reduction: Reduction,
    bound: Option<u32>,
    cache: Option<Keys>,
    /// Something was left out because of the bound.
    cut: bool,
    analysis: Box<Analysis>,
    /// How many of the first steps are those of the execution before.
    kept: usize,
}

impl Path {
    pub(super) fn new(reduction: Reduction, bound: Option<u32>, cached: bool) -> Path {
        Path {
            nodes: Vec::new(),
            depth: 0,
            reduction,
            bound,
            cache: cached.then(Keys::default),
            cut: false,
            analysis: Box::default(),
            kept: 0,
        }
    }

    /// The bound on preemptions, if anything was left out because of it.
    pub(super) fn cut(&self) -> Option<u32> {
        self.bound.filter(|_| self.cut)
    }

    pub(super) fn cached(&self) -> bool {
        self.cache.is_some()
    }

    pub(super) fn reduces(&self) -> bool {
        self.reduction != Reduction::None
    }

    /// States seen, with a cache.
    pub(super) fn states(&self) -> u64 {
        self.cache.as_ref().map_or(0, |cache| cache.len() as u64)
    }

    pub(super) fn restart(&mut self) {
        self.nodes.clear();
        (self.depth, self.kept) = (0, 0);
        self.cut = false;
        if let Some(cache) = &mut self.cache {
            cache.clear();
        }
    }

    pub(super) fn pick(&mut self, choice: &Choice<'_>) -> Pick {
        if let Some(node) = self.nodes.get_mut(self.depth) {
            self.depth += 1;
            let chosen = node.chosen;
            if node.enabled != choice.enabled {
                return Pick::Different("other threads could go on".to_owned());
            }
            let pending = choice.exec.pending(chosen);
            if node.pending != 0 && node.pending != pending {
                let name = &choice.exec.threads[chosen].name;
                return Pick::Different(format!("thread `{name}` was about to do something else"));
            }
            node.pending = pending;
            return Pick::Thread(chosen);
        }
        self.grow(choice)
    }

    /// Decides at a new node.
    fn grow(&mut self, choice: &Choice<'_>) -> Pick {
        let exec = choice.exec;
        let preemptions = self.nodes.last().map_or(0, Node::preemptions);
        let current = choice.current().filter(|_| !choice.timers);
        if let Some(cache) = &mut self.cache {
            let mut state = exec.state();
            if self.bound.is_some() {
                let current = current.map_or(0, |tid| exec.threads[tid].key);
                state = mix(state, mix(current, u64::from(preemptions)));
            }
            if !cache.insert(state) {
                return Pick::Prune;
            }
        }
        let sleep = self.sleepers(exec);
        let asleep = sleep.iter().fold(0, |set: Set, s| set | 1 << s.tid);
        let mut allowed = choice.enabled & !asleep;
        if let (Some(bound), Some(current)) = (self.bound, current)
            && preemptions >= bound
        {
            self.cut |= allowed & !(1 << current) != 0;
            allowed &= 1 << current;
        }
        if allowed == 0 {
            return Pick::Prune;
        }
        let default = choice.default();
        let chosen = if allowed & (1 << default) != 0 { default } else { allowed.trailing_zeros() as usize };
        let backtrack =
            if self.reduction == Reduction::Dpor && !choice.timers { 1 << chosen } else { allowed };
        self.nodes.push(Node {
            enabled: choice.enabled,
            chosen,
            backtrack,
            asleep,
            sleep,
            done: Vec::new(),
            tried: 1 << chosen,
            current,
            preemptions,
            pending: exec.pending(chosen),
        });
        self.depth += 1;
        Pick::Thread(chosen)
    }

    /// Who is asleep at a new node: those who were at the last one, or were tried there, and are not disturbed.
    fn sleepers(&self, exec: &Exec) -> Vec<Sleeper> {
        let (Some(last), false) = (self.nodes.last(), self.reduction == Reduction::None) else {
            return Vec::new();
        };
        let step = exec.footprint(self.nodes.len() - 1);
        let others = last.sleep.iter().chain(&last.done).filter(|s| s.tid != last.chosen);
        others.filter(|s| !conflict(&s.footprint, step)).cloned().collect()
    }

    /// Goes back to the last node with something left to try.
    pub(super) fn next(&mut self, exec: &Exec) -> bool {
        if self.reduction == Reduction::Dpor {
            self.analysis.reverse_races(exec, &mut self.nodes, self.kept);
        }
        self.depth = 0;
        while let Some(mut node) = self.nodes.pop() {
            if let Some(next) = members(node.backtrack & !node.tried & !node.asleep).next() {
                if self.reduction != Reduction::None {
                    let footprint = exec.footprint(self.nodes.len()).into();
                    node.done.push(Sleeper { tid: node.chosen, footprint });
                }
                node.chosen = next;
                node.tried |= 1 << next;
                node.pending = 0;
                self.kept = self.nodes.len();
                self.nodes.push(node);
                return true;
            }
        }
        false
    }
}
