// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exploration: a scenario is run again and again, each time with its threads interleaved in another way.
//!
//! Nothing is rebuilt for it: the same locks, atomics and threads that run plainly are virtual while [`explore`] runs
//! the scenario on the calling OS thread. The first failure comes back with a schedule of few preemptions and a
//! string that [`replay`]s it.
//!
//! ```
//! use interleave::explore::{Config, explore};
//! use interleave::{AtomicU32, Ordering, scope};
//!
//! let report = explore(&Config::default(), |cx| {
//!     let hits = AtomicU32::new(0); // objects are made inside: each execution has its own
//!     scope(cx, |s, _| {
//!         for name in ["a", "b"] {
//!             s.spawn(name, |_| hits.store(hits.load(Ordering::SeqCst) + 1, Ordering::SeqCst));
//!         }
//!     });
//!     assert_eq!(hits.into_inner(), 2); // in a test, end with `.assert_ok()` and let it fail
//! });
//! let failure = &report.failures[0];
//! assert!(failure.message.contains("left: 1"), "{failure}");
//! ```
//!
//! # What is found
//! Panics, [`violation`]s, deadlocks (with who holds what since where), livelocks within a bound on steps, lock classes
//! taken in contradicting orders, sleeping where one must not, and scenarios that are not deterministic.
//!
//! # What a scenario must keep
//! 1. It makes its objects itself, and leaves nothing behind.
//! 2. It depends on nothing but the schedule: no time, address, chance, or order of a hash map.
//! 3. State that is checked but not part of the program is in a [`Ghost`].
//! 4. A loop that waits for another thread without sleeping says so by [`spin_hint`](crate::spin_hint), and changes
//!    nothing in its turns.
//! 5. A panic is a failure, also one that is caught or joined.
//!
//! # What is promised
//! An exhausted exploration has seen every outcome that sequentially consistent memory allows (within the bound on
//! preemptions, if there is one). Weak memory is not explored. Time stands still while any thread can go on; then the
//! earliest sleeper wakes.

mod access;
mod blame;
mod config;
mod contend;
mod dpor;
mod driver;
mod engine;
mod exec;
mod fiber;
mod ghost;
mod hash;
mod hooks;
mod mutate;
mod ops;
mod path;
mod replay;
mod report;
mod search;

pub use config::{Config, Strategy};
pub use driver::{Replay, explore, replay};
pub(crate) use engine::Engine;
pub use ghost::Ghost;
pub use mutate::{Mutant, SiteKind, mutated};
pub use report::{Event, Failure, FailureKind, Report};

use crate::world;

/// Fails the execution: the scenario's rule `message` is broken. Nothing outside exploration.
#[track_caller]
pub fn violation(message: impl FnOnce() -> String) {
    if let Some(engine) = world::active().and_then(world::World::engine) {
        let message = format!("{} at {}", message(), std::panic::Location::caller());
        engine.violation(message);
    }
}

/// Puts a line into the schedule of a failure. The text is made only when one is written.
#[track_caller]
pub fn note(text: impl FnOnce() -> String) {
    if let Some(engine) = world::active().and_then(world::World::engine)
        && engine.recording()
    {
        engine.note(text(), std::panic::Location::caller());
    }
}

/// Promises that nothing that the calling thread has seen so far matters to what it will do, beside how often it has
/// called this: between two system calls, say. States that differ only in that are then one
/// ([`Strategy::ValueCache`]).
///
/// Whoever checks must look at objects and [`Ghost`]s, and not at variables that are carried over the boundary.
pub fn forget() {
    if let Some(engine) = world::active().and_then(world::World::engine) {
        engine.forget();
    }
}

/// Whether the calling code runs under exploration.
pub fn exploring() -> bool {
    world::active().is_some()
}
