// SPDX-License-Identifier: MIT OR Apache-2.0
//! How to explore.

use std::time::Duration;

use super::mutate::Mutant;

/// In which order executions are tried, and which are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Strategy {
    /// Every order of every two steps. For comparison: the others are judged by it.
    Plain,
    /// Every order, but for those that differ only in steps that commute (sleep sets).
    Sleep,
    /// The same with fewer executions (source-DPOR with sleep sets). To exhaustion, for data that cannot be hashed.
    Dpor,
    /// Every state once, by the digests of guarded data. To exhaustion; fastest with [`forget`](super::forget).
    ValueCache,
    /// At most this many preemptions; first none, then one, and so on, so that what is found needs the fewest.
    Preemptions(u32),
    /// The same, and a state that has been seen with no more preemptions is not explored again.
    CachedPreemptions(u32),
    /// Probabilistic concurrency testing: finds a bug that needs `depth` orderings with a known probability.
    Pct {
        /// Orderings that a bug may need; 3 to 5.
        depth: u32,
        /// Of the random numbers.
        seed: u64,
        /// How many executions.
        executions: u64,
    },
    /// Random choices.
    Random {
        /// Of the random numbers.
        seed: u64,
        /// How many executions.
        executions: u64,
    },
}

/// How to explore. The default finds most bugs at once: [`Strategy::Preemptions`] with a bound of two.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Config {
    /// In which order.
    pub strategy: Strategy,
    /// Executions after which it stops, not exhausted.
    pub max_executions: u64,
    /// Time after which it stops, not exhausted.
    pub max_time: Option<Duration>,
    /// Steps in one execution, beyond which it is a livelock.
    pub max_steps: usize,
    /// Failures after which it stops; only the first of a kind and message is kept.
    pub failures: usize,
    /// What lockdep reports is a failure.
    pub lockdep: bool,
    /// Executions that may be spent to find the same failure with fewer preemptions.
    pub minimise: u64,
    /// Bytes of stack of each virtual thread; a guard page follows. At least 256 KiB.
    pub stack: usize,
    /// An operation that is switched off.
    pub without: Option<Mutant>,
    /// Report every operation that could be switched off.
    pub find_sites: bool,
    /// Threads switch at operations on what only one of them uses, too.
    pub all_points: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config::new(Strategy::Preemptions(2))
    }
}

impl Config {
    /// Exploration by `strategy`, until it is exhausted or has found one failure.
    pub fn new(strategy: Strategy) -> Config {
        Config {
            strategy,
            max_executions: u64::MAX,
            max_time: None,
            max_steps: 50_000,
            failures: 1,
            lockdep: true,
            minimise: 20_000,
            stack: 512 << 10,
            without: None,
            find_sites: false,
            all_points: false,
        }
    }

    /// Stops after `executions`.
    #[must_use]
    pub fn max_executions(mut self, executions: u64) -> Config {
        self.max_executions = executions;
        self
    }

    /// Stops after `time`.
    #[must_use]
    pub fn max_time(mut self, time: Duration) -> Config {
        self.max_time = Some(time);
        self
    }

    /// Calls an execution of more than `steps` a livelock.
    #[must_use]
    pub fn max_steps(mut self, steps: usize) -> Config {
        self.max_steps = steps;
        self
    }

    /// Goes on until `failures` different ones are found.
    #[must_use]
    pub fn failures(mut self, failures: usize) -> Config {
        self.failures = failures;
        self
    }

    /// Whether what lockdep reports is a failure.
    #[must_use]
    pub fn lockdep(mut self, lockdep: bool) -> Config {
        self.lockdep = lockdep;
        self
    }

    /// Switches `mutant` off.
    #[must_use]
    pub fn without(mut self, mutant: Mutant) -> Config {
        self.without = Some(mutant);
        self
    }

    /// Reports what could be switched off ([`Report::sites`](super::Report::sites)).
    #[must_use]
    pub fn find_sites(mut self) -> Config {
        self.find_sites = true;
        self
    }

    /// Has threads switch at each operation, also on what nobody contends for. For comparison: nothing more is found.
    #[must_use]
    pub fn all_points(mut self) -> Config {
        self.all_points = true;
        self
    }

    /// Spends at most `executions` on making a failure's schedule smaller.
    #[must_use]
    pub fn minimise(mut self, executions: u64) -> Config {
        self.minimise = executions;
        self
    }
}
