// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an entry is: its phase, how often it has been another, and the marks of its user. One word.

use crate::sync::{AtomicQuad, Here, Ordering};

/// Where in the state the marks are, and the generation.
const MARKS: u32 = 2;
pub(super) const GENERATION: u32 = 4;

/// Which of the words of an entry it is.
pub(super) const STATE: usize = 0;

/// Where an entry is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Free,
    Building,
    Live,
    Dead,
}

/// Phase and generation of an entry, and the marks that its user gave it when it came alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State(pub(super) u64);

impl State {
    const PHASES: [Phase; 4] = [Phase::Free, Phase::Building, Phase::Live, Phase::Dead];

    /// Alive, with these marks, in some life.
    pub(crate) fn live(marks: u64) -> State {
        State(0).with(Phase::Live, marks)
    }

    /// Of the entry with these words.
    #[inline(always)]
    pub(crate) fn of(here: Here, words: AtomicQuad<'_>) -> State {
        State(words.word(STATE).load_here(here, Ordering::Acquire))
    }

    #[inline]
    pub(crate) fn phase(self) -> Phase {
        Self::PHASES[(self.0 & 3) as usize]
    }

    #[inline(always)]
    pub(crate) fn is_live(self) -> bool {
        self.0 & 3 == Phase::Live as u64
    }

    /// Did the user give it this mark, one of bits 0 and 1?
    #[inline(always)]
    pub(crate) fn has(self, mark: u64) -> bool {
        self.0 & mark << MARKS != 0
    }

    #[inline]
    pub(crate) fn generation(self) -> u64 {
        self.0 >> GENERATION
    }

    pub(super) fn with(self, phase: Phase, marks: u64) -> State {
        State(self.generation() << GENERATION | marks << MARKS | phase as u64)
    }

    pub(super) fn marks(self) -> u64 {
        self.0 >> MARKS & 3
    }
}
