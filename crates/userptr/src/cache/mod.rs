// SPDX-License-Identifier: MIT OR Apache-2.0
//! A registration cache that is never stale: hand a range of ordinary memory to a device again and again for the price
//! of a few loads.
//!
//! To register memory with a device (pin it, map it) costs from half a microsecond to tens of milliseconds, so programs
//! keep registrations of memory that they may use again. But memory is unmapped, moved, replaced and truncated, by
//! the allocator as much as by the program, and a registration goes on showing the old pages. This cache asks a
//! notifier source of the primary MMU at each lookup, after it has taken hold of the registration.
//!
//! # Invariants
//! 1. No lookup returns a registration whose range changed after it was registered, as far as the source hears
//!    ([`PrimaryMmu::cannot_hear`]). This rests on `read_begin` and `read_retry` alone; callbacks only give memory back.
//! 2. What a lease holds stays registered until it ends. If the memory changes meanwhile the registration is
//!    unreachable at once and let go exactly once, after its last lease.
//! 3. What nobody would hear of is never cached: it is registered for one lease ([`Stats::unheard`]).
//! 4. The device never holds more than [`Options::bytes`] and [`Options::entries`], and what is dead and not leased is
//!    let go without being asked ([`Reaper::Thread`]).
//! 5. A hit takes no lock, allocates nothing and calls nobody but the source's check. A callback takes no lock.
//!
//! # Locks
//! ```text
//! (application)
//!   userptr_books      who has what; nothing is called with it held
//! userptr_reaper       wait queue of the reaper
//! userptr_room         wait queue of those for whom there is no room
//! ```
//! No thread is ever waited for with `userptr_books` held, so that a holder may even munmap subscribed memory (as
//! allocators do).

mod admission;
mod audit;
mod batch;
mod core;
mod error;
mod explain;
mod head;
mod hit;
mod lease;
mod names;
mod owned;
mod places;
mod reap;
mod register;
mod session;
mod slab;
mod stats;
mod table;

use std::num::NonZeroU32;
use std::sync::Arc;

use interleave::{JoinHandle, MaySleep, Ordering};
use mmu_notifier::primary::{Gone, PrimaryMmu};
use mmu_notifier::{Access, PAGE_SIZE, Range};

use self::core::Core;
use self::hit::Check;
use crate::device::Device;

pub use admission::Admit;
pub use batch::{Batch, Registered};
pub use error::{BuildError, CacheError};
pub use explain::{Explanation, Found, Verdict};
pub use lease::{Lease, LeaseMut, SliceLease, SliceMutLease};
pub use owned::{NotLeased, OwnedLease, VecLease};
pub use session::Session;
pub use stats::Stats;

/// Who lets dead registrations go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaper {
    /// A thread of the cache, at once.
    Thread,
    /// Whoever misses, and [`RegistrationCache::reap`]. Freed memory stays with the device until then.
    Manual,
}

/// How a cache behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Registrations at a time, leases of one use included; no more than the device has. Default: 4096.
    pub entries: usize,
    /// Bytes that the device may hold at a time, freed memory included. Default: 1 GiB.
    pub bytes: u64,
    /// What gets an entry. Default: everything.
    pub admit: Admit,
    /// Default: a thread.
    pub reaper: Reaper,
    /// Threads that shall not get in each other's way at a hit. Default: twice the CPUs.
    pub threads: usize,
    /// Each so-manieth hit is verified through the device ([`Device::view`]): for tests, and to find out whether a
    /// source hears all that a program does. Such a hit takes as long as the device takes to copy the bytes. Old
    /// pages that hold the same bytes are not told apart, except by [`lease_mut`](RegistrationCache::lease_mut), which
    /// changes a byte of each page and changes it back. What is found stale is [`CacheError::Stale`], [`Stats::audited_stale`], and a miss for
    /// [`lookup`](RegistrationCache::lookup). Default: none.
    pub audit: Option<NonZeroU32>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            entries: 4096,
            bytes: 1 << 30,
            admit: Admit::Always,
            reaper: Reaper::Thread,
            threads: 2 * std::thread::available_parallelism().map_or(4, usize::from),
            audit: None,
        }
    }
}

/// Registrations of this process's memory with one device. See the [module](self).
///
/// Several caches may be about one mm, with devices of the same kind or others, over the same ranges: each listens for
/// itself. (A source of userfaultfd is one per process: share it.)
pub struct RegistrationCache<M: PrimaryMmu + 'static, D: Device<M> + 'static> {
    core: Arc<Core<M, D>>,
    reaper: Option<JoinHandle<()>>,
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> RegistrationCache<M, D> {
    /// A cache of `device`'s registrations of the memory of `mm`.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn new(mm: Arc<M>, device: D, mut options: Options) -> Result<Self, BuildError> {
        options.entries = options.entries.min(device.limits().mappings as usize).min(table::MAX_ENTRIES);
        if options.entries == 0 || options.bytes < PAGE_SIZE {
            return Err(BuildError::Empty { entries: options.entries, bytes: options.bytes });
        }
        let threaded = options.reaper == Reaper::Thread;
        let core = Arc::new(Core::new(mm, device, options));
        let reaper = threaded.then(|| {
            let core = Arc::clone(&core);
            interleave::try_spawn("userptr-reaper", move |cx| reap::run(cx, &core))
        });
        let reaper = reaper.transpose().map_err(BuildError::Thread)?;
        Ok(RegistrationCache { core, reaper })
    }

    /// A lease of a registration of the bytes `[addr, addr + len)`: of one that contains them and allows `access`, or of a
    /// new one of their pages. Keep the memory mapped until it returns.
    ///
    /// Nothing that any thread has seen happen to the memory before the call is missed.
    ///
    /// Context: a hit may be in any; a miss sleeps.
    ///
    /// # Errors
    /// [`CacheError`]. An error says what was wrong at some moment of the call.
    #[inline(always)]
    pub fn get(&self, addr: usize, len: usize, access: Access) -> Result<Lease<'_, M, D>, CacheError> {
        self.get_if(addr, len, access, Check::Strict)
    }

    /// As [`get`](Self::get), for memory that no other thread is in the middle of giving back: it misses no change whose
    /// system call returned before this call (in happens-before order). Where the source tells before the change
    /// that is the same, and otherwise it saves a system call.
    ///
    /// # Errors
    /// [`CacheError`].
    #[inline(always)]
    pub fn get_ordered(
        &self,
        addr: usize,
        len: usize,
        access: Access,
    ) -> Result<Lease<'_, M, D>, CacheError> {
        self.get_if(addr, len, access, Check::Ordered)
    }

    /// As [`get`](Self::get) without registering anything: a hit or nothing. Any context.
    #[inline(always)]
    pub fn lookup(&self, addr: usize, len: usize, access: Access) -> Option<Lease<'_, M, D>> {
        let want = Range::enclosing(addr as u64, len as u64).ok()?;
        let hit = match self.core.hit_at_once(want, access, Check::Strict) {
            Some(hit) if !self.core.audit.is_on() => hit,
            found => {
                let found = found.map(|hit| hit.claim);
                self.core.hit_of(self.hit_after_all(found, want, access, Check::Strict, addr, len).ok()??)
            }
        };
        Some(Lease::of_hit(&self.core, hit, addr as u64, len as u64))
    }

    #[inline(always)]
    fn get_if(
        &self,
        addr: usize,
        len: usize,
        access: Access,
        check: Check,
    ) -> Result<Lease<'_, M, D>, CacheError> {
        let want = Range::enclosing(addr as u64, len as u64)?;
        let hit = match self.core.hit_at_once(want, access, check) {
            Some(hit) if !self.core.audit.is_on() => hit,
            found => {
                let found = found.map(|hit| hit.claim);
                match self.get_after_all(found, want, access, check, addr, len) {
                    Ok(claim) => self.core.hit_of(claim),
                    Err(error) => return Err(*error),
                }
            }
        };
        Ok(Lease::of_hit(&self.core, hit, addr as u64, len as u64))
    }

    /// What was found, audited, or what is registered now. As those below: neither returns nor gets what the caller returns,
    /// so that a hit has that in registers.
    #[cold]
    #[inline(never)]
    fn get_after_all<'c>(
        &'c self,
        found: Option<slab::Claim<'c>>,
        want: Range,
        access: Access,
        check: Check,
        addr: usize,
        len: usize,
    ) -> Result<slab::Claim<'c>, Box<CacheError>> {
        match self.hit_after_all(found, want, access, check, addr, len)? {
            Some(claim) => Ok(claim),
            None => self.register(want, access),
        }
    }

    /// What was found, or what is found if all is looked at, audited.
    #[cold]
    #[inline(never)]
    fn hit_after_all<'c>(
        &'c self,
        found: Option<slab::Claim<'c>>,
        want: Range,
        access: Access,
        check: Check,
        addr: usize,
        len: usize,
    ) -> Result<Option<slab::Claim<'c>>, Box<CacheError>> {
        let Some(found) = found.or_else(|| self.core.hit(want, access, check)) else { return Ok(None) };
        if !self.core.audit.is_on() {
            return Ok(Some(found));
        }
        let lease = Lease::of_hit(&self.core, self.core.hit_of(found), addr as u64, len as u64);
        Ok(Some(self.audited(lease)?.into_claim()))
    }

    fn register(&self, want: Range, access: Access) -> Result<slab::Claim<'_>, Box<CacheError>> {
        match MaySleep::try_enter(|cx| self.core.register(cx, want, access)) {
            Ok(registered) => Ok(registered?.claim()),
            Err(atomic) => Err(Box::new(atomic.into())),
        }
    }

    /// A lease of memory that the program reads: it cannot be freed or written while the lease lives.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn lease<'b>(&self, bytes: &'b [u8]) -> Result<SliceLease<'_, 'b, M, D>, CacheError> {
        let lease = self.get(bytes.as_ptr().expose_provenance(), bytes.len(), Access::Read)?;
        Ok(SliceLease::new(lease, bytes))
    }

    /// A lease of memory for the device to write: nobody else can look at it or free it while the lease lives.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn lease_mut<'b>(&self, bytes: &'b mut [u8]) -> Result<SliceMutLease<'_, 'b, M, D>, CacheError> {
        let addr = bytes.as_mut_ptr().expose_provenance();
        let lease = if self.core.audit.is_on() {
            self.audited_mut(bytes)?
        } else {
            self.get(addr, bytes.len(), Access::Write)?
        };
        Ok(SliceMutLease::new(lease, bytes))
    }

    /// Lookups that share one question to the source: see [`Session`].
    ///
    /// # Errors
    /// [`CacheError::Source`], [`CacheError::Forked`].
    pub fn session(&self) -> Result<Session<'_, M, D>, CacheError> {
        Session::new(self)
    }

    /// Lookups that share one question to the source and one lease: see [`Batch`].
    ///
    /// # Errors
    /// [`CacheError::Source`], [`CacheError::Forked`].
    pub fn batch(&self) -> Result<Batch<'_, M, D>, CacheError> {
        Batch::new(self)
    }

    /// What happened before is known to the source afterwards.
    fn settle(&self) -> Result<(), CacheError> {
        match self.core.mm.settle() {
            Ok(()) => Ok(()),
            Err(Gone::Forked) => Err(CacheError::Forked),
            Err(gone) => Err(gone.into()),
        }
    }

    /// Lets go of every registration that shares a page with the bytes, as if they had changed: for what the source
    /// cannot hear, and the program knows. Leases go on. How many there were.
    ///
    /// # Errors
    /// [`CacheError`], of which [`CacheError::Full`] and what is about registering cannot be.
    pub fn invalidate(&self, addr: usize, len: usize) -> Result<usize, CacheError> {
        let range = Range::enclosing(addr as u64, len as u64)?;
        self.at_home()?;
        Ok(MaySleep::try_enter(|cx| {
            let killed = self.core.kill_all(cx, |registered| registered.overlaps(range));
            self.core.reap(cx);
            killed
        })?)
    }

    /// Lets go of what is dead and not leased. How many registrations. With [`Reaper::Thread`] there is no need.
    ///
    /// # Errors
    /// [`CacheError::Forked`], [`CacheError::Atomic`].
    pub fn reap(&self) -> Result<usize, CacheError> {
        self.at_home()?;
        Ok(MaySleep::try_enter(|cx| self.core.reap(cx))?)
    }

    /// Why the source cannot hear of the last range that was not cached for that reason. `None`: there was none.
    ///
    /// # Errors
    /// [`CacheError::Forked`], [`CacheError::Atomic`].
    pub fn warning(&self) -> Result<Option<String>, CacheError> {
        self.at_home()?;
        Ok(MaySleep::try_enter(|cx| self.core.books.lock(cx).warning.clone())?)
    }

    /// What it has done so far.
    ///
    /// # Errors
    /// [`CacheError::Forked`], [`CacheError::Atomic`].
    pub fn stats(&self) -> Result<Stats, CacheError> {
        self.at_home()?;
        Ok(MaySleep::try_enter(|cx| self.core.stats(cx))?)
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.core.device
    }

    /// The primary MMU.
    pub fn mm(&self) -> &Arc<M> {
        &self.core.mm
    }

    fn at_home(&self) -> Result<(), CacheError> {
        if self.core.at_home() { Ok(()) } else { Err(CacheError::Forked) }
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> Drop for RegistrationCache<M, D> {
    /// Lets everything go. A lease that was forgotten (`mem::forget`) keeps its registration for ever.
    fn drop(&mut self) {
        if !self.core.at_home() {
            // The reaper is the parent's, and so may be the holder of any lock.
            std::mem::forget(self.reaper.take());
            std::mem::forget(Arc::clone(&self.core));
            return;
        }
        self.core.stop.store(true, Ordering::SeqCst);
        self.core.reaper.wake_all();
        let dropped = MaySleep::try_enter(|cx| {
            if let Some(reaper) = self.reaper.take()
                && let Err(panicked) = reaper.join(cx)
            {
                tracing::error!("the reaper of a registration cache: {panicked}");
            }
            self.core.kill_all(cx, |_| true);
            // Nobody reaps what a callback lists, or lets go of, after this.
            self.core.reaper.wait_event(cx, || self.core.callbacks.load(Ordering::SeqCst) == 0);
            self.core.reap(cx);
        });
        if let Err(atomic) = dropped {
            tracing::error!(
                "a registration cache is dropped where nobody may sleep, its pages stay: {atomic}"
            );
        }
    }
}
