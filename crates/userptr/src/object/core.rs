// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a driver knows of its objects, and the first layer: an object's pages, got and given back.
//!
//! Invariants, all under `userptr_objects`:
//! * `backing` is put in when its sequence stands, and used in a batch only when it still does;
//! * a batch is attached to its objects together with that check, so whoever takes a backing out or moves the
//!   sequence afterwards finds the batch and waits for it;
//! * whoever takes a backing out waits for the batches, without the lock, before he unmaps it. Batches stay
//!   attached until they are done, and `leaving` counts backings until their pages are given back: a callback that
//!   comes meanwhile waits for both.
//!
//! Pages are got, mapped and given back without the lock.

use std::collections::BTreeMap;
use std::sync::Arc;

use interleave::{AtomicU64, LockClass, MaySleep, Mutex, Ordering, WaitQueue};
use mmu_notifier::primary::{Gone, PrimaryMmu, SubscribeError, Subscription};
use mmu_notifier::{Access, Range};

use super::error::ObjectError;
use super::invalidate::Changed;
use super::iommu::{Iommu, Remapped};
use super::job::Job;
use super::table::Table;
use crate::device::{Device, Engine};

static OBJECTS: LockClass = LockClass::new("userptr_objects");
static LEFT: LockClass = LockClass::new("userptr_objects_left");

/// Changes that are followed before the caller is told that there is no end to them.
pub(super) const ATTEMPTS: u32 = 64;

pub(super) type JobOf<D> = Arc<Job<<D as Engine>::Fence>>;

/// An object's pages, in the device's reach.
pub(super) struct Backing<M: PrimaryMmu, D: Device<M>> {
    pub(super) remapped: Remapped<D::Mapping>,
    subscription: Arc<M::Subscription>,
    seq: <M::Subscription as Subscription>::Seq,
    /// By a batch, perhaps.
    pub(super) written: bool,
}

impl<M: PrimaryMmu, D: Device<M>> Backing<M, D> {
    /// Are these still the pages of the range? To be asked with the objects locked.
    pub(super) fn is_current(&self) -> bool {
        !self.subscription.read_retry(self.seq)
    }

    /// For a callback, which may come late and tell of what was before these pages were got.
    pub(super) fn has_moved(&self) -> bool {
        self.subscription.read_retry_ordered(self.seq)
    }
}

pub(super) struct Entry<M: PrimaryMmu, D: Device<M> + Engine> {
    pub(super) range: Range,
    /// The first byte, and how many.
    pub(super) bytes: (u64, u64),
    pub(super) access: Access,
    /// `None` until the pages are wanted.
    subscription: Option<Arc<M::Subscription>>,
    pub(super) backing: Option<Backing<M, D>>,
    /// Backings that have been taken out and still have pages.
    leaving: u32,
    /// Batches that name it; those that are done go when the next one comes.
    pub(super) jobs: Vec<JobOf<D>>,
}

impl<M: PrimaryMmu, D: Device<M> + Engine> Entry<M, D> {
    /// Takes the backing out if `which` says so.
    pub(super) fn detach(&mut self, which: impl FnOnce(&Backing<M, D>) -> bool) -> Detached<M, D> {
        let backing = self.backing.take_if(|backing| which(backing));
        self.leaving += u32::from(backing.is_some());
        (backing, self.jobs.clone())
    }
}

pub(super) struct Books<M: PrimaryMmu, D: Device<M> + Engine> {
    pub(super) objects: BTreeMap<u64, Entry<M, D>>,
    pub(super) spaces: BTreeMap<u64, Table>,
    next: u64,
}

impl<M: PrimaryMmu, D: Device<M> + Engine> Books<M, D> {
    /// A number that nothing had.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

#[derive(Debug)]
pub(super) struct Counters {
    pub(super) got: AtomicU64,
    pub(super) retried: AtomicU64,
    pub(super) invalidated: AtomicU64,
}

pub(super) struct Core<M: PrimaryMmu, D: Device<M> + Engine> {
    pub(super) mm: Arc<M>,
    pub(super) device: D,
    pub(super) iommu: Iommu,
    pub(super) counters: Counters,
    process: u32,
    books: Mutex<Books<M, D>>,
    /// Woken when `leaving` falls.
    left: WaitQueue,
}

/// A backing that has been taken out. Dropped when its pages are given back, or that has failed.
struct Leaving<'c, M: PrimaryMmu, D: Device<M> + Engine> {
    core: &'c Core<M, D>,
    object: u64,
}

impl<M: PrimaryMmu, D: Device<M> + Engine> Drop for Leaving<'_, M, D> {
    fn drop(&mut self) {
        let _ = MaySleep::try_enter(|cx| {
            if let Some(entry) = self.core.lock(cx).objects.get_mut(&self.object) {
                entry.leaving -= 1;
            }
        });
        self.core.left.wake_all();
    }
}

/// What has been taken out of an object: its backing, and the batches to wait for first.
pub(super) type Detached<M, D> = (Option<Backing<M, D>>, Vec<JobOf<D>>);

impl<M: PrimaryMmu, D: Device<M> + Engine> Core<M, D> {
    pub(super) fn new(mm: Arc<M>, device: D, iommu: Iommu) -> Core<M, D> {
        let books = Books { objects: BTreeMap::new(), spaces: BTreeMap::new(), next: 0 };
        let zero = || AtomicU64::new(0);
        Core {
            mm,
            device,
            iommu,
            counters: Counters { got: zero(), retried: zero(), invalidated: zero() },
            process: std::process::id(),
            books: Mutex::new(&OBJECTS, books),
            left: WaitQueue::new(&LEFT),
        }
    }

    /// Not in a forked child, where there is neither device nor source?
    pub(super) fn at_home(&self) -> bool {
        std::process::id() == self.process
    }

    pub(super) fn lock(&self, cx: &mut MaySleep<'_>) -> interleave::MutexGuard<'_, Books<M, D>> {
        self.books.lock(cx)
    }

    pub(super) fn open(&self, cx: &mut MaySleep<'_>, range: Range, bytes: (u64, u64), access: Access) -> u64 {
        let mut books = self.lock(cx);
        let object = books.number();
        let entry =
            Entry { range, bytes, access, subscription: None, backing: None, leaving: 0, jobs: Vec::new() };
        books.objects.insert(object, entry);
        object
    }

    /// Takes the backing out if `which` says so. The batches are those that may use it.
    pub(super) fn detach(
        &self,
        cx: &mut MaySleep<'_>,
        object: u64,
        which: impl FnOnce(&Backing<M, D>) -> bool,
    ) -> Detached<M, D> {
        let mut books = self.lock(cx);
        books.objects.get_mut(&object).map_or((None, Vec::new()), |entry| entry.detach(which))
    }

    /// Waits for the device and gives the pages back.
    pub(super) fn let_go(&self, cx: &mut MaySleep<'_>, object: u64, (backing, jobs): Detached<M, D>) {
        let _leaving = backing.as_ref().map(|_| Leaving { core: self, object });
        for job in &jobs {
            // How it ended is its owner's to know.
            let _ = job.wait(cx);
        }
        if let Some(backing) = backing {
            self.put_pages(cx, backing);
        }
    }

    fn put_pages(&self, cx: &mut MaySleep<'_>, backing: Backing<M, D>) {
        let pages = self.iommu.unmap(cx, &self.device, backing.remapped);
        self.device.put_pages(cx, pages, backing.written);
    }

    /// Waits for whoever else is about to let the object's pages go.
    pub(super) fn wait_left(&self, cx: &mut MaySleep<'_>, object: u64) {
        let mut books = self.lock(cx);
        while books.objects.get(&object).is_some_and(|entry| entry.leaving > 0) {
            books = self.left.wait(cx, books);
        }
    }

    /// No access of the device through the object is in flight when it returns.
    pub(super) fn wait_idle(&self, cx: &mut MaySleep<'_>, object: u64) {
        let detached = self.detach(cx, object, |_| false);
        self.let_go(cx, object, detached);
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static> Core<M, D> {
    /// submit_init: makes sure that the object has pages. They may be the past again when it returns.
    pub(super) fn get_pages(self: &Arc<Self>, cx: &mut MaySleep<'_>, object: u64) -> Result<(), ObjectError> {
        for _ in 0..ATTEMPTS {
            let books = self.lock(cx);
            // It is borrowed by the caller, so it is not closed.
            let Some(entry) = books.objects.get(&object) else { return Ok(()) };
            if entry.backing.as_ref().is_some_and(Backing::is_current) {
                return Ok(());
            }
            let (range, access, known) = (entry.range, entry.access, entry.subscription.clone());
            drop(books);
            let past = self.detach(cx, object, |backing| !backing.is_current());
            self.let_go(cx, object, past);
            let subscription = match known {
                Some(subscription) => subscription,
                None => self.subscribe(cx, object, range, access)?,
            };
            if self.try_get_pages(cx, object, range, access, subscription)? {
                self.counters.got.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            self.counters.retried.fetch_add(1, Ordering::Relaxed);
        }
        Err(ObjectError::Unsettled { attempts: ATTEMPTS })
    }

    fn subscribe(
        self: &Arc<Self>,
        cx: &mut MaySleep<'_>,
        object: u64,
        range: Range,
        access: Access,
    ) -> Result<Arc<M::Subscription>, ObjectError> {
        let callback = Arc::new(Changed { core: Arc::downgrade(self), object });
        match self.mm.subscribe(cx, range, callback) {
            Ok(subscription) => {
                let subscription = Arc::new(subscription);
                let mut books = self.lock(cx);
                if let Some(entry) = books.objects.get_mut(&object) {
                    let old = entry.subscription.replace(Arc::clone(&subscription));
                    drop(books);
                    drop(old);
                }
                Ok(subscription)
            }
            Err(SubscribeError::Released(_)) => Err(Gone::Released.into()),
            // Some sources cannot listen where nothing is; that nothing is there says more.
            Err(error) => {
                self.mm.fault_in(cx, range, access)?;
                Err(error.into())
            }
        }
    }

    /// One turn of the protocol. False: something changed meanwhile.
    fn try_get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        object: u64,
        range: Range,
        access: Access,
        subscription: Arc<M::Subscription>,
    ) -> Result<bool, ObjectError> {
        let seq = match subscription.read_begin(cx) {
            Ok(seq) => seq,
            // The source knows the range no more, because it was unmapped: it has to be told again.
            Err(Gone::Closed { .. }) => {
                self.forget_subscription(cx, object, &subscription);
                return Ok(false);
            }
            Err(Gone::Forked) => return Err(ObjectError::Forked),
            Err(gone) => return Err(gone.into()),
        };
        // An error was true when it was found, during the call: whatever has changed since, it is an answer.
        let pages = self.device.get_pages(cx, &self.mm, range, access)?;
        let remapped = match self.iommu.map(cx, &self.device, range, pages) {
            Ok(remapped) => remapped,
            Err((error, pages)) => {
                self.device.put_pages(cx, pages, false);
                return Err(error.into());
            }
        };
        let backing = Backing { remapped, subscription, seq, written: false };
        let mut books = self.lock(cx);
        let unwanted = match books.objects.get_mut(&object) {
            // The check and the installation are one critical section with that of the callback.
            Some(entry) if entry.backing.is_none() && backing.is_current() => {
                entry.backing = Some(backing);
                None
            }
            _ => Some(backing),
        };
        drop(books);
        let installed = unwanted.is_none();
        if let Some(backing) = unwanted {
            self.put_pages(cx, backing);
        }
        Ok(installed)
    }

    fn forget_subscription(&self, cx: &mut MaySleep<'_>, object: u64, which: &Arc<M::Subscription>) {
        let mut books = self.lock(cx);
        let Some(entry) = books.objects.get_mut(&object) else { return };
        let forgotten = entry.subscription.take_if(|known| Arc::ptr_eq(known, which));
        drop(books);
        drop(forgotten);
    }

    /// Ends the object, and waits until the device is through with it. The handle is the caller's, so no batch can name
    /// it any more.
    pub(super) fn close(&self, cx: &mut MaySleep<'_>, object: u64) {
        let mut books = self.lock(cx);
        for table in books.spaces.values_mut() {
            table.unbind_all(object);
        }
        let Some(entry) = books.objects.get_mut(&object) else { return };
        let subscription = entry.subscription.take();
        drop(books);
        // The entry stays until then, for callbacks, which have to wait as well.
        let last = self.detach(cx, object, |_| true);
        self.let_go(cx, object, last);
        if let Some(subscription) = subscription {
            // Refused in a callback only, and none of ours drops an object.
            let _ = subscription.unsubscribe(cx);
        }
        let entry = self.lock(cx).objects.remove(&object);
        drop(entry);
    }
}
