// SPDX-License-Identifier: MIT OR Apache-2.0
//! Values that are set once.
use std::sync::OnceLock;

use crate::{MaySleep, might_sleep};

/// A value that is set once.
#[derive(Debug, Default)]
pub struct OnceCell<T> {
    value: OnceLock<T>,
}

impl<T> OnceCell<T> {
    /// An empty cell.
    #[track_caller]
    pub fn new() -> Self {
        Self::const_new()
    }

    /// An empty cell in a static.
    pub const fn const_new() -> Self {
        OnceCell { value: OnceLock::new() }
    }

    /// The value, if it is set.
    #[track_caller]
    pub fn get(&self) -> Option<&T> {
        self.value.get()
    }

    /// The value; the first caller makes it, and others sleep meanwhile.
    #[track_caller]
    pub fn get_or_init(&self, cx: &mut MaySleep<'_>, f: impl FnOnce(&mut MaySleep<'_>) -> T) -> &T {
        might_sleep();
        self.value.get_or_init(|| f(cx))
    }
}
