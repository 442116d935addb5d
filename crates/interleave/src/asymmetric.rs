// SPDX-License-Identifier: MIT OR Apache-2.0
//! A fence whose cost falls on one side: nothing for who passes often, a system call for who passes seldom.
//!
//! Two threads that each store and then load what the other stores (Dekker's question: "does either see the other?")
//! need a full fence each. Where one of them asks millions of times for each time that the other does, the second can
//! pay for both: membarrier(2) makes every running thread of the process pass a full barrier, wherever in its code it
//! is (MEMBARRIER_CMD_PRIVATE_EXPEDITED, Linux 4.14). What the first must still do is keep its store before its load in
//! the code.
//!
//! ```text
//! often                         seldom
//!   store mine                    store theirs
//!   light()                       heavy()
//!   load theirs                   load mine          one of the two loads sees the other's store
//! ```
//!
//! `light` says nothing to another `light`. Where there is no membarrier both are full fences.

use std::sync::atomic::{Ordering, compiler_fence, fence};

use rustix::thread::{MembarrierCommand, membarrier};

use crate::world;

/// A fence that costs one side nothing and the other a system call: a store before [`light`](Self::light) and a load after
/// it, against a store before [`heavy`](Self::heavy) and a load after it, and one of the two loads sees the other's store.
/// All that want to meet use one of them.
#[derive(Debug)]
pub struct AsymmetricFence {
    /// Registered, so that it will not be refused for want of that.
    membarrier: bool,
}

/// The kernel refuses the barrier that it once granted (a seccomp filter that came later): who asked must not believe
/// that he has seen what others have stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("membarrier is refused ({0}), which was allowed when the process began to rely on it")]
pub struct NoBarrier(rustix::io::Errno);

impl AsymmetricFence {
    /// The cheapest that there is. Sleeps for some milliseconds the first time in a process with threads (the kernel
    /// waits until all of them know).
    #[must_use]
    pub fn new() -> AsymmetricFence {
        // Explored memory is sequentially consistent, and its threads are one thread of the system.
        let plain = world::active().is_none();
        AsymmetricFence { membarrier: plain && register() }
    }

    /// As without membarrier: full fences on both sides.
    #[must_use]
    pub fn symmetric() -> AsymmetricFence {
        AsymmetricFence { membarrier: false }
    }

    /// The side that passes often. Any context.
    #[inline(always)]
    pub fn light(&self) {
        if self.membarrier {
            compiler_fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
        }
    }

    /// The side that passes seldom: half a microsecond, more where many CPUs run the process. Any context.
    ///
    /// # Errors
    /// [`NoBarrier`]: nothing was fenced.
    pub fn heavy(&self) -> Result<(), NoBarrier> {
        if self.membarrier {
            membarrier(MembarrierCommand::PrivateExpedited).map_err(NoBarrier)
        } else {
            fence(Ordering::SeqCst);
            Ok(())
        }
    }
}

impl Default for AsymmetricFence {
    fn default() -> AsymmetricFence {
        AsymmetricFence::new()
    }
}

/// May this process use it from now on? As often as one likes.
fn register() -> bool {
    membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok()
        // One that is registered and refused all the same (a filter of its own for each command) must not be relied on.
        && membarrier(MembarrierCommand::PrivateExpedited).is_ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// How many times of `rounds` neither thread saw the other's store.
    fn neither_saw(rounds: usize, often: impl Fn() + Sync, seldom: impl Fn()) -> usize {
        let (mine, theirs, seen) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let round = Barrier::new(2);
        std::thread::scope(|s| {
            s.spawn(|| {
                for n in 1..=rounds {
                    round.wait();
                    mine.store(n, Ordering::Relaxed);
                    often();
                    seen.store(theirs.load(Ordering::Relaxed), Ordering::Relaxed);
                    round.wait();
                }
            });
            (1..=rounds)
                .filter(|&n| {
                    round.wait();
                    theirs.store(n, Ordering::Relaxed);
                    seldom();
                    let saw = mine.load(Ordering::Relaxed) == n;
                    round.wait();
                    !saw && seen.load(Ordering::Relaxed) != n
                })
                .count()
        })
    }

    #[test]
    fn one_side_sees_the_other() {
        for fence in [AsymmetricFence::new(), AsymmetricFence::symmetric()] {
            let missed = neither_saw(2000, || fence.light(), || fence.heavy().unwrap());
            assert_eq!(missed, 0, "{fence:?}");
        }
    }
}
