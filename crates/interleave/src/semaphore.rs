// SPDX-License-Identifier: MIT OR Apache-2.0
//! The counting semaphore.
use parking_lot::{Condvar, Mutex};

use crate::{Context, LockClass, MaySleep, might_sleep};

/// A count that nobody owns: any thread may give back what another took.
pub struct Semaphore {
    permits: Mutex<usize>,
    freed: Condvar,
    class: &'static LockClass,
}

impl Semaphore {
    /// A semaphore with `permits` to give.
    pub fn new(class: &'static LockClass, permits: usize) -> Self {
        Semaphore { permits: Mutex::new(permits), freed: Condvar::new(), class }
    }

    /// Takes one permit, sleeping until there is one.
    #[track_caller]
    pub fn down(&self, _cx: &mut MaySleep<'_>) {
        might_sleep();
        let mut permits = self.permits.lock();
        while *permits == 0 {
            self.freed.wait(&mut permits);
        }
        *permits -= 1;
    }

    /// Takes one permit if there is one.
    #[track_caller]
    pub fn try_down<C: Context + ?Sized>(&self, _cx: &mut C) -> bool {
        let mut permits = self.permits.lock();
        let got = *permits > 0;
        *permits -= usize::from(got);
        got
    }

    /// Gives one permit back. Never sleeps.
    #[track_caller]
    pub fn up(&self) {
        *self.permits.lock() += 1;
        self.freed.notify_one();
    }

    /// Its class.
    pub fn class(&self) -> &'static LockClass {
        self.class
    }
}
