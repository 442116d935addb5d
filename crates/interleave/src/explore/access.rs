// SPDX-License-Identifier: MIT OR Apache-2.0
//! What commutes with what.
//!
//! A step leaves a list of accesses. Some race: done in the other order they could have had another effect, and both
//! orders must be looked at. Others only order: what comes after an unlock cannot come before it.
//!
//! What matters for locks is which of two *takers* was first. A taker that waits cannot be put before the unlock that
//! it waited for, so that an unlock races with none of them; only a try, which never waits, sees it.

/// What a step did to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    /// The object, or the thread for the modes that are about one.
    pub(super) object: u32,
    pub(super) mode: Mode,
}

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Read,
    Write,
    /// Took the object for itself, or began to wait for it in a queue.
    Take,
    TakeShared,
    /// The same, by a try.
    TryTake,
    TryTakeShared,
    /// A try that failed.
    Look,
    LookShared,
    /// Let it go, and others try it.
    Give,
    /// Later takers come after this.
    Release,
    /// Later takers for themselves come after this.
    ReleaseShared,
    /// Comes after the releases of both kinds.
    Acquire,
    /// Comes after those of the first kind.
    AcquireShared,
    /// `object` is a thread that begins after this.
    Start,
    /// Comes after the end of thread `object`.
    Join,
    /// `object` is a thread that is woken.
    Wake,
    /// Comes after what woke this thread.
    Woken,
    /// Time went on because nobody could: after all that was, before all that will be.
    Barrier,
}

impl Access {
    /// Whether the two, of different threads, could have had another effect in the other order.
    #[inline]
    pub(super) fn races_with_later(self, later: Access) -> bool {
        use Mode::{Barrier, Give, Look, LookShared, Read, Take, TakeShared, TryTake, TryTakeShared, Write};
        let same = self.object == later.object;
        match (self.mode, later.mode) {
            (Barrier, _) | (_, Barrier) => true,
            (Write, Read | Write) | (Read, Write) => same,
            (Take | TryTake, Take | TryTake | TakeShared | TryTakeShared | Look | LookShared) => same,
            (TakeShared | TryTakeShared, Take | TryTake | Look) => same,
            (Give, TryTake | TryTakeShared) | (Look | LookShared, Give) => same,
            _ => false,
        }
    }

    /// Whether some later access can race with this one.
    pub(super) fn can_race(self) -> bool {
        use Mode::{Give, Look, LookShared, Read, Take, TakeShared, TryTake, TryTakeShared, Write};
        matches!(
            self.mode,
            Read | Write | Take | TakeShared | TryTake | TryTakeShared | Look | LookShared | Give
        )
    }
}

/// Whether two steps of different threads do not commute.
pub(super) fn conflict(a: &[Access], b: &[Access]) -> bool {
    a.iter().any(|a| b.iter().any(|b| a.races_with_later(*b) || b.races_with_later(*a)))
}
