// SPDX-License-Identifier: MIT OR Apache-2.0
//! "Has anything in my range changed since?" in a load or two.
//!
//! # Why it is right
//!
//! The kernel runs the program inside mmu_notifier_invalidate_range_start: in the task that changes the memory, before
//! it touches the page tables. The program's increments are locked read-modify-writes. So when the changing system call
//! has returned to some thread T, the increments are before everything that T does next; a thread that synchronises
//! with T (a lock, an atomic, a join) and then loads the counter sees them, on whatever CPU. Nor need anybody wait for
//! the return: a thread that can *see an effect* of the change (gets the freed address from mmap, reads the new bytes)
//! sees the counter moved, because the counter moved first and the effect is ordered after it by the mm's own locks.
//!
//! The program adds to the buckets first and to the global counter last. A snapshot loads the global counter first and
//! the buckets after it, each with acquire. If a later load finds the global counter where it was, no program has
//! finished since: nothing has changed. If it has moved, the buckets decide: an increment that the snapshot's global
//! count includes is in its bucket sum too; one that it does not include is either in the bucket sum already (it was
//! announced before the snapshot was complete) or moves it (it is reported).
//!
//! A check that runs while a change is being announced may miss it, as with any notifier: the change is then not made
//! yet. What it cannot do is answer "unchanged" about a change that was visible before the check began.
//!
//! # What it does not say
//!
//! It counts *starts*. Between the record and the zap the old page is still there, and whoever pins it then keeps it:
//! see [`Watch::snapshot`].

use super::error::Gone;
use super::layout::Kind;
use super::shared::{ALIVE, Near, Shared, is_short};
use crate::sys::map::Word;
use mmu_notifier::Range;
use mmu_notifier::primary::Count;
use std::sync::Arc;

/// A point in the history of one [`Watch`]. Only that watch understands it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Seq {
    global: u64,
    local: u64,
}

/// The words that say whether one kind of thing happened.
#[derive(Clone, Debug)]
struct Words {
    /// Moves with anything at all: the program's global counter, the case to be fast in. With perf rings the head of
    /// the first, which is never asked alone.
    first: Word,
    rest: Rest,
}

/// What decides if the first word has moved.
#[derive(Clone, Debug)]
enum Rest {
    /// Nothing: it decides alone.
    Nothing,
    /// The buckets of the range, wide ones included.
    Near(Near, u64),
    /// The heads of all perf rings: all of them stand for "anything", so that the first says nothing by itself.
    Heads(Box<[Word]>),
}

/// What no counter reaches: a look at `first` never finds it, so that `rest` always decides.
const NEVER: u64 = u64::MAX;

impl Words {
    /// `None` where there is nothing to look at.
    fn new(shared: &Shared, kind: Kind, range: Range) -> Option<Words> {
        let heads = shared.heads(kind);
        let first = *heads.first()?;
        let near = || Some(Rest::Near(shared.near(kind)?, shared.key(range)?));
        let rest = if heads.len() > 1 { Rest::Heads(heads.into()) } else { near().unwrap_or(Rest::Nothing) };
        Some(Words { first, rest })
    }

    #[inline]
    fn snapshot(&self) -> Seq {
        // The global count before the buckets; see above.
        let global = if matches!(self.rest, Rest::Heads(_)) { NEVER } else { self.first.load() };
        Seq { global, local: self.sum() }
    }

    #[inline]
    fn moved(&self, seq: Seq) -> bool {
        self.first.load() != seq.global && self.rest_moved(seq)
    }

    #[cold]
    fn rest_moved(&self, seq: Seq) -> bool {
        matches!(self.rest, Rest::Nothing) || self.sum() != seq.local
    }

    /// Each word only grows, so the sum moves if and only if one of them does.
    #[inline(never)]
    fn sum(&self) -> u64 {
        match &self.rest {
            Rest::Nothing => 0,
            Rest::Near(near, key) => near.count(*key),
            Rest::Heads(heads) => heads.iter().fold(0, |n, w| n.wrapping_add(w.load())),
        }
    }
}

/// The changes of one range of this process's memory. Cheap to make; share it or make one per thread.
///
/// A look costs two loads while nothing at all changes, and after a change anywhere one for each granule of the range (64 KiB
/// by default). A range of more granules than there are buckets (512 MiB by default) has changed as soon as anything has.
///
/// May be used from any thread and context: no system call, no lock, no allocation once it is made.
#[derive(Clone, Debug)]
pub struct Watch {
    state: Word,
    need: u64,
    unmap: Words,
    age: Option<Words>,
    range: Range,
    /// Keeps mapped what the words point into.
    shared: Arc<Shared>,
}

impl Watch {
    pub(crate) fn new(shared: &Arc<Shared>, range: Range, need: u64, age: bool) -> Result<Watch, Gone> {
        // Empty only where there is no CPU or no map, and then no source was opened.
        let words = |kind| Words::new(shared, kind, range).ok_or(Gone::Closed);
        Ok(Watch {
            state: shared.state_word(need),
            need: need | ALIVE,
            unmap: words(Kind::Unmap)?,
            age: if age { Some(words(Kind::Age)?) } else { None },
            range,
            shared: Arc::clone(shared),
        })
    }

    /// The range.
    pub fn range(&self) -> Range {
        self.range
    }

    /// What has happened so far: to be taken *before* the memory is looked up or pinned.
    ///
    /// This is the counters alone. Somebody who takes a snapshot between the kernel's announcement and its change, and
    /// pins the page that is about to go, hears of it no more; a reader that pins must also pass a barrier of the mm
    /// after its snapshot.
    ///
    /// # Errors
    /// [`Gone`] if the source can no longer tell. Never a snapshot that would look quiet for ever.
    #[inline]
    pub fn snapshot(&self) -> Result<Seq, Gone> {
        self.shared.check(self.need)?;
        Ok(self.unmap.snapshot())
    }

    /// Has anything in the range been invalidated since `seq`, as far as this source can tell ranges apart?
    ///
    /// `true` may be a false alarm (another address in the same bucket, the same address in another process's VM) and
    /// is also the answer when the source is gone; [`Watch::snapshot`] then says why. `false` is a promise.
    #[inline]
    pub fn changed_since(&self, seq: Seq) -> bool {
        // The state first: in a forked child the counters are the parent's, or not mapped at all.
        self.state.load() == 0 || self.unmap.moved(seq)
    }

    /// What [`KvmSource::count`](super::KvmSource::count) answers for as long as nothing has changed since `seq`. `None`
    /// where that is not counted, or in many words.
    pub fn count_at(&self, seq: Seq) -> Option<Count> {
        match self.unmap.rest {
            Rest::Near(_, key) if is_short(key) => Some(Count { key, value: seq.local }),
            _ => None,
        }
    }

    /// As [`Watch::snapshot`], of the ageing of the range; `Ok(None)` if the source was opened without ageing.
    ///
    /// # Errors
    /// [`Gone`] if the source can no longer tell.
    pub fn age_snapshot(&self) -> Result<Option<Seq>, Gone> {
        self.shared.check(self.need)?;
        Ok(self.age.as_ref().map(Words::snapshot))
    }

    /// Have accessed bits of the range been taken since `seq`, a value of [`Watch::age_snapshot`]? `true` if unknown.
    pub fn aged_since(&self, seq: Seq) -> bool {
        self.state.load() == 0 || self.age.as_ref().is_none_or(|age| age.moved(seq))
    }
}
