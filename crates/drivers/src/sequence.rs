// SPDX-License-Identifier: MIT OR Apache-2.0
//! A count of invalidations between start and end, and a sequence that each end moves: how KVM keeps a reader of pages from using
//! what it got while they changed, for the designs that do it likewise.
//!
//! A reader takes the sequence, gets pages, and under the lock that the start callback takes too asks whether anything is open
//! or has ended since. It does not wait for the count to fall: it may be asked inside an invalidation of its own process.
//!
//! Lock order: a spin lock, leaf.

use crate::site::{bump, changed, unbump};
use interleave::{Context, LockClass, SpinLock};

static SEQUENCE: LockClass = LockClass::new("design sequence");

#[derive(Default)]
struct State {
    open: u64,
    seq: u64,
    readers: u64,
}

/// A point in the sequence. Give it back to [`Sequence::retry`].
#[must_use]
pub(crate) struct Read(u64);

pub(crate) struct Sequence(SpinLock<State>);

impl Sequence {
    pub(crate) fn new() -> Sequence {
        Sequence(SpinLock::new(&SEQUENCE, State::default()))
    }

    /// An invalidation starts. Is anybody between read and retry?
    pub(crate) fn start(&self, cx: &mut impl Context) -> bool {
        let mut state = self.0.lock(cx);
        bump(&mut state.open);
        state.readers > 0
    }

    /// An invalidation ends. Is anybody between read and retry?
    pub(crate) fn end(&self, cx: &mut impl Context) -> bool {
        let mut state = self.0.lock(cx);
        bump(&mut state.seq);
        unbump(&mut state.open);
        state.readers > 0
    }

    /// Something changed at one moment (change_pte). Is anybody between read and retry?
    pub(crate) fn bump(&self, cx: &mut impl Context) -> bool {
        let mut state = self.0.lock(cx);
        bump(&mut state.seq);
        state.readers > 0
    }

    pub(crate) fn read(&self, cx: &mut impl Context) -> Read {
        let mut state = self.0.lock(cx);
        state.readers += 1;
        Read(state.seq)
    }

    /// May anything have changed since? Under the lock that guards the installation.
    pub(crate) fn retry(&self, cx: &mut impl Context, read: Read) -> bool {
        let mut state = self.0.lock(cx);
        state.readers = state.readers.saturating_sub(1);
        changed(state.open > 0 || state.seq != read.0)
    }
}
