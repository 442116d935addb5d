// SPDX-License-Identifier: MIT OR Apache-2.0
//! Time.
use std::ops::Sub;
use std::time::Duration;

use crate::{MaySleep, might_sleep};

/// A moment of the monotonic clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

/// The present moment.
#[track_caller]
pub fn now() -> Instant {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    Instant(START.get_or_init(std::time::Instant::now).elapsed())
}

/// Sleeps for at least `duration`.
#[track_caller]
pub fn sleep(_cx: &mut MaySleep<'_>, duration: Duration) {
    might_sleep();
    std::thread::sleep(duration);
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
    fn sub(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, d: Duration) -> Instant {
        Instant(self.0.saturating_add(d))
    }
}
