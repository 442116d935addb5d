// SPDX-License-Identifier: MIT OR Apache-2.0
//! i915 userptr as of Linux 3.16, the driver that the 2014 exchange is about.
//!
//! Create (`bind`): READ_ONLY is refused, no hardware support was wired up, so every get_user_pages is for writing. The object takes
//! mm_users. Under struct_mutex, then the notifier's spin lock: an overlapping object refuses it, for good, or for now if
//! that one still has workers. Else it goes into the interval tree.
//!
//! Execbuf (`submit`), under struct_mutex throughout:
//! 1. No pages? The fast path: get_user_pages_fast without faults. All there: they are the object's pages, no work is pending.
//! 2. Some missing: let go of the rest. No work and fewer than 15 workers: start one, EAGAIN. A worker left an error:
//!    return it, once. Otherwise EAGAIN. User space repeats.
//! 3. Write the GPU's page table; note that the GPU writes; queue the request.
//!
//! Worker, with no lock: mmap_lock for reading; get_user_pages, which may fault and break copy-on-write; unlock; struct_mutex;
//! am I still the object's work? Then the pages are its pages. In any case `work` becomes my result, and whoever
//! else had been started since is thereby cancelled too.
//!
//! invalidate_range_start, for each object of the tree that overlaps: spin lock; find it; **plain reference**; unlock;
//! struct_mutex; cancel its work; if it has pages: wait until the GPU is done with it, unbind it, put its pages; drop the reference;
//! unlock. A worker whose own fault breaks copy-on-write cancels itself here.
//!
//! There is no invalidate_range_end, release, invalidate_page, change_pte nor young callback. What is between the start
//! and the change of the page table is a gap: pages got in it are the old ones (bug 1, until 5.13).
//!
//! The GPU has no dirty bits: all pages of an object that it wrote are marked dirty when they are put. Its TLB is
//! invalidated at the start of each batch, not when an object is unbound.
//!
//! Lock order: mmap_lock > mmu_notifier_invalidate_range_start > struct_mutex > i915_mmu_notifier.lock. This is why
//! get_user_pages that may fault is left to a worker.
//!
//! Not modelled: the serial of the tree (it saves a search: objects do not overlap, so searching again from the end of the
//! last one finds the same); UNSYNCHRONIZED; madvise; tiling; one struct_mutex for several mms of one device; the notifier is
//! registered when the driver is opened, not with the first object.

use crate::bindings::Bindings;
use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Holds, Kind, OpenError, Options, SubmitError, check_ops};
use crate::engine::RequestId;
use crate::listener::Registered;
use crate::observer::DriverBug;
use crate::op::{Binding, DeviceOp};
use crate::site::changed;
use crate::work::WorkQueue;
use interleave::{AtomicU32, LockClass, MaySleep, Mutex, Ordering, Sleep, SpinLock};
use mmu_notifier::{Access, IntervalIndex, Invalidation, Key, MmuNotifier, Ops, Range, WouldBlock};
use softmm::{FaultError, Foll, Mm, MmUser, UserPages};
use std::sync::{Arc, Weak};

static STRUCT_MUTEX: LockClass = LockClass::new("struct_mutex");
static MN_LOCK: LockClass = LockClass::new("i915_mmu_notifier.lock");
static LEAKED: LockClass = LockClass::new("i915 leaked pages");
static GET_PAGES_WORK: LockClass = LockClass::new("work: i915 get_pages");

/// I915_GEM_USERPTR_MAX_WORKERS.
const MAX_WORKERS: u32 = 15;

/// What it is.
pub static KIND: Kind = Kind {
    name: "i915-3.16",
    kernel: "3.16",
    summary: "pins for writing, unbinds at invalidate_range_start",
    holds: Holds::Pages,
    callbacks: Callbacks::of(&[Callback::Start]),
    reads: false,
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, Config::V3_16)?),
};

/// The same algorithm without three mistakes that have nothing to do with the mm.
pub static MENDED: Kind = Kind {
    name: "i915-3.16-mended",
    summary: "as i915-3.16, without its reference and scatter-list mistakes",
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, Config::MENDED)?),
    ..KIND
};

/// Which of the driver's choices and faults are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// How tables call it.
    pub kind: &'static Kind,
    /// READ_ONLY objects: refused, or got without FOLL_WRITE.
    pub read_only: ReadOnly,
    /// Bug 4, until 3.17: the callback's reference is taken on an object whose count may be zero.
    pub plain_reference: bool,
    /// Bug 5, until 3.17.7: pages that lie next to each other become one entry of the scatter list, and only the first page of
    /// an entry is put.
    pub puts_entries: bool,
    /// Bug 6, until 3.17: mmput, which may tear the address space down, under struct_mutex.
    pub mmput_under_struct_mutex: bool,
    /// Bug 3: get_user_pages, which may fault, under struct_mutex and not in a worker.
    pub gup_under_struct_mutex: bool,
    /// Bug 7: waits for the lock of a page to mark it dirty, in the callback too.
    pub locks_page: bool,
    /// Marks what the GPU wrote dirty when it puts it.
    pub sets_dirty: bool,
    /// Each batch begins with a flush of the TLB. Without: bug 8, until 5.17.
    pub flushes: bool,
}

/// What becomes of READ_ONLY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOnly {
    /// ENODEV.
    Refused,
    /// Pages are got for reading, and the GPU's page table can say so.
    Enforced,
    /// Pages are got for reading, and the GPU can write them all the same: why 3.16 refuses it.
    Unenforced,
}

impl PartialEq for Kind {
    fn eq(&self, other: &Kind) -> bool {
        self.name == other.name
    }
}

impl Eq for Kind {}

impl Config {
    /// As released.
    pub const V3_16: Config = Config {
        kind: &KIND,
        read_only: ReadOnly::Refused,
        plain_reference: true,
        puts_entries: true,
        mmput_under_struct_mutex: true,
        gup_under_struct_mutex: false,
        locks_page: false,
        sets_dirty: true,
        flushes: true,
    };

    /// With the fixes of 3.17 to the last three.
    pub const MENDED: Config = Config {
        kind: &MENDED,
        plain_reference: false,
        puts_entries: false,
        mmput_under_struct_mutex: false,
        ..Config::V3_16
    };
}

/// See the module.
pub struct I915 {
    me: Weak<I915>,
    config: Config,
    options: Options,
    context: DeviceContext,
    struct_mutex: Mutex<Gem>,
    mn: SpinLock<IntervalIndex<Arc<Object>>>,
    work: WorkQueue,
    registered: Registered,
    /// Pages that nobody will ever put.
    leaked: SpinLock<Vec<UserPages>>,
}

/// A GEM object as the interval tree knows it.
struct Object {
    binding: Binding,
    range: Range,
    access: Access,
    /// drm_gem_object.refcount: the handle, each worker, each callback that is at it.
    refcount: AtomicU32,
}

/// Protected by struct_mutex.
#[derive(Default)]
struct Gem {
    next_work: u64,
    objects: Bindings<ObjectState>,
}

struct ObjectState {
    object: Arc<Object>,
    in_tree: Key,
    /// mm_users, until the object is freed.
    mm: MmUser,
    has_handle: bool,
    pages: Option<UserPages>,
    /// The GPU's page table has them.
    bound: bool,
    dirty: bool,
    work: Work,
    workers: u32,
    had_pages: bool,
}

/// obj->userptr.work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    None,
    Pending(u64),
    Failed(FaultError),
}

impl I915 {
    /// Registers with `mm`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        cx: &mut MaySleep<'_>,
        mm: &Arc<Mm>,
        device: &Arc<Device>,
        options: Options,
        config: Config,
    ) -> Result<Arc<I915>, OpenError> {
        let driver = I915::unregistered(cx, mm, device, options, config);
        driver.registered.register(cx, &driver, options)?;
        Ok(driver)
    }

    /// For a driver that adds callbacks and registers them all by itself.
    pub(crate) fn unregistered(
        cx: &mut MaySleep<'_>,
        mm: &Arc<Mm>,
        device: &Arc<Device>,
        options: Options,
        config: Config,
    ) -> Arc<I915> {
        let context = DeviceContext::open(cx, device, mm, config.kind.name, Root::Own);
        let context = if config.flushes { context.flushing_at_start() } else { context };
        Arc::new_cyclic(|me| I915 {
            me: me.clone(),
            config,
            options,
            context,
            struct_mutex: Mutex::new(&STRUCT_MUTEX, Gem::default()),
            mn: SpinLock::new(&MN_LOCK, IntervalIndex::new()),
            work: WorkQueue::new("i915 worker", &GET_PAGES_WORK, options.work),
            registered: Registered::not_yet(),
            leaked: SpinLock::new(&LEAKED, Vec::new()),
        })
    }

    fn foll(access: Access) -> Foll {
        if access == Access::Write { Foll::GET.write() } else { Foll::GET }
    }

    fn writable(&self, access: Access) -> bool {
        access == Access::Write || self.config.read_only == ReadOnly::Unenforced
    }

    /// i915_gem_userptr_get_pages.
    fn get_pages(&self, cx: &mut MaySleep<'_>, gem: &mut Gem, binding: Binding) -> Result<(), SubmitError> {
        let Gem { next_work, objects, .. } = gem;
        let state = objects.get_mut(&binding).ok_or(SubmitError::NotBound(binding))?;
        let Object { range, access, .. } = *state.object;
        if self.config.gup_under_struct_mutex {
            let got = self.context.mm().get_user_pages(cx, range, I915::foll(access))?;
            self.set_pages(state, got);
            return Ok(());
        }
        let cpus = self.context.mm().machine().cpus();
        let cpu = &cpus[self.options.cpu % cpus.len()];
        let got = self.context.mm().get_user_pages_fast_only(cx, cpu, range, I915::foll(access));
        if got.len() as u64 == range.pages() {
            self.set_pages(state, got);
            state.work = Work::None;
            return Ok(());
        }
        drop(got);
        match state.work {
            Work::None if state.workers < MAX_WORKERS => {
                *next_work += 1;
                let id = *next_work;
                state.work = Work::Pending(id);
                state.workers += 1;
                let object = state.object.clone();
                object.refcount.fetch_add(1, Ordering::SeqCst);
                if let Some(me) = self.me.upgrade() {
                    self.work.queue(cx, move |cx| me.worker(cx, &object, id));
                }
                Err(SubmitError::Again)
            }
            Work::None | Work::Pending(_) => Err(SubmitError::Again),
            Work::Failed(error) => {
                state.work = Work::None;
                Err(SubmitError::Fault(error))
            }
        }
    }

    fn set_pages(&self, state: &mut ObjectState, pages: UserPages) {
        if std::mem::replace(&mut state.had_pages, true) {
            self.context.counters().repinned(pages.len() as u64);
        }
        state.pages = Some(pages);
    }

    /// __i915_gem_userptr_get_pages_worker.
    fn worker(&self, cx: &mut MaySleep<'_>, object: &Arc<Object>, id: u64) {
        let got = self.context.mm().get_user_pages(cx, object.range, I915::foll(object.access));
        let mut gem = self.struct_mutex.lock(cx);
        let mut leftover = None;
        if let Some(state) = gem.objects.get_mut(&object.binding) {
            let mine = !changed(state.work != Work::Pending(id));
            state.work = Work::None;
            match got {
                Ok(pages) if mine => self.set_pages(state, pages),
                Err(error) if mine => state.work = Work::Failed(error),
                result => {
                    self.context.counters().cancelled(1);
                    leftover = result.ok();
                }
            }
            state.workers -= 1;
        }
        self.unreference(cx, &mut gem, object);
        drop(gem);
        drop(leftover);
    }

    /// i915_vma_unbind, i915_gem_object_put_pages.
    fn unbind_and_put(&self, cx: &mut MaySleep<'_>, state: &mut ObjectState) {
        let Some(pages) = state.pages.take() else { return };
        let object = &state.object;
        if std::mem::replace(&mut state.bound, false) {
            self.context.wait_idle(cx, Some(object.binding));
            self.context.unmap(cx, Some(object.binding), object.range);
        }
        let dirty = std::mem::replace(&mut state.dirty, false) && self.config.sets_dirty;
        self.put_pages(cx, pages, dirty);
    }

    fn put_pages(&self, cx: &mut MaySleep<'_>, mut pages: UserPages, dirty: bool) {
        if !self.config.puts_entries {
            if dirty && self.config.locks_page {
                pages.set_dirty_lock(cx);
            } else if dirty {
                pages.set_dirty();
            }
            return;
        }
        let frames: Vec<_> = pages.frames().map(|frame| frame.pfn.0).collect();
        let continues = |i: usize| i > 0 && frames[i] == frames[i - 1] + 1;
        let (mut leaked, mut lost) = (0, 0);
        for i in (0..frames.len()).rev() {
            let page = pages.split_off(i);
            if continues(i) {
                leaked += 1;
                lost += u32::from(dirty);
                self.leaked.lock(cx).push(page);
            } else if dirty {
                page.set_dirty();
            }
        }
        if leaked > 0 {
            self.context.bug(DriverBug::LeakedPins { pages: leaked });
        }
        if lost > 0 {
            self.context.bug(DriverBug::LostDirty { pages: lost });
        }
    }

    /// A reference for the callback, under the notifier's lock; whether the object may be used.
    fn reference(&self, object: &Object) -> bool {
        if !self.config.plain_reference {
            return get_unless_zero(&object.refcount);
        }
        if object.refcount.fetch_add(1, Ordering::SeqCst) == 0 {
            self.context.bug(DriverBug::RevivedObject);
        }
        true
    }

    /// drm_gem_object_unreference: the last one frees.
    fn unreference(&self, cx: &mut MaySleep<'_>, gem: &mut Gem, object: &Arc<Object>) {
        if object.refcount.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        let Some(mut state) = gem.objects.remove(&object.binding) else { return };
        self.unbind_and_put(cx, &mut state);
        self.mn.lock(cx).remove(state.in_tree);
        if self.config.mmput_under_struct_mutex {
            state.mm.mmput(cx);
        } else {
            self.work.queue(cx, move |cx| state.mm.mmput(cx));
        }
    }

    /// Cancels, unbinds and puts what overlaps `range`; the whole of the start callback.
    pub(crate) fn invalidate(&self, cx: &mut MaySleep<'_>, range: Range, by: Callback) {
        let mut start = range.start();
        while start < range.end()
            && let Ok(rest) = Range::new(start, range.end() - start)
        {
            let mn = self.mn.lock(cx);
            let Some(object) = mn.overlaps(rest).next().map(|(_, _, object)| object.clone()) else { break };
            let usable = self.reference(&object);
            drop(mn);
            start = object.range.end();
            if !usable {
                continue;
            }
            let mut gem = self.struct_mutex.lock(cx);
            match gem.objects.get_mut(&object.binding) {
                None => self.context.bug(DriverBug::UsedFreedObject),
                Some(state) => {
                    if state.pages.is_some() || state.work != Work::None {
                        self.context.effect(by);
                    }
                    state.work = Work::None;
                    self.unbind_and_put(cx, state);
                }
            }
            self.unreference(cx, &mut gem, &object);
        }
    }

    fn drop_handle(&self, cx: &mut MaySleep<'_>, gem: &mut Gem, binding: Binding) -> Result<(), SubmitError> {
        let state = gem.objects.get_mut(&binding).filter(|state| state.has_handle);
        let state = state.ok_or(SubmitError::NotBound(binding))?;
        state.has_handle = false;
        let object = state.object.clone();
        self.unreference(cx, gem, &object);
        Ok(())
    }
}

/// kref_get_unless_zero.
fn get_unless_zero(refcount: &AtomicU32) -> bool {
    let mut seen = refcount.load(Ordering::SeqCst);
    while seen > 0 {
        match refcount.compare_exchange(seen, seen + 1, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => return true,
            Err(now) => seen = now,
        }
    }
    false
}

impl MmuNotifier for I915 {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        // Kernels of its time never ask for this: until 4.18 the oom reaper leaves an mm with notifiers alone.
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        self.invalidate(cx, inv.range, Callback::Start);
        Ok(())
    }
}

impl Driver for I915 {
    fn kind(&self) -> &'static Kind {
        self.config.kind
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        if access == Access::Read && self.config.read_only == ReadOnly::Refused {
            return Err(BindError::ReadOnly(range));
        }
        let mm = self.context.mm().mmget().ok_or(BindError::Exited(range))?;
        let mut gem = self.struct_mutex.lock(cx);
        let binding = gem.objects.reserve();
        let object = Arc::new(Object { binding, range, access, refcount: AtomicU32::new(1) });
        let mut mn = self.mn.lock(cx);
        let overlapping = mn.overlaps(range).next().map(|(_, _, object)| object.binding);
        if let Some(other) = overlapping {
            drop(mn);
            let busy = gem.objects.get(&other).is_some_and(|state| state.workers > 0);
            drop(gem);
            mm.mmput(cx);
            return Err(if busy { BindError::Again(range) } else { BindError::Overlaps(range) });
        }
        let in_tree = mn.insert(range, object.clone());
        drop(mn);
        let state = ObjectState {
            object,
            in_tree,
            mm,
            has_handle: true,
            pages: None,
            bound: false,
            dirty: false,
            work: Work::None,
            workers: 0,
            had_pages: false,
        };
        gem.objects.insert(binding, state);
        Ok(binding)
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        let mut gem = self.struct_mutex.lock(cx);
        self.drop_handle(cx, &mut gem, binding)
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let mut gem = self.struct_mutex.lock(cx);
        let state = gem.objects.get(&binding).filter(|state| state.has_handle);
        let state = state.ok_or(SubmitError::NotBound(binding))?;
        let access = if self.writable(state.object.access) { Access::Write } else { Access::Read };
        check_ops(self.context.mm(), state.object.range, access, ops)?;
        if state.pages.is_none() {
            self.get_pages(cx, &mut gem, binding)?;
        }
        let state = gem.objects.get_mut(&binding).ok_or(SubmitError::NotBound(binding))?;
        if let Some(pages) = &state.pages
            && !std::mem::replace(&mut state.bound, true)
        {
            for (page, frame) in state.object.range.iter_pages().zip(pages.frames()) {
                self.context.map(cx, binding, page, frame, self.writable(state.object.access));
            }
        }
        state.dirty |= ops.iter().any(|op| op.access() == Access::Write);
        Ok(self.context.submit(cx, binding, ops))
    }

    fn run_work(&self, cx: &mut MaySleep<'_>) -> bool {
        self.work.run_one(cx)
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        let mut gem = self.struct_mutex.lock(cx);
        let open: Vec<_> = gem.objects.iter().filter(|(_, s)| s.has_handle).map(|(&b, _)| b).collect();
        for binding in open {
            let _ = self.drop_handle(cx, &mut gem, binding);
        }
        drop(gem);
        self.work.flush(cx);
        self.registered.unregister(cx);
        self.context.forget_requests(cx);
    }
}
