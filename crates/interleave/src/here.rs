// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the calling thread runs, asked once for many accesses.
//!
//! Each operation of this crate asks whether its thread is explored and whether its object was born so: two predicted
//! branches, which show where a whole path is twenty loads. Such a path asks once, and passes the answer on.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::world::{self, World};

/// Where the calling thread runs. To be asked for at the beginning of a path and dropped at its end: who goes into
/// exploration with one from outside uses explored objects plainly.
#[derive(Clone, Copy, Debug)]
pub struct Here {
    plain: bool,
    /// It is true of this thread only.
    _here: PhantomData<*const ()>,
}

impl Here {
    /// Asks.
    #[inline(always)]
    #[must_use]
    pub fn ask() -> Here {
        Here { plain: world::active().is_none(), _here: PhantomData }
    }

    /// Outside exploration?
    #[inline(always)]
    #[must_use]
    pub fn is_plain(self) -> bool {
        self.plain
    }

    /// A small number that no other living thread has: the least that was free when the thread first asked. Under
    /// exploration the place of the virtual thread among those of its execution.
    ///
    /// `None` for those that come when a thousand have one, and in the destructors of a thread's own storage, where the
    /// number may be another's already.
    #[inline(always)]
    #[must_use]
    pub fn thread(self) -> Option<usize> {
        if !self.plain {
            return Some(explored());
        }
        match NUMBER.get() {
            UNKNOWN => first(),
            GONE => None,
            number => Some(number),
        }
    }

    /// The [number](Self::thread) if the thread has asked for it before, and otherwise a number that no thread has.
    #[inline(always)]
    #[must_use]
    pub fn known_thread(self) -> usize {
        if self.plain { NUMBER.get() } else { explored() }
    }
}

const UNKNOWN: usize = usize::MAX;
/// None, and never will be.
const GONE: usize = usize::MAX - 1;

thread_local! {
    static NUMBER: Cell<usize> = const { Cell::new(UNKNOWN) };

    /// Gives it back. Apart, because what has no destructor is cheaper to reach.
    static KEPT: Cell<Option<Kept>> = const { Cell::new(None) };
}

struct Kept(usize);

impl Drop for Kept {
    fn drop(&mut self) {
        NUMBER.set(GONE);
        // Release: who has the number next sees what this thread did under it.
        TAKEN[self.0 / BITS].fetch_and(!(1 << (self.0 % BITS)), Ordering::Release);
    }
}

const BITS: usize = u64::BITS as usize;

/// A bit for each number that a thread has. No lock, which could be held for ever in a forked child.
static TAKEN: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];

#[cold]
#[inline(never)]
fn first() -> Option<usize> {
    let number = take();
    NUMBER.set(number.unwrap_or(GONE));
    let kept = Kept(number?);
    // If this thread's storage is gone already, the closure is dropped here, and the number given back with it.
    let _ = KEPT.try_with(|slot| slot.set(Some(kept)));
    number.filter(|number| NUMBER.get() == *number)
}

fn take() -> Option<usize> {
    TAKEN.iter().enumerate().find_map(|(n, word)| {
        let taken = word.fetch_update(Ordering::Acquire, Ordering::Relaxed, |bits| {
            let free = bits.trailing_ones();
            (free < u64::BITS).then(|| bits | 1 << free)
        });
        taken.ok().map(|before| n * BITS + before.trailing_ones() as usize)
    })
}

#[cold]
#[inline(never)]
fn explored() -> usize {
    world::active().and_then(World::engine).map_or(0, |engine| engine.thread())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explore::{Config, explore};
    use crate::scope;

    #[test]
    fn living_threads_have_numbers_of_their_own_and_the_dead_leave_theirs() {
        let of_another = || std::thread::spawn(|| Here::ask().thread()).join().unwrap().unwrap();
        let mine = Here::ask().thread().unwrap();
        assert_eq!(Here::ask().thread(), Some(mine));
        let seen: Vec<usize> = (0..100).map(|_| of_another()).collect();
        assert!(seen.iter().all(|n| *n != mine), "{seen:?}");
        // Other tests run beside this one, so not always the same.
        assert!(seen.iter().any(|n| seen.iter().filter(|m| *m == n).count() > 1), "{seen:?}");
    }

    #[test]
    fn virtual_threads_are_told_apart() {
        let report = explore(&Config::default(), |cx| {
            let numbers = scope(cx, |s, cx| {
                let threads = ["a", "b"].map(|name| s.spawn(name, |_| Here::ask().thread()));
                threads.map(|thread| thread.join(cx).unwrap())
            });
            assert_eq!((Here::ask().thread(), numbers), (Some(0), [Some(1), Some(2)]));
            assert!(!Here::ask().is_plain());
        });
        report.assert_ok();
    }
}
