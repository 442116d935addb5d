// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who goes on: the strategies.

use super::exec::{Exec, Set, Tid, members};
use super::hash::{Rng, mix};
use super::path::Path;
use super::replay::Follow;

/// What a strategy is asked.
pub(super) struct Choice<'a> {
    pub(super) exec: &'a Exec,
    /// Who could go on; not empty.
    pub(super) enabled: Set,
    /// They all could only because time goes on.
    pub(super) timers: bool,
}

impl Choice<'_> {
    /// The thread that made the last step, if it could go on.
    pub(super) fn current(&self) -> Option<Tid> {
        let last = self.exec.last;
        (self.enabled & (1 << last) != 0).then_some(last)
    }

    /// Who goes on if nobody has a wish: whoever did, or the first.
    pub(super) fn default(&self) -> Tid {
        self.current().unwrap_or(self.enabled.trailing_zeros() as usize)
    }
}

pub(super) enum Pick {
    Thread(Tid),
    /// Nothing new can come of this execution: let it run out.
    Prune,
    /// The execution is not the one that it was when it came here last.
    Different(String),
}

pub(super) enum Search {
    Path(Path),
    Random(Random),
    Pct(Pct),
    Follow(Follow),
    Exact(Exact),
}

impl Search {
    /// Whether it looks at the hash of a state.
    pub(super) fn hashes(&self) -> bool {
        matches!(self, Search::Path(path) if path.cached())
    }

    /// Whether it goes by points that an execution of its own has, and not by those of a text.
    pub(super) fn skips(&self) -> bool {
        !matches!(self, Search::Follow(_))
    }

    /// Whether it looks at the footprints of steps.
    pub(super) fn reduces(&self) -> bool {
        matches!(self, Search::Path(path) if path.reduces())
    }

    #[inline]
    pub(super) fn pick(&mut self, choice: &Choice<'_>) -> Pick {
        match self {
            Search::Path(path) => path.pick(choice),
            Search::Random(random) => Pick::Thread(random.pick(choice)),
            Search::Pct(pct) => Pick::Thread(pct.pick(choice)),
            Search::Follow(follow) => Pick::Thread(follow.pick(choice)),
            Search::Exact(exact) => exact.pick(choice),
        }
    }

    /// Prepares the next execution. `false` if there is none.
    pub(super) fn next(&mut self, exec: &Exec) -> bool {
        match self {
            Search::Path(path) => path.next(exec),
            Search::Random(_) => true,
            Search::Pct(pct) => {
                pct.next(exec);
                true
            }
            Search::Follow(_) | Search::Exact(_) => false,
        }
    }

    /// Starts over: the scheduling points are not what they were.
    pub(super) fn restart(&mut self) {
        if let Search::Path(path) = self {
            path.restart();
        }
    }
}

/// A schedule by thread numbers.
pub(super) struct Exact(Vec<Tid>);

impl Exact {
    pub(super) fn new(tids: Vec<Tid>) -> Exact {
        Exact(tids)
    }

    fn pick(&self, choice: &Choice<'_>) -> Pick {
        match self.0.get(choice.exec.steps.len()) {
            Some(&tid) if choice.enabled & (1 << tid) != 0 => Pick::Thread(tid),
            Some(_) => Pick::Different("other threads could go on".to_owned()),
            None => Pick::Thread(choice.default()),
        }
    }
}

/// Each time any of those who can.
pub(super) struct Random {
    rng: Rng,
}

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random { rng: Rng::new(seed) }
    }

    #[inline]
    fn pick(&mut self, choice: &Choice<'_>) -> Tid {
        let mut left = choice.enabled;
        if left & (left - 1) != 0 {
            for _ in 0..self.rng.below(u64::from(left.count_ones())) {
                left &= left - 1;
            }
        }
        left.trailing_zeros() as usize
    }
}

/// Probabilistic concurrency testing: random priorities, which change at `depth - 1` random steps. A bug that needs
/// `depth` orderings among `n` threads and `k` steps is found with probability at least `1 / (n * k^(depth - 1))`.
pub(super) struct Pct {
    rng: Rng,
    depth: u32,
    /// The most steps seen in an execution.
    length: u64,
    /// Of each thread; a greater one goes first. Those set by a change are the least.
    priorities: Vec<u64>,
    /// The steps at which the running thread falls to the bottom.
    changes: Vec<u64>,
    salt: u64,
}

impl Pct {
    pub(super) fn new(depth: u32, seed: u64) -> Pct {
        let mut pct = Pct {
            rng: Rng::new(seed),
            depth,
            length: 1,
            priorities: Vec::new(),
            changes: Vec::new(),
            salt: 0,
        };
        pct.deal();
        pct
    }

    fn deal(&mut self) {
        self.priorities.clear();
        self.salt = self.rng.next();
        self.changes.clear();
        for _ in 1..self.depth {
            let step = self.rng.below(self.length);
            self.changes.push(step);
        }
    }

    fn next(&mut self, exec: &Exec) {
        self.length = self.length.max(exec.steps.len() as u64);
        self.deal();
    }

    fn pick(&mut self, choice: &Choice<'_>) -> Tid {
        while self.priorities.len() < choice.exec.threads.len() {
            let tid = self.priorities.len() as u64;
            self.priorities.push(mix(self.salt, tid) | 1 << 63);
        }
        let step = choice.exec.steps.len() as u64;
        let best = |priorities: &[u64]| {
            members(choice.enabled).max_by_key(|&t| priorities[t]).unwrap_or_else(|| choice.default())
        };
        if let Some(at) = self.changes.iter().position(|&change| change == step) {
            let fallen = best(&self.priorities);
            self.priorities[fallen] = at as u64;
        }
        best(&self.priorities)
    }
}
