// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who listens to one mm: `struct mmu_notifier_subscriptions`, registration, unregistration and release.
//!
//! Invariants
//! * `release` runs at most once for a notifier, and has returned when either `unregister` or the mm's exit returns,
//!   whoever of them called it. (Linux 3.10 to 6.13 can call it from both at once.)
//! * No callback runs after `unregister` has returned, nor after exit has emptied the list.
//! * At exit the list is emptied after the releases: until its release has run, a notifier hears truncate and reclaim.
//! * A notifier registered outside of callbacks was registered while no section was open: it hears the start of every
//!   section that it hears the end of, and misses none. (Linux gets this from `mm_take_all_locks`.)
//!
//! Lock order: `register` > callbacks' locks; `state` (spin) is a leaf: no callback and no destructor of a
//! notifier runs under it.

use std::fmt;
use std::sync::Arc;

use interleave::{
    AtomicBool, AtomicU64, Context, Digest, LockClass, LockMap, MaySleep, Mutex, Ordering, SpinLock,
    WaitQueue,
};

use crate::inside::{self, InCallback};
use crate::itree::Itree;
use crate::primary::Seq;
use crate::rules::{Breach, Rules};
use crate::srcu::{ReadSection, Srcu};
use crate::{MmuNotifier, Ops};

/// Held while starts and ends are dispatched, so that whatever a callback takes is ordered after whatever its
/// caller holds (`__mmu_notifier_invalidate_range_start_map`, 5.4+).
pub static INVALIDATE_START: LockClass = LockClass::new("mmu_notifier_invalidate_range_start");
pub(crate) static INVALIDATE_START_MAP: LockMap = LockMap::new(&INVALIDATE_START);

/// Held while memory is reclaimed, and by whatever allocates memory that may be. Registration puts
/// [`INVALIDATE_START`] after it: reclaim calls notifiers, so a callback must not allocate.
pub static FS_RECLAIM: LockClass = LockClass::new("fs_reclaim");
static FS_RECLAIM_MAP: LockMap = LockMap::new(&FS_RECLAIM);

static STATE: LockClass = LockClass::new("mmu_notifier_subscriptions.lock");
static WAIT: LockClass = LockClass::new("mmu_notifier_subscriptions.wq");
static REGISTER: LockClass = LockClass::new("mmu_notifier_register");

/// Breaches kept until somebody takes them.
const MAX_BREACHES: usize = 64;

/// The notifiers of one mm.
pub struct NotifierSubscriptions {
    rules: Rules,
    pub(crate) state: SpinLock<State>,
    /// `Itree::seq` for waiters; written under `state`.
    seq: AtomicU64,
    /// Open sections, by the parity of the registration that they began after; written under `state`.
    pub(crate) open: [AtomicU64; 2],
    pub(crate) wait: WaitQueue,
    register: Mutex<()>,
}

/// Protected by [`NotifierSubscriptions::state`].
pub(crate) struct State {
    /// Replaced on change, so that a dispatch walks what was there when it began. `None`: nobody.
    pub(crate) list: Option<List>,
    pub(crate) itree: Itree,
    /// Where new sections are counted in `open`.
    pub(crate) parity: usize,
    /// Somebody waits for `open`.
    pub(crate) registering: bool,
    pub(crate) exiting: bool,
    /// Somebody waits for another notifier's callbacks from inside a callback.
    fence_in_callback: bool,
    breaches: Vec<Breach>,
}

pub(crate) type List = Arc<[Arc<Listed>]>;

/// A notifier in the list.
pub(crate) struct Listed {
    pub(crate) notifier: Arc<dyn MmuNotifier>,
    pub(crate) ops: Ops,
    srcu: Srcu,
    released: AtomicBool,
}

impl Listed {
    /// Begins a callback, unless the notifier is out of the list for good.
    pub(crate) fn enter(&self, mm: usize) -> Option<(InCallback, ReadSection<'_>)> {
        let section = self.srcu.read_lock()?;
        Some((InCallback::enter(mm, self.id()), section))
    }

    fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    fn release_once(&self, cx: &mut MaySleep<'_>, mm: usize) {
        if let Some(_callback) = self.enter(mm)
            && !self.released.swap(true, Ordering::AcqRel)
            && self.ops.contains(Ops::RELEASE)
        {
            self.notifier.release(cx);
        }
    }
}

impl fmt::Debug for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listed").field("ops", &self.ops).field("closed", &self.srcu.is_closed()).finish()
    }
}

/// Why a notifier was not registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The teardown of the mm has begun.
    #[error("the mm is being torn down and hears no new notifier")]
    Exited,
    /// A notifier either mirrors page tables (start and end) or shares them (secondary TLBs); since 6.6 not both.
    #[error("{0:?}: arch_invalidate_secondary_tlbs excludes invalidate_range_start and invalidate_range_end")]
    SecondaryTlbsBesideStartEnd(Ops),
}

/// Why a notifier was not unregistered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnregisterError {
    /// Called from one of the notifier's own callbacks, for whose end it would wait.
    #[error(
        "unregister waits for the callback that called it: drop the registration instead, which does not wait"
    )]
    InsideOwnCallback,
    /// Called from a callback while another callback waits likewise: the two can be waiting for each other.
    #[error(
        "another callback waits in unregister and may wait for this one: drop the registration instead, or retry"
    )]
    CallbacksWaitForEachOther,
}

impl NotifierSubscriptions {
    /// Nobody listens yet.
    pub fn new(rules: Rules) -> Arc<NotifierSubscriptions> {
        let itree = Itree::new();
        let seq = AtomicU64::new(itree.seq());
        let state = State {
            list: None,
            itree,
            parity: 0,
            registering: false,
            exiting: false,
            fence_in_callback: false,
            breaches: Vec::new(),
        };
        Arc::new(NotifierSubscriptions {
            rules,
            state: SpinLock::with_digest(&STATE, state, State::digest),
            seq,
            open: [AtomicU64::new(0), AtomicU64::new(0)],
            wait: WaitQueue::new(&WAIT),
            register: Mutex::with_digest(&REGISTER, (), <()>::digest),
        })
    }

    /// The rules that it follows.
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// Adds a notifier (`mmu_notifier_register`). Waits until every section that is open has ended, as Linux does
    /// by taking all locks of the mm; so it must not be called with a lock that a callback takes.
    ///
    /// From inside a callback or a section of the same mm it cannot wait. Then the notifier hears what starts
    /// from now on, and must not map anything until the sections now open have ended. (Linux would deadlock.)
    ///
    /// # Errors
    /// [`RegisterError`].
    #[track_caller]
    pub fn register(
        self: &Arc<Self>,
        cx: &mut MaySleep<'_>,
        notifier: Arc<dyn MmuNotifier>,
    ) -> Result<Registration, RegisterError> {
        let ops = notifier.ops();
        if !self.rules.secondary_tlbs_beside_start_end
            && ops.contains(Ops::SECONDARY_TLBS)
            && ops.intersects(Ops::START | Ops::END)
        {
            return Err(RegisterError::SecondaryTlbsBesideStartEnd(ops));
        }
        let listed = Arc::new(Listed { notifier, ops, srcu: Srcu::new(), released: AtomicBool::new(false) });
        if inside::any(self.id()) {
            let _old = self.state.lock(cx).add(&listed, false)?;
        } else {
            self.prime_lockdep(cx);
            let _one_at_a_time = self.register.lock(cx);
            let (_old, before) = self.state.lock(cx).add(&listed, true)?;
            self.wait.wait_event(cx, || self.open[before].load(Ordering::Acquire) == 0);
            self.state.lock(cx).registering = false;
        }
        Ok(Registration { mm: Arc::clone(self), listed })
    }

    #[track_caller]
    fn unregister(&self, cx: &mut MaySleep<'_>, listed: &Arc<Listed>) -> Result<(), UnregisterError> {
        if inside::callbacks_of(self.id(), listed.id()) > 0 {
            return Err(UnregisterError::InsideOwnCallback);
        }
        let mut _fence = None;
        if inside::callback(self.id()) {
            if std::mem::replace(&mut self.state.lock(cx).fence_in_callback, true) {
                return Err(UnregisterError::CallbacksWaitForEachOther);
            }
            _fence = Some(FenceInCallback(self));
        } else if !inside::any(self.id()) {
            drop(INVALIDATE_START_MAP.acquire(cx));
        }
        listed.release_once(cx, self.id());
        let _old = self.state.lock(cx).remove(listed);
        listed.srcu.close();
        listed.srcu.synchronize(cx, 0);
        Ok(())
    }

    /// The mm dies (`__mmu_notifier_release`): interval notifiers hear [`Event::Release`](crate::Event::Release)
    /// and stay, since the teardown notifies them again; list notifiers are released and taken out, also those
    /// without a `release`, so that they hear nothing of the teardown. Once; a second call does nothing.
    pub fn release(&self, cx: &mut MaySleep<'_>) {
        if std::mem::replace(&mut self.state.lock(cx).exiting, true) {
            return;
        }
        self.release_intervals(cx);
        let list = self.state.lock(cx).list.clone();
        let Some(list) = list else { return };
        for listed in list.iter() {
            listed.release_once(cx, self.id());
        }
        let _emptied = self.state.lock(cx).list.take();
        for listed in list.iter() {
            listed.srcu.close();
        }
        for listed in list.iter() {
            let own = inside::callbacks_of(self.id(), listed.id());
            listed.srcu.synchronize(cx, own);
        }
    }

    /// Rules broken since the last call, the oldest first; at most 64 are kept.
    pub fn take_breaches(&self, cx: &mut impl Context) -> Vec<Breach> {
        std::mem::take(&mut self.state.lock(cx).breaches)
    }

    pub(crate) fn breach(&self, cx: &mut impl Context, breach: Breach) {
        let mut state = self.state.lock(cx);
        if state.breaches.len() < MAX_BREACHES {
            state.breaches.push(breach);
        }
    }

    /// Names this mm among the frames of a thread.
    pub(crate) fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Teaches lockdep the order of the fake locks before any reclaim has happened.
    #[track_caller]
    pub(crate) fn prime_lockdep(&self, cx: &mut impl Context) {
        let _reclaim = FS_RECLAIM_MAP.acquire(cx);
        let _start = INVALIDATE_START_MAP.acquire(cx);
    }

    pub(crate) fn publish_seq(&self, itree: &Itree) {
        self.seq.store(itree.seq(), Ordering::Release);
    }

    pub(crate) fn wait_for_end_of(&self, cx: &mut MaySleep<'_>, seq: Seq) {
        self.wait.wait_event(cx, || self.seq.load(Ordering::Acquire) != seq.get());
    }
}

/// One callback waits for another's end while this lives, also if the release that it called unwinds.
struct FenceInCallback<'a>(&'a NotifierSubscriptions);

impl Drop for FenceInCallback<'_> {
    fn drop(&mut self) {
        // Made in a context that may sleep, so that this one may too.
        let _ = MaySleep::try_enter(|cx| self.0.state.lock(cx).fence_in_callback = false);
    }
}

impl Digest for State {
    fn digest(&self) -> u64 {
        let listed = |listed: &Arc<Listed>| (listed.ops.bits(), listed.released.identity());
        let list: Vec<_> = self.list.iter().flat_map(|list| list.iter()).map(listed).collect();
        let flags = (self.parity, self.registering, self.exiting, self.fence_in_callback);
        (list, &self.itree, flags, self.breaches.len()).digest()
    }
}

impl State {
    /// Gives the old list, to be dropped outside the lock, and the parity of the sections begun before; `turn`:
    /// later ones are counted elsewhere, and somebody waits for the earlier.
    fn add(&mut self, listed: &Arc<Listed>, turn: bool) -> Result<(Option<List>, usize), RegisterError> {
        if self.exiting {
            return Err(RegisterError::Exited);
        }
        // At the head, as hlist_add_head_rcu does.
        let old = self.list.take();
        let rest = old.iter().flat_map(|list| list.iter());
        self.list = Some(std::iter::once(listed).chain(rest).cloned().collect());
        let before = self.parity;
        if turn {
            self.parity ^= 1;
            self.registering = true;
        }
        Ok((old, before))
    }

    fn remove(&mut self, listed: &Arc<Listed>) -> Option<List> {
        let old = self.list.take()?;
        let rest: Vec<_> = old.iter().filter(|l| !Arc::ptr_eq(l, listed)).cloned().collect();
        self.list = (!rest.is_empty()).then(|| rest.into());
        Some(old)
    }
}

/// A registered notifier. Dropping it is `mmu_notifier_put` (5.4+): no callback starts afterwards, one may still run,
/// and `release` is not called.
#[must_use = "dropping it takes the notifier out"]
pub struct Registration {
    mm: Arc<NotifierSubscriptions>,
    listed: Arc<Listed>,
}

impl Registration {
    /// Takes the notifier out, after its `release` if exit has not called it. No callback runs after it returns
    /// (`mmu_notifier_unregister`). It waits for those that do, so it must not be called with a lock that a
    /// callback takes; from a callback of another notifier it may. A second call only waits.
    ///
    /// # Errors
    /// [`UnregisterError`], where it would wait for itself; the notifier stays registered.
    #[track_caller]
    pub fn unregister(&self, cx: &mut MaySleep<'_>) -> Result<(), UnregisterError> {
        self.mm.unregister(cx, &self.listed)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.listed.srcu.is_closed() {
            return;
        }
        self.listed.srcu.close();
        // In atomic context the entry stays in the list, silent, until the mm goes.
        let _ = MaySleep::try_enter(|cx| {
            let old = self.mm.state.lock(cx).remove(&self.listed);
            drop(old);
        });
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("ops", &self.listed.ops).finish()
    }
}

impl fmt::Debug for NotifierSubscriptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seq = self.seq.load(Ordering::Relaxed);
        f.debug_struct("NotifierSubscriptions").field("rules", &self.rules).field("seq", &seq).finish()
    }
}
