// SPDX-License-Identifier: MIT OR Apache-2.0
//! Entries that are read without a lock, and taken apart when nobody reads them any more.
//!
//! A reader *leases* an entry: it writes the entry's index into a lease slot, and only then looks whether the entry
//! is still alive. Whoever takes the entry apart marks it dead first and looks at the slots afterwards. One of the two
//! sees the other:
//!
//! ```text
//! reader                                  taker
//!   slot = index          (Release)         state = Dead         (SeqCst RMW)
//!   light fence                             heavy fence
//!   state == Live(gen)?   (Acquire)         any slot == index?   (Acquire)
//!   no: slot = 0, miss                      yes: later
//!   yes: reads the body                     no: takes the body
//!   slot = 0              (Release)
//! ```
//!
//! The [fence](interleave::AsymmetricFence) costs the reader nothing where the system can make it so; the taker passes
//! one for as many entries as he takes at a time.
//!
//! Each thread has slots that nobody else claims (as hazard pointers), up to as many threads as the slab was made for:
//! a claim is a plain store, and threads that use the same entry share no line that any of them writes. A thread
//! without slots, or with more leases than slots, claims one of those that all share, by compare-exchange, and at last a
//! count in the entry. A lease may end in any thread: it alone writes a slot that is taken.
//!
//! A [pin] is a lease of whatever is alive meanwhile.
//!
//! Invariants:
//! * the body is written by the owner of an entry in `Free` or `Building`, and read under a lease or by the taker;
//! * Free -> Building -> Live -> Dead -> Free; Building -> Free. Each entry has one owner, except while it is Live:
//!   whoever makes it Dead is the owner. A change to Free adds one to the generation;
//! * a slot holds an entry's index plus one, a pin's epoch with its mark, or 0; a line of slots counts the leases that were given there, which is what
//!   statistics are made of.
//!
//! What a hit reads of an entry is half a cache line, apart from the bodies and from what is seldom asked: its state, and
//! what the user keeps beside it.

mod pin;
mod state;

use crate::sync::{
    AsymmetricFence, AtomicQuad, AtomicU64, AtomicWord, AtomicWords, Cell, Here, NoBarrier, Ordering, SLOTS,
};

pub(crate) use pin::{Pin, Seen};
use state::{GENERATION, STATE};
pub(crate) use state::{Phase, State};

/// The low half of what is [counted](Slab::given).
const LASTING: u64 = 0xffff_ffff;

/// The words of an entry.
const WORDS: usize = 4;
/// Of these, those from here on are the user's; before them is its state.
pub(crate) const USERS: usize = 1;

/// Slots of one thread, or of all: a pair of cache lines.
#[repr(align(128))]
struct Line {
    slots: [AtomicU64; SLOTS],
    /// Leases given.
    given: AtomicU64,
}

pub(crate) struct Slab<T> {
    words: AtomicWords,
    /// Leases of each entry that found no slot: those that last in the low half, all that were given in the high half.
    given: AtomicWords,
    bodies: Box<[Cell<Option<T>>]>,
    /// Line `n` is claimed by thread `n` only.
    lines: Box<[Line]>,
    /// Claimed by everybody.
    shared: Line,
    /// Stands for the slot of a lease that is counted in its entry.
    counted: AtomicU64,
    /// Pins that found no slot: they keep whatever there is.
    pins: AtomicU64,
    /// How often dead entries have been [counted](Slab::count_dead).
    epoch: AtomicU64,
    fence: AsymmetricFence,
}

// SAFETY: a body is handed to one thread at a time for writing and to any number for reading, by the protocol above.
unsafe impl<T: Send + Sync> Sync for Slab<T> {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl<T: Send> Send for Slab<T> {}

/// A lease, until it is [ended](Slab::end); lost, its entry is never taken apart. It has no destructor, and is two words
/// that functions pass in registers: on the way to a hit nothing of it is ever in memory.
#[must_use]
pub(crate) struct Claim<'s> {
    index: usize,
    slot: &'s AtomicU64,
}

/// A dead entry, and the epoch that ended after its death.
pub(crate) struct Dead {
    pub(crate) index: u32,
    epoch: u64,
}

/// Why dead entries that were to be taken have not been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kept {
    /// At least one by nothing but pins.
    pub(crate) by_pins: bool,
}

/// A lease that ends when it is dropped.
#[must_use]
pub(crate) struct Held<'s, T> {
    slab: &'s Slab<T>,
    /// `None`: somebody else ends it.
    claim: Option<Claim<'s>>,
}

impl<T> Slab<T> {
    /// `capacity` entries, and lease slots of their own for the first `threads` threads.
    pub(crate) fn new(capacity: usize, threads: usize) -> Slab<T> {
        let line = || Line { slots: std::array::from_fn(|_| AtomicU64::new(0)), given: AtomicU64::new(0) };
        Slab {
            words: AtomicWords::new(capacity * WORDS, 0),
            given: AtomicWords::new(capacity, 0),
            bodies: (0..capacity).map(|_| Cell::new(None)).collect(),
            lines: (0..threads).map(|_| line()).collect(),
            shared: line(),
            counted: AtomicU64::new(0),
            pins: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            fence: AsymmetricFence::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.bodies.len()
    }

    /// All words of an entry. Those from [`USERS`] on are the user's, and anybody may read them at any time.
    #[inline(always)]
    pub(crate) fn words(&self, index: u32) -> AtomicQuad<'_> {
        self.words.quad(index as usize)
    }

    /// As [`words`](Self::words), if there is such an entry.
    #[inline(always)]
    pub(crate) fn get_words(&self, index: u32) -> Option<AtomicQuad<'_>> {
        self.words.get_quad(index as usize)
    }

    fn state_word(&self, index: u32) -> AtomicWord<'_> {
        self.words(index).word(STATE)
    }

    fn given(&self, index: u32) -> AtomicWord<'_> {
        self.given.word(index as usize)
    }

    pub(crate) fn state(&self, index: u32) -> State {
        State::of(Here::ask(), self.words(index))
    }

    /// A lease of the entry, which has these words, if it is still as `seen`, which was Live. What the words were between
    /// the two looks at its state, read with acquire, they are of the same life.
    #[inline(always)]
    pub(crate) fn claim<'s>(
        &'s self,
        here: Here,
        index: u32,
        words: AtomicQuad<'s>,
        seen: State,
    ) -> Option<Claim<'s>> {
        let slot = self.own_slot(here, here.known_thread(), u64::from(index) + 1);
        let slot = slot.unwrap_or_else(|| self.another_slot(index));
        self.confirmed(here, Claim { index: index as usize, slot }, words, seen)
    }

    /// As [`claim`](Self::claim), for who is in no hurry.
    pub(crate) fn lease(&self, index: u32, seen: State) -> Option<Held<'_, T>> {
        self.claim(Here::ask(), index, self.words(index), seen).map(|claim| self.keep(claim))
    }

    /// As [`lease`](Self::lease), by a thread that shall not get slots of its own: one that comes seldom.
    pub(crate) fn lease_shared(&self, index: u32, seen: State) -> Option<Held<'_, T>> {
        let slot = self.shared_slot(u64::from(index) + 1).unwrap_or_else(|| self.no_slot(index));
        let claim = Claim { index: index as usize, slot };
        self.confirmed(Here::ask(), claim, self.words(index), seen).map(|claim| self.keep(claim))
    }

    #[inline(always)]
    fn confirmed<'s>(
        &'s self,
        here: Here,
        claim: Claim<'s>,
        words: AtomicQuad<'s>,
        seen: State,
    ) -> Option<Claim<'s>> {
        self.fence.light();
        if State::of(here, words) == seen {
            return Some(claim);
        }
        self.end(here, claim);
        None
    }

    /// One of those that `thread`, which is the caller, alone claims.
    #[inline(always)]
    fn own_slot(&self, here: Here, thread: usize, value: u64) -> Option<&AtomicU64> {
        let line = self.lines.get(thread)?;
        for slot in &line.slots {
            // Acquire and Release: what the last lease in this slot has released, wherever it ended, is carried on for
            // whoever sees this one.
            if slot.load_here(here, Ordering::Acquire) == 0 {
                slot.store_here(here, value, Ordering::Release);
                let given = line.given.load_here(here, Ordering::Relaxed);
                line.given.store_here(here, given + 1, Ordering::Relaxed);
                return Some(slot);
            }
        }
        None
    }

    /// For a thread that has no slots, or none left, or does not know yet.
    #[cold]
    #[inline(never)]
    fn another_slot(&self, index: u32) -> &AtomicU64 {
        self.any_slot(Here::ask(), u64::from(index) + 1).unwrap_or_else(|| self.no_slot(index))
    }

    /// One of the caller's own if it has some, else one of those that all share.
    fn any_slot(&self, here: Here, value: u64) -> Option<&AtomicU64> {
        let own = here.thread().and_then(|thread| self.own_slot(here, thread, value));
        own.or_else(|| self.shared_slot(value))
    }

    fn shared_slot(&self, value: u64) -> Option<&AtomicU64> {
        let free = self.shared.slots.iter().find(|slot| {
            slot.load(Ordering::Relaxed) == 0
                && slot.compare_exchange(0, value, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })?;
        self.shared.given.fetch_add(1, Ordering::Relaxed);
        Some(free)
    }

    fn no_slot(&self, index: u32) -> &AtomicU64 {
        self.given(index).fetch_add(1 << 32 | 1, Ordering::AcqRel);
        &self.counted
    }

    /// Ends a lease, in any thread.
    #[inline(always)]
    pub(crate) fn end(&self, here: Here, claim: Claim<'_>) {
        if std::ptr::eq(claim.slot, &raw const self.counted) {
            return self.end_counted(claim.index());
        }
        // Nobody else writes a slot that is taken. Release: what was read under the lease was read before.
        claim.slot.store_here(here, 0, Ordering::Release);
    }

    /// From here on it ends by itself.
    pub(crate) fn keep<'s>(&'s self, claim: Claim<'s>) -> Held<'s, T> {
        Held { slab: self, claim: Some(claim) }
    }

    /// What a leased entry holds.
    ///
    /// # Panics
    /// If the lease is of another slab.
    pub(crate) fn body<'c>(&'c self, claim: &'c Claim<'_>) -> &'c T {
        let is_ours = |line: &Line| line.slots.iter().any(|slot| std::ptr::eq(slot, claim.slot));
        let ours = std::ptr::eq(claim.slot, &raw const self.counted) || self.lines().any(is_ours);
        assert!(ours, "a lease of another slab");
        let body = self.bodies[claim.index].with(|at| {
            // SAFETY: the entry was Live after the slot was taken, so whoever makes it Dead finds the slot and leaves
            // the body in place until the lease ends, which consumes what is borrowed here; until then nobody writes it.
            unsafe { &*at }
        });
        match body {
            Some(body) => body,
            None => unreachable!("a Live entry has a body"),
        }
    }

    #[cold]
    #[inline(never)]
    fn end_counted(&self, index: u32) {
        self.given(index).fetch_sub(1, Ordering::Release);
    }

    /// Is there a lease? As far as its slot is to be seen: a hint, but for what has been dead since before a heavy fence.
    /// Of that `false` is for good.
    pub(crate) fn is_leased(&self, index: u32) -> bool {
        self.given(index).load(Ordering::Acquire) & LASTING != 0
            || self
                .lines()
                .flat_map(|line| &line.slots)
                .any(|slot| slot.load(Ordering::Acquire) == u64::from(index) + 1)
    }

    /// How many leases and pins were given, in vain or not.
    pub(crate) fn leases_given(&self) -> u64 {
        let counted = (0..self.len() as u32).map(|index| self.given(index).load(Ordering::Relaxed) >> 32);
        self.lines().map(|line| line.given.load(Ordering::Relaxed)).chain(counted).sum()
    }

    fn lines(&self) -> impl Iterator<Item = &Line> {
        self.lines.iter().chain(std::iter::once(&self.shared))
    }

    /// Free -> Building. The caller alone knows of the free entry, and owns it now.
    pub(crate) fn build(&self, index: u32) -> State {
        let word = self.state_word(index);
        let state = State(word.load(Ordering::Relaxed));
        debug_assert_eq!(state.phase(), Phase::Free);
        let state = state.with(Phase::Building, 0);
        word.store(state.0, Ordering::Relaxed);
        state
    }

    /// Building -> Live, by the owner, who owns it no longer.
    pub(crate) fn publish(&self, index: u32, body: T, marks: u64) -> State {
        let word = self.state_word(index);
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
        let word = self.state_word(index);
        seen.is_live() && word.compare_exchange(seen.0, dead.0, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// Ends an epoch after the death of `dead`, which are the caller's.
    pub(crate) fn count_dead(&self, dead: impl Iterator<Item = u32>, into: &mut Vec<Dead>) {
        let before = into.len();
        into.extend(dead.map(|index| Dead { index, epoch: 0 }));
        let new = &mut into[before..];
        if new.is_empty() {
            return;
        }
        for dead in new.iter() {
            let state = State(self.state_word(dead.index).load(Ordering::SeqCst));
            assert_eq!(state.phase(), Phase::Dead, "only the owner of a dead entry takes it apart");
        }
        let epoch = self.epoch.fetch_add(1, Ordering::AcqRel);
        new.iter_mut().for_each(|dead| dead.epoch = epoch);
    }

    /// Takes the bodies of those of the dead entries that nobody leases, once each; the others stay in `dead`. By their
    /// owner.
    ///
    /// # Errors
    /// [`NoBarrier`]: who leases them cannot be told, and all stay.
    pub(crate) fn take(
        &self,
        dead: &mut Vec<Dead>,
        mut taken: impl FnMut(u32, T),
    ) -> Result<Kept, NoBarrier> {
        let mut kept = Kept::default();
        if dead.is_empty() {
            return Ok(kept);
        }
        self.fence.heavy()?;
        let oldest = self.oldest_pin();
        dead.retain(|dead| {
            if self.is_leased(dead.index) {
                return true;
            }
            if oldest.is_some_and(|oldest| oldest <= dead.epoch) {
                kept.by_pins = true;
                return true;
            }
            // SAFETY: the entry has been dead since before the heavy fence, no slot holds it, and no pin is of its epoch or
            // before: every reader that saw it alive had written its slot before the fence and has ended (the slot's
            // Release, our Acquire), and none will see it alive, nor has one that pinned in a later epoch. The caller is
            // the one owner.
            let body = self.bodies[dead.index as usize].with_mut(|at| unsafe { (*at).take() });
            let body = body.unwrap_or_else(|| unreachable!("a body is taken once"));
            taken(dead.index, body);
            false
        });
        Ok(kept)
    }

    /// Building or Dead -> Free, by the owner, who has taken the body.
    pub(crate) fn free(&self, index: u32) {
        let word = self.state_word(index);
        let state = State(word.load(Ordering::Relaxed));
        assert!(matches!(state.phase(), Phase::Building | Phase::Dead), "only the owner frees an entry");
        word.store((state.generation() + 1) << GENERATION, Ordering::Release);
    }
}

impl Claim<'_> {
    #[inline(always)]
    pub(crate) fn index(&self) -> u32 {
        self.index as u32
    }
}

impl<'s, T> Held<'s, T> {
    /// What the entry holds.
    pub(crate) fn body(&self) -> &T {
        self.claim.as_ref().map_or_else(|| unreachable!("it is kept"), |claim| self.slab.body(claim))
    }

    /// Whoever has it from here on ends it.
    pub(crate) fn claim(mut self) -> Claim<'s> {
        self.claim.take().unwrap_or_else(|| unreachable!("it is kept"))
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take() {
            self.slab.end(Here::ask(), claim);
        }
    }
}
