// SPDX-License-Identifier: MIT OR Apache-2.0
//! Races between giving memory back and being given it again, for any notifier source.
//!
//! What is raced: thread A unmaps a page that something is cached for; the kernel makes the address free before it
//! can have told anybody; thread B is given the address, and looks in the cache. A stale hit is an answer "still
//! current" for what was cached of A's page. A source is right if there is never one. A race proves nothing if its
//! control has none either: [`Nothing`] must lose every round, and a source with half of its protocol some.
mod churn;
mod reuse;
mod subject;

use std::time::Duration;

use interleave::{AtomicBool, AtomicU64, MaySleep, Ordering, Panicked, scope, spin_hint, yield_now};
use mmu_notifier::Range;

pub use churn::churn;
pub use reuse::{Way, reuse};

/// A source, or half of one, as the races see it.
pub trait Subject: Sync {
    /// What is kept beside a cached translation.
    type Token: Send;

    /// Called while `range` is mapped and before it is translated.
    ///
    /// # Errors
    /// The reason why it cannot be cached, in words.
    fn take(&self, range: Range) -> Result<Self::Token, String>;

    /// May what was cached with `token` still be used?
    fn is_current(&self, token: &Self::Token) -> bool;
}

/// The control without any source: everything cached is believed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nothing;

impl Subject for Nothing {
    type Token = ();

    fn take(&self, _range: Range) -> Result<(), String> {
        Ok(())
    }

    fn is_current(&self, _token: &()) -> bool {
        true
    }
}

/// How a race went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Rounds run.
    pub rounds: u64,
    /// Rounds in which something was cached for the address, so that it could be stale.
    pub lookups: u64,
    /// Lookups that were answered "still current" although the memory was another.
    pub stale: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// How long a race goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// Rounds, as far as there is time for them.
    pub rounds: u64,
    /// Time: where threads have to wait for time slices, a round takes many milliseconds.
    pub time: Duration,
    /// Go on after these rounds until one is stale: for a control, which loses now and then.
    pub until_stale: bool,
}

/// Runs `race` with some rounds again and again, for as long as `length` says and at least once. All of it together.
///
/// # Errors
/// That of the first piece which fails.
pub fn repeat(
    length: Length,
    race: impl Fn(u64) -> Result<Outcome, RaceError>,
) -> Result<Outcome, RaceError> {
    let (mut all, mut piece) = (Outcome::default(), 100);
    loop {
        let left = length.rounds.saturating_sub(all.rounds);
        let out = race(if left == 0 { piece } else { piece.min(left) })?;
        if out.elapsed < length.time / 20 {
            piece *= 2;
        }
        all.rounds += out.rounds;
        all.lookups += out.lookups;
        all.stale += out.stale;
        all.elapsed += out.elapsed;
        let done = all.rounds >= length.rounds && !(length.until_stale && all.stale == 0);
        if done || all.elapsed >= length.time {
            return Ok(all);
        }
    }
}

/// May two threads of this process run at once? On one CPU a monitor that wakes up comes before a thread that has run all
/// the time, so a source that only lacks its probe has nothing to lose.
#[must_use]
pub fn has_two_cpus() -> bool {
    std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1)
}

/// Why a race could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RaceError {
    /// The subject refused.
    #[error("{range} cannot be watched: {why}")]
    Refused {
        /// The memory.
        range: Range,
        /// In the subject's words.
        why: String,
    },
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// The step.
        what: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// One of the racing threads panicked, in the subject or in what it was given: the counts are worth nothing.
    #[error(transparent)]
    Panicked(#[from] Panicked),
}

impl RaceError {
    fn last(what: &'static str) -> RaceError {
        RaceError::System { what, source: std::io::Error::last_os_error() }
    }
}

/// Runs `body` while `hogs` threads keep the CPUs busy, so that whoever is woken has to wait.
fn with_hogs<T>(cx: &mut MaySleep<'_>, hogs: usize, body: impl FnOnce(&mut MaySleep<'_>) -> T) -> T {
    let stop = AtomicBool::new(false);
    scope(cx, |scope, cx| {
        for _ in 0..hogs {
            scope.spawn("race-hog", |_| {
                while !stop.load(Ordering::Relaxed) {
                    spin_hint();
                }
            });
        }
        // Also when `body` panics: the scope waits for the hogs.
        let _stop = StopOnDrop(&stop);
        body(cx)
    })
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until `word` is at least `value`. False if `stop` came first.
fn wait_for(word: &AtomicU64, value: u64, stop: &AtomicBool) -> bool {
    let mut spins = 0u32;
    while word.load(Ordering::Acquire) < value {
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        spins += 1;
        if spins.is_multiple_of(100) { yield_now() } else { spin_hint() }
    }
    true
}
