// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hit path: no lock, no allocation, no system call of ours.
//!
//! A hit is: candidate from the [table](super::table), lease, "is the entry as the caller wants it?", "has its
//! range changed since it was registered?" in this order. The last is the source's own check, asked after the lease, so
//! that what is checked is what will be used. The answer "unchanged" is a promise of the source about the moment of the
//! check; afterwards the range is the caller's, who holds the lease and does not give the memory back.
//!
//! What is fast is inlined, and shares no memory with what is not: cold functions take and return what registers hold.

use interleave::{AtomicQuad, Here};
use mmu_notifier::primary::{PrimaryMmu, Subscription};
use mmu_notifier::{Access, Range};

use super::core::{Core, Glance, Leased, Pinned, marks};
use super::head::{Head, NO_ERA, ONCE, WRITE};
use super::slab::{Claim, State};
use crate::device::Device;

/// A lease of what was found.
#[must_use]
pub(super) struct Hit<'c> {
    pub(super) claim: Claim<'c>,
    pub(super) words: AtomicQuad<'c>,
    /// What the entry was when it was leased: its marks stay.
    pub(super) state: State,
}

/// Which changes a lookup may not miss.
#[derive(Clone, Copy)]
pub(super) enum Check {
    /// Those that anybody can have seen: [`Subscription::read_retry`].
    Strict,
    /// Those that returned before: [`Subscription::read_retry_ordered`].
    Ordered,
}

/// May it be shared by whoever wants that access?
#[inline(always)]
fn serves(state: State, access: Access) -> bool {
    state.is_live() && !state.has(ONCE) && (access == Access::Read || state.has(WRITE))
}

impl<M: PrimaryMmu, D: Device<M>> Core<M, D> {
    /// A lease of a registration that contains `want`, allows `access`, and has not changed, if it is the first that is
    /// looked at. Outside exploration only.
    #[inline(always)]
    pub(super) fn hit_at_once(&self, want: Range, access: Access, check: Check) -> Option<Hit<'_>> {
        let here = Here::ask();
        if !here.is_plain() {
            return None;
        }
        let index = self.table.candidate(here, want)?;
        self.try_claim(here, index, want, access, check)
    }

    /// The same of all. From the beginning: so that nothing must be kept for that.
    #[cold]
    #[inline(never)]
    pub(super) fn hit(&self, want: Range, access: Access, check: Check) -> Option<Claim<'_>> {
        let here = Here::ask();
        let mut candidates = self.table.candidates(here, want);
        candidates.find_map(|index| self.try_claim(here, index, want, access, check)).map(|hit| hit.claim)
    }

    /// What was leased, as a hit.
    #[inline(always)]
    pub(super) fn hit_of<'c>(&'c self, claim: Claim<'c>) -> Hit<'c> {
        Hit { words: self.slab.words(claim.index()), state: self.state_of(&claim), claim }
    }

    /// As it was when it was leased, for the marks.
    #[cold]
    #[inline(never)]
    fn state_of(&self, claim: &Claim<'_>) -> State {
        let registration = self.slab.body(claim);
        State::live(marks(registration.rights) | if registration.watched.is_some() { 0 } else { ONCE })
    }

    /// A lease of this very entry.
    pub(super) fn try_lease(
        &self,
        index: u32,
        want: Range,
        access: Access,
        check: Check,
    ) -> Option<Leased<'_, M, D>> {
        self.try_claim(Here::ask(), index, want, access, check).map(|hit| self.slab.keep(hit.claim))
    }

    /// As [`hit_at_once`](Self::hit_at_once), of what is pinned, with an entry that could contain `want`, as of when `era`
    /// was the [ordered era](PrimaryMmu::era_ordered).
    #[inline(always)]
    pub(super) fn look<'p>(
        &'p self,
        here: Here,
        pin: &'p Pinned<'_, M, D>,
        index: u32,
        want: Range,
        access: Access,
        era: u64,
    ) -> Option<Glance<'p, M, D>> {
        let seen = pin.see(here, index)?;
        let head = Head(seen.words());
        let stands =
            serves(seen.state(), access) && head.pages(here).contain(want) && self.stands(here, head, || era);
        stands.then_some(seen)
    }

    /// The same of all.
    #[cold]
    #[inline(never)]
    pub(super) fn look_again<'p>(
        &'p self,
        pin: &'p Pinned<'_, M, D>,
        want: Range,
        access: Access,
    ) -> Option<Glance<'p, M, D>> {
        let found = self.hit(want, access, Check::Ordered)?;
        self.counters.in_vain.add(1);
        let (here, index) = (Here::ask(), found.index());
        self.slab.end(here, found);
        self.ended(here, self.slab.words(index));
        pin.see(here, index).filter(|seen| seen.state().is_live())
    }

    #[inline(always)]
    fn try_claim(
        &self,
        here: Here,
        index: u32,
        want: Range,
        access: Access,
        check: Check,
    ) -> Option<Hit<'_>> {
        let words = self.slab.words(index);
        let (state, head) = (State::of(here, words), Head(words));
        if !head.pages(here).contain(want) || !serves(state, access) {
            return None;
        }
        // The state is looked at once more, so that the pages were this life's.
        let Some(claim) = self.slab.claim(here, index, words, state) else {
            self.in_vain();
            return None;
        };
        if self.stands(here, head, || self.era(check)) {
            return Some(Hit { claim, words, state });
        }
        self.doubted(claim, state, check).map(|claim| Hit { claim, words, state })
    }

    /// A lease was taken and is no hit.
    #[cold]
    #[inline(never)]
    fn in_vain(&self) {
        self.counters.in_vain.add(1);
    }

    /// Has an entry that is leased not changed, as far as can be said without its registration? As long as the mm counts
    /// of the range what it counted when that was registered. Where it does not count so, as long as nothing at all has
    /// changed since the range was last found in order, which must be written down in the entry, whose line threads
    /// share, after every change anywhere. What stands is used.
    #[inline(always)]
    fn stands(&self, here: Here, head: Head<'_>, era: impl FnOnce() -> u64) -> bool {
        let key = head.key(here);
        let stamp = head.stamp(here);
        let stands = match key.get() {
            Some(key) => self.mm.count(key) == Some(stamp),
            None => era() == stamp,
        };
        if stands {
            head.touch(here, key);
        }
        stands
    }

    /// [`NO_ERA`] if the mm has none.
    #[inline(always)]
    pub(super) fn era(&self, check: Check) -> u64 {
        let era = match check {
            Check::Strict => self.mm.era(),
            Check::Ordered => self.mm.era_ordered(),
        };
        era.unwrap_or(NO_ERA)
    }

    /// The source's own check, of an entry that is leased.
    #[inline(never)]
    fn doubted<'c>(&'c self, found: Claim<'c>, seen: State, check: Check) -> Option<Claim<'c>> {
        let index = found.index();
        let era = self.era(check);
        let changed = self.slab.body(&found).watched.as_ref().is_none_or(|w| match check {
            Check::Strict => w.subscription.read_retry(w.seq),
            Check::Ordered => w.subscription.read_retry_ordered(w.seq),
        });
        if changed {
            self.slab.end(Here::ask(), found);
            self.stale(index, seen);
            return None;
        }
        let head = self.head(index);
        // The era was read before the sequence, as the mm wants it. The lease keeps the entry from being another.
        let key = head.key(Here::ask());
        if era != NO_ERA && key.get().is_none() {
            head.set_stamp(era);
        }
        head.touch(Here::ask(), key);
        Some(found)
    }

    /// Found to be out of date at a lookup.
    #[cold]
    fn stale(&self, index: u32, state: State) {
        self.counters.in_vain.add(1);
        // A forked child finds everything out of date, and wakes nobody: the reaper is its parent's.
        if self.at_home() && self.kill(index, state) {
            self.counters.stale.add(1);
        }
    }
}
