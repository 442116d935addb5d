// SPDX-License-Identifier: MIT OR Apache-2.0
//! Entries that are read without a lock, and taken apart when nobody reads them any more.
//!
//! A reader *leases* an entry: it writes the entry's index into a lease slot, and only then looks whether the entry
//! is still alive. Whoever takes the entry apart marks it dead first and looks at the slots afterwards. One of the two
//! sees the other:
//!
//! ```text
//! reader                                  taker
//!   slot = index          (SeqCst RMW)      state = Dead         (SeqCst RMW)
//!   state == Live(gen)?   (SeqCst)          any slot == index?   (SeqCst)
//!   no: slot = 0, miss                      yes: later
//!   yes: reads the body                     no: takes the body
//!   slot = 0              (Release)
//! ```
//!
//! Threads have slots of their own (as hazard pointers), so that threads which use the same entry share no line that
//! any of them writes. A thread that finds its slots taken uses others', and at last a count in the entry.
//!
//! Invariants:
//! * the body is written by the owner of an entry in `Free` or `Building`, and read under a lease or by the taker;
//! * Free -> Building -> Live -> Dead -> Free; Building -> Free. Each entry has one owner, except while it is Live:
//!   whoever makes it Dead is the owner. A change to Free adds one to the generation;
//! * a slot holds an entry's index plus one in its low half, and how many leases it has given in its high half. The
//!   latter costs nothing and is what statistics are made of.
//!
//! What a hit reads of an entry is one cache line of words, apart from the bodies: its state, and what the user
//! keeps beside it.

use crate::sync::{AtomicU64, AtomicWord, AtomicWords, Cell, Ordering};

/// Slots in one cache-line pair.
const LINE: usize = 8;
/// The low half of a slot.
const INDEX: u64 = 0xffff_ffff;
/// The lease is counted in the entry.
const COUNTED: u32 = u32::MAX;

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
pub(crate) struct State(u64);

impl State {
    const PHASES: [Phase; 4] = [Phase::Free, Phase::Building, Phase::Live, Phase::Dead];

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

    fn with(self, phase: Phase, marks: u64) -> State {
        State(self.generation() << GENERATION | marks << MARKS | phase as u64)
    }

    fn marks(self) -> u64 {
        self.0 >> MARKS & 3
    }
}

/// Where in the state the marks are, and the generation.
const MARKS: u32 = 2;
const GENERATION: u32 = 4;

/// The words of an entry: a cache line.
const WORDS: usize = 8;
/// Which of them is its state.
const STATE: usize = 0;
/// Leases that found no slot: those that last in the low half, all that were given in the high half.
const GIVEN: usize = 1;
/// Those from here on are the user's.
const USERS: usize = 2;
/// How many are the user's.
pub(crate) const USER_WORDS: usize = WORDS - USERS;

/// Slots of one thread, as far as threads can be told apart.
#[repr(align(128))]
struct Line([AtomicU64; LINE]);

pub(crate) struct Slab<T> {
    words: AtomicWords,
    bodies: Box<[Cell<Option<T>>]>,
    lines: Box<[Line]>,
}

// SAFETY: a body is handed to one thread at a time for writing and to any number for reading, by the protocol above.
unsafe impl<T: Send + Sync> Sync for Slab<T> {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl<T: Send> Send for Slab<T> {}

/// A lease. Neither copied nor forgotten by this crate: an entry whose lease is lost is never taken apart.
#[must_use]
pub(crate) struct Held<'s, T> {
    slab: &'s Slab<T>,
    index: u32,
    slot: u32,
}

impl<T> Slab<T> {
    /// `capacity` entries, and lease slots for about `threads` threads.
    pub(crate) fn new(capacity: usize, threads: usize) -> Slab<T> {
        let line = |_| Line(std::array::from_fn(|_| AtomicU64::new(0)));
        Slab {
            words: AtomicWords::new(capacity * WORDS, 0),
            bodies: (0..capacity).map(|_| Cell::new(None)).collect(),
            lines: (0..threads.max(1).next_power_of_two()).map(line).collect(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.bodies.len()
    }

    #[inline(always)]
    fn word(&self, index: u32, word: usize) -> AtomicWord<'_> {
        self.words.word(index as usize * WORDS + word)
    }

    /// One of the [`USER_WORDS`] of an entry, which anybody may read at any time.
    #[inline(always)]
    pub(crate) fn user_word(&self, index: u32, word: usize) -> AtomicWord<'_> {
        debug_assert!(word < USER_WORDS);
        self.word(index, USERS + word)
    }

    #[inline(always)]
    pub(crate) fn state(&self, index: u32) -> State {
        State(self.word(index, STATE).load(Ordering::SeqCst))
    }

    /// A lease of the entry, if it is still as `seen`, which was Live. `thread` picks the slots to begin with.
    #[inline(always)]
    pub(crate) fn lease(&self, index: u32, seen: State, thread: usize) -> Option<Held<'_, T>> {
        let held = Held { slab: self, index, slot: self.claim(index, thread) };
        // Dropped, a lease in vain gives its slot back.
        (self.state(index) == seen).then_some(held)
    }

    #[inline(always)]
    fn claim(&self, index: u32, thread: usize) -> u32 {
        let mask = self.lines.len() - 1;
        let first = thread & mask;
        for (n, slot) in self.lines[first].0.iter().enumerate() {
            if try_claim(slot, index) {
                return (first * LINE + n) as u32;
            }
        }
        self.claim_elsewhere(index, first)
    }

    #[cold]
    fn claim_elsewhere(&self, index: u32, first: usize) -> u32 {
        let mask = self.lines.len() - 1;
        for line in (1..=mask).map(|n| (first + n) & mask) {
            for (n, slot) in self.lines[line].0.iter().enumerate() {
                if try_claim(slot, index) {
                    return (line * LINE + n) as u32;
                }
            }
        }
        self.word(index, GIVEN).fetch_add(1 << 32 | 1, Ordering::SeqCst);
        COUNTED
    }

    #[inline(always)]
    fn release(&self, index: u32, slot: u32) {
        if slot == COUNTED {
            self.word(index, GIVEN).fetch_sub(1, Ordering::Release);
        } else {
            let slot = &self.lines[slot as usize / LINE].0[slot as usize % LINE];
            // Nobody else writes a slot that is taken. Release: what was read under the lease was read before.
            slot.store(slot.load(Ordering::Relaxed) & !INDEX, Ordering::Release);
        }
    }

    /// Is there a lease? Of a Dead entry `false` is for good.
    pub(crate) fn is_leased(&self, index: u32) -> bool {
        self.word(index, GIVEN).load(Ordering::SeqCst) & INDEX != 0
            || self.slots().any(|slot| slot.load(Ordering::SeqCst) & INDEX == u64::from(index) + 1)
    }

    /// How many leases were given, in vain or not.
    pub(crate) fn leases_given(&self) -> u64 {
        let counted = (0..self.len() as u32).map(|index| self.word(index, GIVEN).load(Ordering::Relaxed));
        self.slots().map(|slot| slot.load(Ordering::Relaxed)).chain(counted).map(|given| given >> 32).sum()
    }

    fn slots(&self) -> impl Iterator<Item = &AtomicU64> {
        self.lines.iter().flat_map(|line| &line.0)
    }

    /// Free -> Building. The caller alone knows of the free entry, and owns it now.
    pub(crate) fn build(&self, index: u32) -> State {
        let word = self.word(index, STATE);
        let state = State(word.load(Ordering::Relaxed));
        debug_assert_eq!(state.phase(), Phase::Free);
        let state = state.with(Phase::Building, 0);
        word.store(state.0, Ordering::Relaxed);
        state
    }

    /// Building -> Live, by the owner, who owns it no longer.
    pub(crate) fn publish(&self, index: u32, body: T, marks: u64) -> State {
        let word = self.word(index, STATE);
        let state = State(word.load(Ordering::Relaxed));
        assert_eq!(state.phase(), Phase::Building, "only the owner of a new entry brings it alive");
        // SAFETY: the entry is being built, so the caller owns it; nobody reads the body before it is Live.
        self.bodies[index as usize].with_mut(|at| unsafe { *at = Some(body) });
        let state = state.with(Phase::Live, marks);
        word.store(state.0, Ordering::SeqCst);
        state
    }

    /// Live -> Dead, if it is still as `seen`: the caller owns it then.
    pub(crate) fn kill(&self, index: u32, seen: State) -> bool {
        let dead = seen.with(Phase::Dead, seen.marks());
        let word = self.word(index, STATE);
        seen.is_live() && word.compare_exchange(seen.0, dead.0, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// The body of a Dead entry, once; `None` while it is leased. By the owner.
    pub(crate) fn take(&self, index: u32) -> Option<T> {
        let word = self.word(index, STATE);
        let state = State(word.load(Ordering::SeqCst));
        assert_eq!(state.phase(), Phase::Dead, "only the owner of a dead entry takes it apart");
        if self.is_leased(index) {
            return None;
        }
        // SAFETY: the entry is dead and no slot holds it, so every reader that saw it alive has released its lease
        // (the slot's Release, our SeqCst load), and none will see it alive. The caller is the one owner.
        self.bodies[index as usize].with_mut(|at| unsafe { (*at).take() })
    }

    /// Building or Dead -> Free, by the owner, who has taken the body.
    pub(crate) fn free(&self, index: u32) {
        let word = self.word(index, STATE);
        let state = State(word.load(Ordering::Relaxed));
        assert!(matches!(state.phase(), Phase::Building | Phase::Dead), "only the owner frees an entry");
        word.store((state.generation() + 1) << GENERATION, Ordering::Release);
    }
}

#[inline(always)]
fn try_claim(slot: &AtomicU64, index: u32) -> bool {
    let free = slot.load(Ordering::Relaxed);
    if free & INDEX != 0 {
        return false;
    }
    let taken = (free + (1 << 32)) | (u64::from(index) + 1);
    // Release as well: it carries on what the last lease in this slot has released, for whoever sees this one.
    slot.compare_exchange(free, taken, Ordering::SeqCst, Ordering::Relaxed).is_ok()
}

impl<'s, T> Held<'s, T> {
    #[inline(always)]
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// What the entry holds.
    #[inline(always)]
    pub(crate) fn body(&self) -> &T {
        let body = self.slab.bodies[self.index as usize].with(|at| {
            // SAFETY: the entry was Live after the slot was taken, so whoever makes it Dead finds the slot and leaves
            // the body in place until `self` is dropped; until then nobody writes it.
            unsafe { &*at }
        });
        match body {
            Some(body) => body,
            None => unreachable!("a Live entry has a body"),
        }
    }
}

impl<T> Drop for Held<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        self.slab.release(self.index, self.slot);
    }
}
