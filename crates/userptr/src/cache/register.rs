// SPDX-License-Identifier: MIT OR Apache-2.0
//! The miss path: make room, listen, get the pages, map them, and let others find them.
//!
//! ```text
//! reserve an entry and bytes             books; evict, reap
//! subscribe                              before the pages are got
//! seq = read_begin
//! get_pages, map                         the device's locks
//! read_retry(seq)? undo, again           a change in between: what was got may be the past
//! publish                                books
//! told meanwhile? kill, again            the callback found nobody alive to kill
//! ```
//!
//! The device is not used through the mapping before `publish`, so it may show the past until then.
//! Exactly the caller's pages are registered, never their neighbours: userfaultfd tells of MADV_DONTNEED before the
//! pages go, and a neighbour that is given up at this moment could be got and never be heard of again.

use std::sync::Arc;

use interleave::{MaySleep, Ordering, Sleep, fence};
use mmu_notifier::primary::{Invalidate, PrimaryMmu, SeqMoved, SetSeq, Subscription};
use mmu_notifier::{Access, Gone, Invalidation, Range, WouldBlock};

use super::Reaper;
use super::core::{Core, Leased, Registration, Watched, marks};
use super::error::CacheError;
use super::head::{ONCE, WRITE};
use super::hit::Check;
use crate::device::{Device, DeviceError};

/// Changes that are followed before the range is registered for one lease: somebody changes it all the time, or others'
/// changes cannot be told from its own.
const ATTEMPTS: u32 = 32;

/// How it ended.
enum Attempt<'c, M: PrimaryMmu, D: Device<M>> {
    Done(Leased<'c, M, D>),
    Changed,
    /// Registrations must go first; what happens if none can.
    NoRoom(CacheError),
    /// Nobody would hear its changes.
    Unheard(String),
}

/// An entry and bytes that are nobody else's yet.
struct Reserved {
    index: u32,
    range: Range,
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> Core<M, D> {
    /// A lease of `want`, which was not found.
    pub(super) fn register(
        self: &Arc<Self>,
        cx: &mut MaySleep<'_>,
        want: Range,
        access: Access,
    ) -> Result<Leased<'_, M, D>, CacheError> {
        if !self.at_home() {
            return Err(CacheError::Forked);
        }
        // Where nobody else reaps, those who miss do.
        if self.options.reaper == Reaper::Manual {
            self.reap(cx);
        }
        // The hit path misses entries that are being moved.
        if let Some(held) = self.hit_in_books(cx, want, access) {
            return Ok(held);
        }
        if !self.admission.admits(self.options.admit, want, access) {
            return self.one_shot(cx, want, access);
        }
        for _ in 0..ATTEMPTS {
            match self.attempt(cx, want, access) {
                Ok(Attempt::Done(held)) => return Ok(held),
                Ok(Attempt::Changed) => self.counters.retried.add(1),
                Ok(Attempt::NoRoom(error)) => {
                    if !self.make_room(cx) {
                        self.counters.failed.add(1);
                        return Err(error);
                    }
                }
                Ok(Attempt::Unheard(why)) => {
                    self.counters.unheard.add(1);
                    self.books.lock(cx).warning = Some(why);
                    break;
                }
                Err(error) => {
                    self.counters.failed.add(1);
                    return Err(error);
                }
            }
        }
        self.one_shot(cx, want, access)
    }

    fn hit_in_books(&self, cx: &mut MaySleep<'_>, want: Range, access: Access) -> Option<Leased<'_, M, D>> {
        let books = self.books.lock(cx);
        // Over a source that tells late, only the first check of the caller counts; the caller has made it.
        let held = books
            .ranges
            .overlaps(want)
            .find_map(|(_, _, index)| self.try_lease(*index, want, access, Check::Ordered));
        drop(books);
        let held = held?;
        // The strict question may wait for an event to be read: not with the books open.
        let moved = held.body().watched.as_ref().is_none_or(|w| w.subscription.read_retry(w.seq));
        if moved {
            self.counters.in_vain.add(1);
            return None;
        }
        Some(held)
    }

    fn attempt(
        self: &Arc<Self>,
        cx: &mut MaySleep<'_>,
        want: Range,
        access: Access,
    ) -> Result<Attempt<'_, M, D>, CacheError> {
        let reserved = match self.reserve(cx, want) {
            Ok(reserved) => reserved,
            Err(full) => return Ok(Attempt::NoRoom(full)),
        };
        let generation = self.slab.build(reserved.index).generation();
        let callback = Changed { core: Arc::clone(self), index: reserved.index, generation };
        let built = match self.mm.subscribe(cx, want, Arc::new(callback)) {
            Ok(subscription) => self.build(cx, subscription, want, access),
            Err(error) => Ok(Err(Attempt::Unheard(error.to_string()))),
        };
        match built {
            Ok(Ok(registration)) => Ok(self.publish(cx, &reserved, registration)),
            Ok(Err(attempt)) => {
                self.unreserve(cx, &reserved);
                Ok(attempt)
            }
            Err(error) => {
                self.unreserve(cx, &reserved);
                Err(error)
            }
        }
    }

    /// The pages of a subscribed range, mapped, at a sequence that stood.
    #[expect(
        clippy::type_complexity,
        reason = "what was built, or how else the attempt ends, or that it failed"
    )]
    fn build(
        &self,
        cx: &mut MaySleep<'_>,
        subscription: M::Subscription,
        want: Range,
        access: Access,
    ) -> Result<Result<Registration<M, D>, Attempt<'static, M, D>>, CacheError> {
        let seq = match subscription.read_begin(cx) {
            Ok(seq) => seq,
            // The range was unmapped since it was subscribed to, or the source is gone: to subscribe again will tell.
            Err(Gone::Closed { .. }) => return Ok(Err(Attempt::Changed)),
            Err(Gone::Forked) => return Err(CacheError::Forked),
            Err(gone) => return Err(gone.into()),
        };
        let mapping = match self.map(cx, want, access) {
            Ok(mapping) => mapping,
            Err(error) if is_full(&error) => return Ok(Err(Attempt::NoRoom(error.into()))),
            Err(error) => return Err(error.into()),
        };
        if subscription.read_retry(seq) {
            self.unmap(cx, mapping, access);
            return Ok(Err(Attempt::Changed));
        }
        let rights = self.device.rights(access);
        let watched = Some(Watched { subscription, seq });
        Ok(Ok(Registration { range: want, rights, mapping, watched }))
    }

    fn map(&self, cx: &mut MaySleep<'_>, want: Range, access: Access) -> Result<D::Mapping, DeviceError> {
        let pages = self.device.get_pages(cx, &self.mm, want, access)?;
        self.device.map(cx, pages, None).map_err(|(error, pages)| {
            self.device.put_pages(cx, pages, false);
            error
        })
    }

    pub(super) fn unmap(&self, cx: &mut MaySleep<'_>, mapping: D::Mapping, rights: Access) {
        let pages = self.device.unmap(cx, mapping);
        self.device.put_pages(cx, pages, rights == Access::Write);
    }

    /// Lets others find it, unless somebody was faster with a range that contains this one.
    fn publish(
        &self,
        cx: &mut MaySleep<'_>,
        reserved: &Reserved,
        registration: Registration<M, D>,
    ) -> Attempt<'_, M, D> {
        let (range, rights) = (registration.range, registration.rights);
        let mut books = self.books.lock(cx);
        // What was under way when our lookup began has been told of since: our own read_begin has waited for it.
        let other = books
            .ranges
            .overlaps(range)
            .find_map(|(_, _, index)| self.try_lease(*index, range, rights, Check::Ordered));
        if let Some(other) = other {
            drop(books);
            self.unmap(cx, registration.mapping, rights);
            drop(registration.watched);
            self.unreserve(cx, reserved);
            return Attempt::Done(other);
        }
        let index = reserved.index;
        let count = registration.watched.as_ref().and_then(|w| w.subscription.count_at(w.seq));
        self.head(index).set(range, count);
        let state = self.slab.publish(index, registration, marks(rights));
        for (_, old, other) in books.ranges.overlaps(range) {
            let seen = self.slab.state(*other);
            if range.contains(old)
                && seen.is_live()
                && (rights == Access::Write || !seen.has(WRITE))
                && self.kill(*other, seen)
            {
                self.counters.merged.add(1);
            }
        }
        let key = books.ranges.insert(range, index);
        books.keys[index as usize] = Some((key, range));
        self.table.insert(&mut books.listed, range, index);
        drop(books);
        self.counters.registered.add(1);
        let Some(held) = self.slab.lease(index, state) else {
            self.counters.in_vain.add(1);
            return Attempt::Changed;
        };
        // Against the callback, which moves the sequence and then looks for an entry that is alive: one of the two
        // sees the other. The strict check is for the change between the last one and this one.
        fence(Ordering::SeqCst);
        if held.body().watched.as_ref().is_none_or(|w| w.subscription.read_retry(w.seq)) {
            drop(held);
            self.counters.in_vain.add(1);
            self.kill(index, state);
            return Attempt::Changed;
        }
        self.counters.fresh.add(1);
        Attempt::Done(held)
    }

    /// A registration for one lease, which nobody else finds: as if there were no cache.
    fn one_shot(
        self: &Arc<Self>,
        cx: &mut MaySleep<'_>,
        want: Range,
        access: Access,
    ) -> Result<Leased<'_, M, D>, CacheError> {
        loop {
            let room = match self.reserve(cx, want) {
                Ok(reserved) => match self.map(cx, want, access) {
                    Ok(mapping) => {
                        let rights = self.device.rights(access);
                        let registration = Registration { range: want, rights, mapping, watched: None };
                        self.slab.build(reserved.index);
                        self.head(reserved.index).set(want, None);
                        let marks = marks(rights) | ONCE;
                        let state = self.slab.publish(reserved.index, registration, marks);
                        self.counters.one_shot.add(1);
                        self.counters.fresh.add(1);
                        match self.slab.lease(reserved.index, state) {
                            Some(held) => return Ok(held),
                            None => unreachable!("nobody else knows of the entry"),
                        }
                    }
                    Err(error) => {
                        self.slab.build(reserved.index);
                        self.unreserve(cx, &reserved);
                        if !is_full(&error) {
                            self.counters.failed.add(1);
                            return Err(error.into());
                        }
                        error.into()
                    }
                },
                Err(full) => full,
            };
            if !self.make_room(cx) {
                self.counters.failed.add(1);
                return Err(room);
            }
        }
    }

    fn reserve(&self, cx: &mut MaySleep<'_>, range: Range) -> Result<Reserved, CacheError> {
        let mut books = self.books.lock(cx);
        let limit = self.options.bytes;
        let fits = books.bytes.checked_add(range.len()).is_some_and(|bytes| bytes <= limit);
        let index = if fits { self.table.take(&mut books.listed, range) } else { None };
        let Some(index) = index else {
            let (bytes, max) = (books.bytes, self.options.entries);
            return Err(CacheError::Full { range, bytes, limit, entries: max - books.listed.free(), max });
        };
        books.bytes += range.len();
        Ok(Reserved { index, range })
    }

    fn unreserve(&self, cx: &mut MaySleep<'_>, reserved: &Reserved) {
        self.slab.free(reserved.index);
        let mut books = self.books.lock(cx);
        books.bytes -= reserved.range.len();
        self.table.give(&mut books.listed, reserved.index);
    }
}

/// Would it help to let other registrations go?
fn is_full(error: &DeviceError) -> bool {
    use mmu_notifier::GupError;
    matches!(error, DeviceError::Full { .. } | DeviceError::Pages(GupError::NoMemory { .. }))
}

/// A callback that may have an entry in its hands. It is counted before it looks whether the entry is alive, so that the end of
/// the cache, which takes every entry out of use first, waits for it or is seen by it.
struct Inside<'c, M: PrimaryMmu, D: Device<M>>(&'c Core<M, D>);

impl<'c, M: PrimaryMmu, D: Device<M>> Inside<'c, M, D> {
    fn new(core: &'c Core<M, D>) -> Self {
        core.callbacks.fetch_add(1, Ordering::SeqCst);
        Inside(core)
    }
}

impl<M: PrimaryMmu, D: Device<M>> Drop for Inside<'_, M, D> {
    fn drop(&mut self) {
        self.0.callbacks.fetch_sub(1, Ordering::SeqCst);
        if self.0.stop.load(Ordering::SeqCst) {
            self.0.reaper.wake_all();
        }
    }
}

/// The callback of a registration. It takes no lock and never blocks: whoever changes the memory may hold anything.
struct Changed<M: PrimaryMmu, D: Device<M>> {
    core: Arc<Core<M, D>>,
    index: u32,
    generation: u64,
}

impl<M: PrimaryMmu, D: Device<M>> Invalidate for Changed<M, D> {
    fn invalidate(
        &self,
        _: Sleep<'_, '_>,
        _: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let moved = seq.set();
        fence(Ordering::SeqCst);
        let core = &self.core;
        let state = core.slab.state(self.index);
        if !state.is_live() || state.generation() != self.generation {
            return Ok(moved);
        }
        let _inside = Inside::new(core);
        core.counters.in_vain.add(1);
        let Some(held) = core.slab.lease_shared(self.index, state) else { return Ok(moved) };
        // A source that tells late also tells of changes from before the registration.
        let concerned =
            held.body().watched.as_ref().is_some_and(|w| w.subscription.read_retry_ordered(w.seq));
        drop(held);
        if concerned && core.kill(self.index, state) {
            core.counters.told.add(1);
        }
        Ok(moved)
    }
}
