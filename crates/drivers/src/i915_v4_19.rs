// SPDX-License-Identifier: MIT OR Apache-2.0
//! i915 userptr of Linux 4.14 to 4.19: the callback no longer takes struct_mutex, it has work items do it and waits for them.
//!
//! Objects may overlap, hold mm_count (not mm_users), and are in the interval tree only while they are *active*: while they have pages or
//! a worker that gets them. READ_ONLY is honoured where the GPU's page table can say so (4.19).
//!
//! Execbuf (`submit`), struct_mutex and then the object's lock throughout:
//! 1. No pages? A pending worker: EAGAIN. A failed one: its error.
//! 2. get_user_pages_fast without faults. All there: the object's pages. Some missing: queue a worker, EAGAIN.
//! 3. Either way the object becomes active **now**: into the tree. Pages got before that are not covered: an invalidation that begins and ends
//!    between the two is heard by nobody. (Until 4.11 the object became active first.)
//! 4. Write the GPU's page table; queue the request.
//!
//! Worker: mmget_not_zero; mmap_lock for reading; get_user_pages; unlock; the object's lock: still the object's work? Then its pages.
//!
//! invalidate_range_start: spin lock; for each overlapping object queue a cancel work and take it out of the tree; unlock; **flush the
//! workqueue**. If the range must not block and an object overlaps: EAGAIN (4.19).
//! Cancel work: object's lock: was a worker pending? Cancel it, done. Else wait until the GPU is done with the object; struct_mutex;
//! unbind; object's lock: put the pages, inactive.
//!
//! There is no other callback. At exit the mm empties the list of notifiers and i915 has no release: its pins stay until
//! the object is closed.
//!
//! Lock order: mmap_lock > mmu_notifier_invalidate_range_start > work: cancel_userptr > struct_mutex > obj->mm.lock > i915_mmu_notifier.lock.
//!
//! Not modelled: as in [`crate::i915_v3_16`]; mm_lock and the hash of mms; what set struct_mutex against itself through a
//! GTT mapping over the object (bug 3), the reason for the work items: there are no GTT mappings here.

use crate::bindings::Bindings;
use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Holds, Kind, OpenError, Options, SubmitError, check_ops, in_process};
use crate::engine::RequestId;
use crate::listener::Registered;
use crate::op::{Binding, DeviceOp};
use crate::site::changed;
use crate::work::WorkQueue;
use interleave::{LockClass, MaySleep, Mutex, Sleep, SpinLock};
use mmu_notifier::{Access, IntervalIndex, Invalidation, Key, MmuNotifier, Ops, Range, WouldBlock};
use softmm::{FaultError, Foll, Mm, UserPages};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

static STRUCT_MUTEX: LockClass = LockClass::new("struct_mutex");
static OBJ_MM_LOCK: LockClass = LockClass::new("obj->mm.lock");
static MN_LOCK: LockClass = LockClass::new("i915_mmu_notifier.lock");
static CANCEL_WORK: LockClass = LockClass::new("work: i915 cancel_userptr");
static GET_PAGES_WORK: LockClass = LockClass::new("work: i915 get_pages");

/// What it is.
pub static KIND: Kind = Kind {
    name: "i915-4.19",
    kernel: "4.14 to 4.19",
    summary: "pins; unbinds in work items that the callback waits for",
    holds: Holds::Pages,
    callbacks: Callbacks::of(&[Callback::Start]),
    reads: true,
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options)?),
};

/// See the module.
pub struct I915 {
    me: Weak<I915>,
    options: Options,
    context: DeviceContext,
    struct_mutex: Mutex<Gem>,
    mn: SpinLock<Notifier>,
    release_wq: WorkQueue,
    acquire_wq: WorkQueue,
    registered: Registered,
}

/// Protected by struct_mutex.
#[derive(Default)]
struct Gem {
    objects: Bindings<Arc<Object>>,
}

/// Protected by i915_mmu_notifier.lock.
#[derive(Default)]
struct Notifier {
    objects: IntervalIndex<Arc<Object>>,
    attached: BTreeMap<Binding, Key>,
}

impl Notifier {
    /// add_object.
    fn attach(&mut self, object: &Arc<Object>) {
        if !self.attached.contains_key(&object.binding) {
            let key = self.objects.insert(object.range, object.clone());
            self.attached.insert(object.binding, key);
        }
    }

    /// del_object.
    fn detach(&mut self, binding: Binding) {
        if let Some(key) = self.attached.remove(&binding) {
            self.objects.remove(key);
        }
    }
}

struct Object {
    binding: Binding,
    range: Range,
    access: Access,
    mm_lock: Mutex<State>,
}

/// Protected by obj->mm.lock.
struct State {
    pages: Option<UserPages>,
    bound: bool,
    dirty: bool,
    work: Work,
    next_work: u64,
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
    ) -> Result<Arc<I915>, OpenError> {
        let context = DeviceContext::open(cx, device, mm, KIND.name, Root::Own).flushing_at_start();
        let driver = Arc::new_cyclic(|me| I915 {
            me: me.clone(),
            options,
            context,
            struct_mutex: Mutex::new(&STRUCT_MUTEX, Gem::default()),
            mn: SpinLock::new(&MN_LOCK, Notifier::default()),
            release_wq: WorkQueue::new("i915 release", &CANCEL_WORK, options.work),
            acquire_wq: WorkQueue::new("i915 acquire", &GET_PAGES_WORK, options.work),
            registered: Registered::not_yet(),
        });
        driver.registered.register(cx, &driver, options)?;
        Ok(driver)
    }

    fn foll(access: Access) -> Foll {
        if access == Access::Write { Foll::GET.write() } else { Foll::GET }
    }

    /// i915_gem_userptr_get_pages.
    fn get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        object: &Arc<Object>,
        state: &mut State,
    ) -> Result<(), SubmitError> {
        match state.work {
            Work::None => {}
            Work::Pending(_) => return Err(SubmitError::Again),
            Work::Failed(error) => return Err(SubmitError::Fault(error)),
        }
        let cpus = self.context.mm().machine().cpus();
        let cpu = &cpus[self.options.cpu % cpus.len()];
        let foll = I915::foll(object.access);
        let got = self.context.mm().get_user_pages_fast_only(cx, cpu, object.range, foll);
        let all = got.len() as u64 == object.range.pages();
        if all {
            self.set_pages(state, got);
        } else {
            drop(got);
            state.next_work += 1;
            state.work = Work::Pending(state.next_work);
            if let Some(me) = self.me.upgrade() {
                let (object, id) = (object.clone(), state.next_work);
                self.acquire_wq.queue(cx, move |cx| me.worker(cx, &object, id));
            }
        }
        self.mn.lock(cx).attach(object);
        if all { Ok(()) } else { Err(SubmitError::Again) }
    }

    fn set_pages(&self, state: &mut State, pages: UserPages) {
        if std::mem::replace(&mut state.had_pages, true) {
            self.context.counters().repinned(pages.len() as u64);
        }
        state.pages = Some(pages);
    }

    /// __i915_gem_userptr_get_pages_worker.
    fn worker(&self, cx: &mut MaySleep<'_>, object: &Arc<Object>, id: u64) {
        let got = match self.context.mm().mmget() {
            None => Err(FaultError::Unmapped(object.range.first_page())),
            Some(user) => {
                let got = user.get_user_pages(cx, object.range, I915::foll(object.access));
                user.mmput(cx);
                got
            }
        };
        let mut state = object.mm_lock.lock(cx);
        if changed(state.work != Work::Pending(id)) {
            self.context.counters().cancelled(1);
            drop(state);
            return;
        }
        state.work = Work::None;
        match got {
            Ok(pages) => self.set_pages(&mut state, pages),
            Err(error) => state.work = Work::Failed(error),
        }
    }

    /// cancel_userptr.
    fn cancel(&self, cx: &mut MaySleep<'_>, object: &Object) {
        let mut state = object.mm_lock.lock(cx);
        let active = std::mem::replace(&mut state.work, Work::None) != Work::None;
        drop(state);
        if active {
            self.context.effect(Callback::Start);
            return;
        }
        self.context.wait_idle(cx, Some(object.binding));
        let _gem = self.struct_mutex.lock(cx);
        let mut state = object.mm_lock.lock(cx);
        if state.pages.is_some() {
            self.context.effect(Callback::Start);
        }
        self.unbind_and_put(cx, object, &mut state);
    }

    /// i915_gem_object_unbind, __i915_gem_object_put_pages; under struct_mutex and the object's lock.
    fn unbind_and_put(&self, cx: &mut MaySleep<'_>, object: &Object, state: &mut State) {
        let Some(pages) = state.pages.take() else { return };
        if std::mem::replace(&mut state.bound, false) {
            self.context.wait_idle(cx, Some(object.binding));
            self.context.unmap(cx, Some(object.binding), object.range);
        }
        self.mn.lock(cx).detach(object.binding);
        if std::mem::replace(&mut state.dirty, false) {
            pages.set_dirty();
        }
    }

    fn close_object(&self, cx: &mut MaySleep<'_>, object: &Object) {
        let mut state = object.mm_lock.lock(cx);
        state.work = Work::None;
        self.unbind_and_put(cx, object, &mut state);
        drop(state);
        self.mn.lock(cx).detach(object.binding);
    }

    /// i915_gem_do_execbuffer.
    fn execbuf(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let gem = self.struct_mutex.lock(cx);
        let object = gem.objects.get(&binding).ok_or(SubmitError::NotBound(binding))?;
        check_ops(self.context.mm(), object.range, object.access, ops)?;
        let mut state = object.mm_lock.lock(cx);
        if state.pages.is_none() {
            self.get_pages(cx, object, &mut state)?;
        }
        let fresh = !std::mem::replace(&mut state.bound, true);
        if let Some(pages) = state.pages.as_ref().filter(|_| fresh) {
            for (page, frame) in object.range.iter_pages().zip(pages.frames()) {
                self.context.map(cx, binding, page, frame, object.access == Access::Write);
            }
        }
        state.dirty |= ops.iter().any(|op| op.access() == Access::Write);
        Ok(self.context.submit(cx, binding, ops))
    }
}

impl MmuNotifier for I915 {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let mut mn = self.mn.lock(&mut cx);
        let (notifier, atomic) = mn.split();
        let hit: Vec<_> = notifier.objects.overlaps(inv.range).map(|(_, _, object)| object.clone()).collect();
        if hit.is_empty() {
            return Ok(());
        }
        if !inv.blockable {
            return Err(WouldBlock);
        }
        for object in hit {
            notifier.detach(object.binding);
            if let Some(me) = self.me.upgrade() {
                self.release_wq.queue(atomic, move |cx| me.cancel(cx, &object));
            }
        }
        drop(mn);
        match cx {
            Sleep::May(cx) => {
                self.release_wq.flush(cx);
                Ok(())
            }
            Sleep::TryOnly(_) => Err(WouldBlock),
        }
    }
}

impl Driver for I915 {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        let mut gem = self.struct_mutex.lock(cx);
        let binding = gem.objects.reserve();
        let state = State {
            pages: None,
            bound: false,
            dirty: false,
            work: Work::None,
            next_work: 0,
            had_pages: false,
        };
        let object = Object { binding, range, access, mm_lock: Mutex::new(&OBJ_MM_LOCK, state) };
        gem.objects.insert(binding, Arc::new(object));
        Ok(binding)
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        let mut gem = self.struct_mutex.lock(cx);
        let object = gem.objects.remove(&binding).ok_or(SubmitError::NotBound(binding))?;
        self.close_object(cx, &object);
        Ok(())
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let execbuf = |cx: &mut MaySleep<'_>| self.execbuf(cx, binding, ops);
        in_process(cx, self.context.mm(), execbuf).unwrap_or(Err(SubmitError::Exited))
    }

    fn run_work(&self, cx: &mut MaySleep<'_>) -> bool {
        self.acquire_wq.run_one(cx) || self.release_wq.run_one(cx)
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        let mut gem = self.struct_mutex.lock(cx);
        for object in gem.objects.take_all().into_values() {
            self.close_object(cx, &object);
        }
        drop(gem);
        self.acquire_wq.flush(cx);
        self.release_wq.flush(cx);
        self.registered.unregister(cx);
        self.context.forget_requests(cx);
    }
}
