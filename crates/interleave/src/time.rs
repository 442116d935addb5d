// SPDX-License-Identifier: MIT OR Apache-2.0
//! Time: the monotonic clock, or the virtual one under exploration.

use std::ops::{Add, Sub};
use std::sync::OnceLock;
use std::time::Duration;

use crate::world::{self, OpKind};
use crate::{MaySleep, might_sleep};

/// A moment, of the clock of the world that it was read in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

/// The present moment.
#[track_caller]
pub fn now() -> Instant {
    static START: OnceLock<std::time::Instant> = OnceLock::new();
    match world::note(OpKind::Now) {
        None => Instant(START.get_or_init(std::time::Instant::now).elapsed()),
        Some(world) => Instant(world.now()),
    }
}

/// Sleeps for at least `duration`.
#[track_caller]
pub fn sleep(_cx: &mut MaySleep<'_>, duration: Duration) {
    might_sleep();
    if world::active().is_none() {
        std::thread::sleep(duration);
    } else {
        world::note(OpKind::Sleep(duration));
    }
}

impl Instant {
    /// The time since then.
    #[track_caller]
    pub fn elapsed(self) -> Duration {
        now() - self
    }
}

impl Sub for Instant {
    type Output = Duration;

    /// The time since `earlier`; zero if it is later.
    fn sub(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    /// The moment `duration` later, or the last moment of the clock.
    fn add(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_add(duration))
    }
}
