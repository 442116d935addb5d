// SPDX-License-Identifier: MIT OR Apache-2.0
//! i915 userptr since Linux 5.13: an interval notifier per object, pins that stay, and a check when work is submitted.
//!
//! invalidate: a range that must not block is refused. notifier_lock for writing; move the sequence; unlock. Until 6.8, unless the
//! process is exiting: wait until the GPU is done with the object. It does **not** unbind: the pins stay until the next submission.
//! Since 6.10 it does not wait either: the GPU may go on with pages that the process has no longer.
//!
//! Execbuf (`submit`):
//! 1. read_begin: waits while an invalidation of the object's range is in flight.
//! 2. The object's reservation: has the sequence not moved and are there pages? Then they are good, go to 5. Else wait for the GPU,
//!    unbind the object, unpin its old pages.
//! 3. With no lock: pin_user_pages_fast, for writing unless READ_ONLY.
//! 4. Reservation again: read_retry? EAGAIN. Else these are the object's pages, as of that sequence.
//! 5. Write the GPU's page table. notifier_lock for reading: **read_retry once more**? EAGAIN. Queue the request; unlock.
//!
//! The last check and the queueing are one section of notifier_lock, under which the sequence moves: a request is either seen by the
//! callback, which waits for it, or it is not made. (The kernel attaches the request's fence first and then checks.)
//!
//! Lock order: mmap_lock > mmu_notifier_invalidate_range_start > notifier_lock; reservation > notifier_lock. Pages are pinned under none.
//!
//! Not modelled: page_ref and several submissions sharing one set of pages; PROBE; relocation.

use crate::bindings::Bindings;
use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Holds, Kind, Options, SubmitError, check_ops, in_process};
use crate::engine::RequestId;
use crate::listener::{IntervalDriver, IntervalListener};
use crate::op::{Binding, DeviceOp};
use crate::site::changed;
use interleave::{LockClass, MaySleep, Mutex, Sleep, SpinLock};
use mmu_notifier::{Access, Event, IntervalNotifier, Invalidation, Range, Seq, SeqMoved, SetSeq, WouldBlock};
use softmm::{Foll, Mm, UserPages};
use std::sync::{Arc, Weak};

static HANDLES: LockClass = LockClass::new("i915 handles");
static RESERVATION: LockClass = LockClass::new("reservation_ww_class_mutex");
static NOTIFIER_LOCK: LockClass = LockClass::new("i915 notifier_lock");

/// What it is.
pub static KIND: Kind = Kind {
    name: "i915-5.13",
    kernel: "5.13 to 6.8",
    summary: "pins until the next submission; callback waits for the GPU",
    holds: Holds::Pages,
    callbacks: Callbacks::of(&[Callback::Invalidate]),
    reads: true,
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, &KIND, true)),
};

/// Since 6.10.
pub static KIND_6_10: Kind = Kind {
    name: "i915-6.10",
    kernel: "6.10 to 6.18",
    summary: "as i915-5.13; the callback moves the sequence and waits for nothing",
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, &KIND_6_10, false)),
    ..KIND
};

/// See the module.
pub struct I915 {
    me: Weak<I915>,
    kind: &'static Kind,
    /// The callback waits for the GPU.
    waits: bool,
    options: Options,
    context: DeviceContext,
    /// One for the device.
    notifier_lock: SpinLock<()>,
    handles: Mutex<Bindings<Arc<Handle>>>,
}

struct Handle {
    object: Arc<Object>,
    notifier: IntervalNotifier,
}

/// What the callback works on.
pub(crate) struct Object {
    binding: Binding,
    range: Range,
    access: Access,
    reservation: Mutex<State>,
}

/// Protected by the reservation.
#[derive(Default)]
struct State {
    pages: Option<(UserPages, Seq)>,
    bound: bool,
    dirty: bool,
    had_pages: bool,
}

impl I915 {
    /// A driver without objects. `waits`: the callback waits for the GPU.
    pub fn open(
        cx: &mut MaySleep<'_>,
        mm: &Arc<Mm>,
        device: &Arc<Device>,
        options: Options,
        kind: &'static Kind,
        waits: bool,
    ) -> Arc<I915> {
        let context = DeviceContext::open(cx, device, mm, kind.name, Root::Own).flushing_at_start();
        let notifier_lock = SpinLock::new(&NOTIFIER_LOCK, ());
        let handles = Mutex::new(&HANDLES, Bindings::default());
        Arc::new_cyclic(|me| I915 { me: me.clone(), kind, waits, options, context, notifier_lock, handles })
    }

    /// i915_gem_object_userptr_unbind: pages that are out of date go.
    fn unbind_and_unpin(&self, cx: &mut MaySleep<'_>, object: &Object, state: &mut State) {
        let Some((pages, _)) = state.pages.take() else { return };
        if std::mem::replace(&mut state.bound, false) {
            self.context.wait_idle(cx, Some(object.binding));
            self.context.unmap(cx, Some(object.binding), object.range);
        }
        if std::mem::replace(&mut state.dirty, false) {
            pages.set_dirty();
        }
    }

    /// i915_gem_object_userptr_submit_init: the object has pages that were good at some sequence.
    fn submit_init(&self, cx: &mut MaySleep<'_>, handle: &Handle) -> Result<Seq, SubmitError> {
        let object = &handle.object;
        let seq = handle.notifier.read_begin(cx).map_err(|_| SubmitError::Again)?;
        let mut state = object.reservation.lock(cx);
        if state.pages.as_ref().is_some_and(|(_, of)| !changed(*of != seq)) {
            return Ok(seq);
        }
        self.unbind_and_unpin(cx, object, &mut state);
        drop(state);
        let foll = if object.access == Access::Write { Foll::PIN.write() } else { Foll::PIN };
        let mm = self.context.mm();
        let cpu = &mm.machine().cpus()[self.options.cpu % mm.machine().cpus().len()];
        let pages = mm.get_user_pages_fast(cx, cpu, object.range, foll)?;
        let mut state = object.reservation.lock(cx);
        if handle.notifier.read_retry(seq) {
            self.context.counters().retried(1);
            drop(state);
            return Err(SubmitError::Again);
        }
        if state.pages.is_none() {
            if std::mem::replace(&mut state.had_pages, true) {
                self.context.counters().repinned(pages.len() as u64);
            }
            state.pages = Some((pages, seq));
        }
        Ok(seq)
    }

    fn close_handle(&self, cx: &mut MaySleep<'_>, handle: &Handle) {
        // Refused in a callback only; the notifier goes with the handle all the same.
        let _ = handle.notifier.remove(cx);
        let mut state = handle.object.reservation.lock(cx);
        self.unbind_and_unpin(cx, &handle.object, &mut state);
    }

    /// i915_gem_do_execbuffer.
    fn execbuf(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let handle = self.handles.lock(cx).get(&binding).cloned();
        let handle = handle.ok_or(SubmitError::NotBound(binding))?;
        let object = &handle.object;
        check_ops(self.context.mm(), object.range, object.access, ops)?;
        let seq = self.submit_init(cx, &handle)?;
        let mut state = object.reservation.lock(cx);
        let State { pages, bound, dirty, .. } = &mut *state;
        let Some((pages, _)) = pages.as_ref().filter(|(_, of)| !changed(*of != seq)) else {
            return Err(SubmitError::Again);
        };
        if !std::mem::replace(bound, true) {
            for (page, frame) in object.range.iter_pages().zip(pages.frames()) {
                self.context.map(cx, binding, page, frame, object.access == Access::Write);
            }
        }
        *dirty |= ops.iter().any(|op| op.access() == Access::Write);
        // i915_gem_object_userptr_submit_done.
        let mut notifier_lock = self.notifier_lock.lock(cx);
        let (_, cx) = notifier_lock.split();
        if handle.notifier.read_retry(seq) {
            self.context.counters().retried(1);
            return Err(SubmitError::Again);
        }
        Ok(self.context.submit(cx, binding, ops))
    }
}

impl IntervalDriver for I915 {
    type Object = Object;

    fn invalidate(
        &self,
        object: &Object,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        let moved = {
            let _notifier_lock = self.notifier_lock.lock(cx);
            seq.set()
        };
        self.context.effect(Callback::Invalidate);
        if self.waits && inv.event != Some(Event::Release) {
            self.context.wait_idle(cx, Some(object.binding));
        }
        Ok(moved)
    }
}

impl Driver for I915 {
    fn kind(&self) -> &'static Kind {
        self.kind
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        let binding = self.handles.lock(cx).reserve();
        let reservation = Mutex::new(&RESERVATION, State::default());
        let object = Arc::new(Object { binding, range, access, reservation });
        let listener = IntervalListener::new(self.me.clone(), object.clone(), self.options);
        let notifier = self.context.mm().notifiers().insert_interval(cx, range, listener);
        let notifier = notifier.map_err(|source| BindError::Register { range, source })?;
        self.handles.lock(cx).insert(binding, Arc::new(Handle { object, notifier }));
        Ok(binding)
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        let handle = self.handles.lock(cx).remove(&binding).ok_or(SubmitError::NotBound(binding))?;
        self.close_handle(cx, &handle);
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

    fn close(&self, cx: &mut MaySleep<'_>) {
        let objects = self.handles.lock(cx).take_all();
        for handle in objects.into_values() {
            self.close_handle(cx, &handle);
        }
        self.context.forget_requests(cx);
    }
}
