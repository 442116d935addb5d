// SPDX-License-Identifier: MIT OR Apache-2.0
//! The counting semaphore.
//!
//! Fair: a permit given back while threads wait goes to the one that has waited longest, and never to one that comes
//! later. Nobody owns a permit, so that lockdep has no order to learn from it; `down` counts as a possible sleep.

use std::collections::VecDeque;
use std::fmt;
use std::panic::Location;

use crate::birth::{Birth, ObjectKind};
use crate::raw::{attempt, grant, release};
use crate::sync::{Arc, Mutex};
use crate::wait_list::Waiter;
use crate::world::OpKind;
use crate::{Context, LockClass, MaySleep, might_sleep};

/// A count of permits: any thread may give back what another took. Taking one wants a [`MaySleep`]; any context
/// may try, and give back. In statics: [`const_new`](Self::const_new), plain only.
pub struct Semaphore {
    state: Mutex<State>,
    birth: Birth,
    class: &'static LockClass,
}

/// Invariant: nobody waits while there are permits.
struct State {
    permits: usize,
    waiting: VecDeque<Arc<Waiter>>,
}

impl Semaphore {
    /// A semaphore with `permits` to give, in the world of the calling thread.
    #[track_caller]
    pub fn new(class: &'static LockClass, permits: usize) -> Self {
        let birth =
            Birth::here(ObjectKind::Semaphore, Some(class), Location::caller(), || Some(permits as u64));
        Semaphore { birth, ..Self::const_new(class, permits) }
    }

    /// A semaphore in a static; it cannot be used under exploration.
    pub const fn const_new(class: &'static LockClass, permits: usize) -> Self {
        let state = Mutex::new(State { permits, waiting: VecDeque::new() });
        Semaphore { state, birth: Birth::CONST, class }
    }

    /// Takes one permit, sleeping until there is one.
    #[track_caller]
    pub fn down(&self, _cx: &mut MaySleep<'_>) {
        let site = Location::caller();
        might_sleep();
        match self.birth.world(site) {
            None => self.take_or_sleep(),
            Some(world) => grant(world, self.birth, OpKind::Down, Some(self.class), site, &|| self.take()),
        }
    }

    /// Takes one permit if there is one. Whether it did.
    #[track_caller]
    #[must_use = "the permit, if any, must be given back"]
    pub fn try_down<C: Context + ?Sized>(&self, _cx: &mut C) -> bool {
        let site = Location::caller();
        match self.birth.world(site) {
            None => self.take(),
            Some(world) => {
                attempt(world, self.birth, OpKind::TryDown, Some(self.class), site, &|| self.take())
            }
        }
    }

    /// Gives one permit back. Never sleeps; any context.
    #[track_caller]
    pub fn up(&self) {
        let site = Location::caller();
        match self.birth.world(site) {
            None => self.give(),
            Some(world) => {
                release(world, self.birth.op(OpKind::Up, Some(self.class), site), || 0, || self.give());
            }
        }
    }

    fn take(&self) -> bool {
        let mut state = self.state.lock();
        let taken = state.permits > 0;
        state.permits -= usize::from(taken);
        taken
    }

    fn take_or_sleep(&self) {
        let mut state = self.state.lock();
        if state.permits > 0 {
            state.permits -= 1;
            return;
        }
        let waiter = Waiter::new();
        state.waiting.push_back(Arc::clone(&waiter));
        drop(state);
        // Woken, it has the permit: `give` hands it over.
        let _granted = waiter.sleep(None);
    }

    fn give(&self) {
        let mut state = self.state.lock();
        match state.waiting.pop_front() {
            None => state.permits += 1,
            Some(next) => {
                drop(state);
                next.wake();
            }
        }
    }

    /// Its class.
    pub fn class(&self) -> &'static LockClass {
        self.class
    }
}

impl fmt::Debug for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Semaphore({})", self.class.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permit_given_back_goes_to_the_one_who_waits() {
        static CLASS: LockClass = LockClass::new("semaphore-fair");
        let semaphore = Semaphore::new(&CLASS, 0);
        MaySleep::enter(|cx| {
            crate::scope(cx, |s, cx| {
                let waiting = s.spawn("waiting", |cx| semaphore.down(cx));
                while semaphore.state.lock().waiting.is_empty() {
                    crate::yield_now();
                }
                semaphore.up();
                assert!(!semaphore.try_down(cx), "handed over, whether or not the waiter has run yet");
                assert!(waiting.join(cx).is_ok());
                assert!(!semaphore.try_down(cx));
            });
        });
    }
}
