// SPDX-License-Identifier: MIT OR Apache-2.0
//! What executions saw, for a verdict of "safe" to be worth something.

use drivers::{BindError, Callback, Counts, DriverError};
use std::fmt;

/// What executions saw, all together: a verdict of "safe" is worth nothing if nothing happened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts {
    /// Why the driver does not take this memory at all.
    pub refused: Option<Refusal>,
    /// Callbacks run, by kind.
    pub callbacks: [u64; Callback::ALL.len()],
    /// Of these, those that had an effect.
    pub effects: [u64; Callback::ALL.len()],
    /// Words that the device read or wrote.
    pub accesses: u64,
    /// Pages got and thrown away because something had changed meanwhile.
    pub retries: u64,
    /// Pages that the driver took from the device.
    pub unbinds: u64,
    /// Pages got again.
    pub repins: u64,
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The driver was not opened.
    Open(drivers::OpenError),
    /// The memory was not bound.
    Bind(BindError),
    /// The first access failed.
    Access(DriverError),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Open(error) => error.fmt(f),
            Refusal::Bind(error) => error.fmt(f),
            Refusal::Access(error) => error.fmt(f),
        }
    }
}

impl Facts {
    /// Adds what another exploration saw.
    pub fn merge(&mut self, other: &Facts) {
        self.refused = self.refused.or(other.refused);
        for kind in Callback::ALL {
            self.callbacks[kind as usize] += other.callbacks[kind as usize];
            self.effects[kind as usize] += other.effects[kind as usize];
        }
        self.accesses += other.accesses;
        self.retries += other.retries;
        self.unbinds += other.unbinds;
        self.repins += other.repins;
    }

    /// Callbacks that were run and never had an effect.
    pub fn dead(&self) -> impl Iterator<Item = Callback> {
        let dead = |kind: &Callback| self.callbacks[*kind as usize] > 0 && self.effects[*kind as usize] == 0;
        Callback::ALL.into_iter().filter(dead)
    }

    pub(crate) fn add(&mut self, counts: &Counts) {
        for kind in Callback::ALL {
            self.callbacks[kind as usize] += counts.callbacks(kind);
            self.effects[kind as usize] += counts.effects(kind);
        }
        self.accesses += counts.accesses;
        self.retries += counts.retries;
        self.unbinds += counts.unbinds;
        self.repins += counts.repins;
    }
}
