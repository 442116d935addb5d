// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many lookups for the price of one question to the source and one lease.

use std::cell::Cell;

use interleave::Here;
use mmu_notifier::primary::PrimaryMmu;
use mmu_notifier::{Access, Range};

use super::core::{Core, Glance, Pinned, Registration};
use super::head::WRITE;
use super::hit::Check;
use super::{CacheError, RegistrationCache};
use crate::device::{Device, DeviceAddr};

/// Entries whose lines are waited for together: about as many as a CPU fetches at a time.
const TOGETHER: usize = 16;
/// No entry.
const NOBODY: u32 = u32::MAX;

/// One that is looked up.
#[derive(Clone, Copy)]
struct Wanted {
    addr: u64,
    /// Means something if there is an entry.
    want: Range,
    /// One that could contain it.
    index: u32,
}

/// One lease of all that is looked up through it, until it is dropped: for a list of requests that are handed to the
/// device and waited for together.
///
/// A lookup is as strict as [`RegistrationCache::get`] about memory that the caller had when the batch began; memory
/// that was mapped later needs another batch (see [`Session`](super::Session)). None of them writes anything, and
/// [`lookup_all`](Batch::lookup_all) waits for the memory of many entries at once.
///
/// Whatever dies while the batch lives is let go after it, used or not. So keep it for as long as the requests take,
/// and register what is missed outside of it: in a full cache there is no room before the batch has ended.
#[must_use]
pub struct Batch<'c, M: PrimaryMmu + 'static, D: Device<M> + 'static> {
    cache: &'c RegistrationCache<M, D>,
    pin: Pinned<'c, M, D>,
    found: Cell<u64>,
}

/// A registration that contains the bytes asked for, for as long as the [`Batch`] lives.
pub struct Registered<'b, M: PrimaryMmu + 'static, D: Device<M> + 'static> {
    device: &'b D,
    seen: Glance<'b, M, D>,
    addr: u64,
}

impl<'c, M: PrimaryMmu + 'static, D: Device<M> + 'static> Batch<'c, M, D> {
    pub(super) fn new(cache: &'c RegistrationCache<M, D>) -> Result<Self, CacheError> {
        cache.settle()?;
        let pin = cache.core.slab.pin();
        // It is counted among the leases and is no hit.
        cache.core.counters.in_vain.add(1);
        Ok(Batch { cache, pin, found: Cell::new(0) })
    }

    /// As [`RegistrationCache::lookup`].
    pub fn lookup(&self, addr: usize, len: usize, access: Access) -> Option<Registered<'_, M, D>> {
        let mut found = None;
        self.lookup_all([(addr, len)], access, |_, registered| found = registered);
        found
    }

    /// Looks up all of `ranges`, addresses and lengths in bytes, and tells `each` in their order what was found of which.
    #[inline]
    pub fn lookup_all<'b>(
        &'b self,
        ranges: impl IntoIterator<Item = (usize, usize)>,
        access: Access,
        each: impl FnMut(usize, Option<Registered<'b, M, D>>),
    ) {
        let here = Here::ask();
        // Apart, so that the one that is fast does not ask again and again.
        if here.is_plain() && !self.cache.core.audit.is_on() {
            self.look_up(here, ranges.into_iter(), access, |_, _| true, each);
        } else {
            self.look_up_explored(ranges.into_iter(), access, each);
        }
    }

    #[cold]
    #[inline(never)]
    fn look_up_explored<'b>(
        &'b self,
        ranges: impl Iterator<Item = (usize, usize)>,
        access: Access,
        each: impl FnMut(usize, Option<Registered<'b, M, D>>),
    ) {
        let audits = self.cache.core.audit.is_on();
        let sound = |want, access| !audits || self.is_sound(want, access);
        self.look_up(Here::ask(), ranges, access, sound, each);
    }

    #[inline(always)]
    fn look_up<'b>(
        &'b self,
        here: Here,
        mut ranges: impl Iterator<Item = (usize, usize)>,
        access: Access,
        is_sound: impl Fn(Range, Access) -> bool,
        mut each: impl FnMut(usize, Option<Registered<'b, M, D>>),
    ) {
        let core: &'b Core<M, D> = &self.cache.core;
        // One for all: what changes later was there when the call began.
        let era = core.era(Check::Ordered);
        let (mut asked, mut found) = (0, 0);
        if core.table.has_many(here) {
            let mut wanted = [Wanted { addr: 0, want: Range::ALL, index: NOBODY }; TOGETHER];
            loop {
                let mut count = 0;
                // No step waits for what the one before has asked the memory for.
                for (wanted, (addr, len)) in wanted.iter_mut().zip(&mut ranges) {
                    *wanted = self.ask(here, addr as u64, len as u64);
                    if let Some(words) = core.slab.get_words(wanted.index) {
                        words.prefetch();
                    }
                    count += 1;
                }
                for wanted in &wanted[..count] {
                    let each = |it| each(asked, it);
                    found += u64::from(self.answer(here, *wanted, access, era, &is_sound, each));
                    asked += 1;
                }
                if count < TOGETHER {
                    break;
                }
            }
        } else {
            for (addr, len) in ranges {
                let wanted = self.ask(here, addr as u64, len as u64);
                let each = |it| each(asked, it);
                found += u64::from(self.answer(here, wanted, access, era, &is_sound, each));
                asked += 1;
            }
        }
        self.found.set(self.found.get() + found);
    }

    /// Tells `each` what it is, in each branch, so that the fast one knows what it tells. Is it something?
    #[inline(always)]
    fn answer<'b>(
        &'b self,
        here: Here,
        Wanted { addr, want, index }: Wanted,
        access: Access,
        era: u64,
        is_sound: impl Fn(Range, Access) -> bool,
        mut each: impl FnMut(Option<Registered<'b, M, D>>),
    ) -> bool {
        let core: &'b Core<M, D> = &self.cache.core;
        if is_sound(want, access) {
            if let Some(seen) = core.look(here, &self.pin, index, want, access, era) {
                each(Some(Registered { device: &core.device, seen, addr }));
                return true;
            }
            if let Some(seen) = self.look_again(index, want, access) {
                each(Some(Registered { device: &core.device, seen, addr }));
                return true;
            }
        }
        each(None);
        false
    }

    /// Which entry it could be.
    #[inline(always)]
    fn ask(&self, here: Here, addr: u64, len: u64) -> Wanted {
        if let Ok(want) = Range::enclosing(addr, len)
            && let Some(index) = self.cache.core.table.candidate(here, want)
        {
            return Wanted { addr, want, index };
        }
        Wanted { addr, want: Range::ALL, index: NOBODY }
    }

    /// Where something could contain it.
    #[cold]
    #[inline(never)]
    fn look_again(&self, index: u32, want: Range, access: Access) -> Option<Glance<'_, M, D>> {
        if index == NOBODY { None } else { self.cache.core.look_again(&self.pin, want, access) }
    }

    #[cold]
    #[inline(never)]
    fn is_sound(&self, want: Range, access: Access) -> bool {
        self.cache.lookup(want.start() as usize, want.len() as usize, access).is_some()
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> Drop for Batch<'_, M, D> {
    fn drop(&mut self) {
        self.cache.core.counters.batched.add(self.found.get());
    }
}

impl<'b, M: PrimaryMmu + 'static, D: Device<M> + 'static> Registered<'b, M, D> {
    fn registration(&self) -> &'b Registration<M, D> {
        self.seen.body().unwrap_or_else(|| unreachable!("it was alive when it was found"))
    }

    /// The first byte asked for.
    pub fn addr(&self) -> usize {
        self.addr as usize
    }

    /// What the device may do with the bytes: at least what was asked for.
    #[inline]
    pub fn rights(&self) -> Access {
        if self.seen.state().has(WRITE) { Access::Write } else { Access::Read }
    }

    /// What the device has mapped, which may be more than was asked for.
    pub fn mapping(&self) -> &'b D::Mapping {
        &self.registration().mapping
    }

    /// The pages that are registered.
    pub fn registered(&self) -> Range {
        self.registration().range
    }

    /// The device address of the first byte asked for.
    pub fn device_addr(&self) -> DeviceAddr {
        self.registration().device_addr(self.device, self.addr)
    }

    /// Has the range not changed since it was registered?
    pub fn is_current(&self) -> bool {
        self.registration().is_current()
    }
}
