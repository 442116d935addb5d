// SPDX-License-Identifier: MIT OR Apache-2.0
//! What commutes with what.
//!
//! A step leaves a list of accesses. Some race: done in the other order they could have had another effect, and both
//! orders must be looked at. Others only order: what comes after an unlock cannot come before it.
//!
//! What matters for locks is which of two *takers* was first. A taker that waits cannot be put before the unlock that
//! it waited for, so that an unlock races with none of them; only a try, which never waits, sees it.
//!
//! Whether two steps commute must not depend on which is first: two executions would else be taken for one although
//! something can be told apart. So a failed try is said not to commute with readers that are not to blame, either.

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
    /// A try that failed, while nobody had it for himself alone: a writer would not have waited to begin.
    Look,
    /// A try that failed, while somebody had it for himself alone.
    LookHeld,
    /// Let it go, and others try it.
    Give,
    /// The same, of one reader among others.
    GiveShared,
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
        use Mode::{
            Barrier, Give, GiveShared, Look, LookHeld, Read, Take, TakeShared, TryTake, TryTakeShared, Write,
        };
        let same = self.object == later.object;
        match (self.mode, later.mode) {
            (Barrier, _) | (_, Barrier) => true,
            (Write, Read | Write) | (Read, Write) => same,
            (Take | TryTake, Take | TryTake | TakeShared | TryTakeShared | Look | LookHeld) => same,
            (TakeShared | TryTakeShared, Take | TryTake | Look) => same,
            (Look, Take | TryTake | TakeShared | TryTakeShared | Give | GiveShared) => same,
            (Give, TryTake | TryTakeShared | Look | LookHeld) | (GiveShared, TryTake | Look) => same,
            // Between such a try and a later taker comes the unlock, which it races with.
            (LookHeld, Give) => same,
            _ => false,
        }
    }

    /// Whether some later access can race with this one.
    pub(super) fn can_race(self) -> bool {
        use Mode::{Acquire, AcquireShared, Barrier, Join, Release, ReleaseShared, Start, Wake, Woken};
        !matches!(
            self.mode,
            Acquire | AcquireShared | Barrier | Join | Release | ReleaseShared | Start | Wake | Woken
        )
    }
}

/// Whether two steps of different threads do not commute.
pub(super) fn conflict(a: &[Access], b: &[Access]) -> bool {
    a.iter().any(|a| b.iter().any(|b| a.races_with_later(*b) || b.races_with_later(*a)))
}
