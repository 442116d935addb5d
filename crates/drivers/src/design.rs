// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the designs that the exchange of 2014 weighs have in common: a GPU that pins what it uses, so that only the callbacks
//! differ from one to the next.
//!
//! All but the atomic one are built on this: objects under one mutex, a GPU that has to be waited for, pages got without the
//! mutex. As i915 has it, getting pages is cancelled by an invalidation that comes meanwhile; what a design adds to that is in
//! its own file.
//!
//! Submit: mutex; no pages? Note that they are being got; unlock; get_user_pages_fast; mutex; still being got, and the design agrees?
//! Then they are the object's pages. Write the GPU's page table; queue the request; unlock.
//!
//! Lock order: mmap_lock > mmu_notifier_invalidate_range_start > design mutex > design flags (spin) > device TLB.

use crate::bindings::Bindings;
use crate::callbacks::Callback;
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Kind, OpenError, Options, SubmitError, check_ops, in_process};
use crate::engine::RequestId;
use crate::listener::Registered;
use crate::op::{Binding, DeviceOp};
use crate::site::changed;
use interleave::{LockClass, MaySleep, Mutex, MutexGuard};
use mmu_notifier::{Access, MmuNotifier, Range};
use softmm::{Foll, Mm, UserPages};
use std::sync::Arc;

static MUTEX: LockClass = LockClass::new("design mutex");

/// The GPU of a design, and its objects.
pub(crate) struct Gpu {
    kind: &'static Kind,
    cpu: usize,
    pub(crate) context: DeviceContext,
    objects: Mutex<Objects>,
    registered: Registered,
}

/// Protected by the design's mutex.
#[derive(Default)]
struct Objects {
    next_get: u64,
    released: bool,
    map: Bindings<Object>,
}

struct Object {
    range: Range,
    access: Access,
    pages: Option<UserPages>,
    dirty: bool,
    /// Who gets its pages, unless cancelled since.
    getting: Option<u64>,
    had_pages: bool,
}

/// The design that `make` builds around a GPU without objects; registers it with `mm`.
pub(crate) fn open<D: Design + MmuNotifier + 'static>(
    cx: &mut MaySleep<'_>,
    mm: &Arc<Mm>,
    device: &Arc<Device>,
    kind: &'static Kind,
    options: Options,
    make: impl FnOnce(Gpu) -> Arc<D>,
) -> Result<Arc<D>, OpenError> {
    let driver = make(Gpu {
        kind,
        cpu: options.cpu,
        context: DeviceContext::open(cx, device, mm, kind.name, Root::Own).flushing_at_start(),
        objects: Mutex::new(&MUTEX, Objects::default()),
        registered: Registered::not_yet(),
    });
    driver.gpu().registered.register(cx, &driver, options)?;
    Ok(driver)
}

impl Gpu {
    pub(crate) fn bind(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        access: Access,
    ) -> Result<Binding, BindError> {
        let mut objects = self.objects.lock(cx);
        if objects.released {
            return Err(BindError::Exited(range));
        }
        let object = Object { range, access, pages: None, dirty: false, getting: None, had_pages: false };
        Ok(objects.map.add(object))
    }

    pub(crate) fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        let mut objects = self.objects.lock(cx);
        let mut object = objects.map.remove(&binding).ok_or(SubmitError::NotBound(binding))?;
        self.let_go(cx, binding, &mut object);
        Ok(())
    }

    /// `begin` runs before pages are got, without a lock; `agrees` runs under the mutex before they are used, with what `begin`
    /// returned; `ready` runs under the mutex before the request is queued.
    pub(crate) fn submit<S>(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
        begin: impl FnOnce(&mut MaySleep<'_>) -> S,
        agrees: impl FnOnce(&mut MaySleep<'_>, S, Range) -> bool,
        ready: impl FnOnce(&mut MaySleep<'_>, Binding) -> bool,
    ) -> Result<RequestId, SubmitError> {
        let execbuf = |cx: &mut MaySleep<'_>| self.execbuf(cx, binding, ops, begin, agrees, ready);
        in_process(cx, self.context.mm(), execbuf).unwrap_or(Err(SubmitError::Exited))
    }

    fn execbuf<S>(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
        begin: impl FnOnce(&mut MaySleep<'_>) -> S,
        agrees: impl FnOnce(&mut MaySleep<'_>, S, Range) -> bool,
        ready: impl FnOnce(&mut MaySleep<'_>, Binding) -> bool,
    ) -> Result<RequestId, SubmitError> {
        let mut objects = self.objects.lock(cx);
        let Objects { next_get, map, released, .. } = &mut *objects;
        let object = map.get_mut(&binding).ok_or(SubmitError::NotBound(binding))?;
        if *released {
            return Err(SubmitError::Exited);
        }
        check_ops(self.context.mm(), object.range, object.access, ops)?;
        if object.pages.is_none() {
            *next_get += 1;
            let (id, range, access) = (*next_get, object.range, object.access);
            object.getting = Some(id);
            drop(objects);
            let seen = begin(cx);
            let foll = if access == Access::Write { Foll::GET.write() } else { Foll::GET };
            let mm = self.context.mm();
            let cpu = &mm.machine().cpus()[self.cpu % mm.machine().cpus().len()];
            let got = mm.get_user_pages_fast(cx, cpu, range, foll);
            objects = self.install(cx, binding, id, range, got?, |cx| agrees(cx, seen, range))?;
        }
        if !ready(cx, binding) {
            return Err(SubmitError::Again);
        }
        if let Some(object) = objects.map.get_mut(&binding) {
            object.dirty |= ops.iter().any(|op| op.access() == Access::Write);
        }
        Ok(self.context.submit(cx, binding, ops))
    }

    fn install(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        id: u64,
        range: Range,
        pages: UserPages,
        agrees: impl FnOnce(&mut MaySleep<'_>) -> bool,
    ) -> Result<MutexGuard<'_, Objects>, SubmitError> {
        let mut objects = self.objects.lock(cx);
        let object = objects.map.get_mut(&binding).ok_or(SubmitError::NotBound(binding))?;
        if changed(object.getting != Some(id)) || !agrees(cx) {
            self.context.counters().retried(1);
            return Err(SubmitError::Again);
        }
        object.getting = None;
        if std::mem::replace(&mut object.had_pages, true) {
            self.context.counters().repinned(pages.len() as u64);
        }
        for (page, frame) in range.iter_pages().zip(pages.frames()) {
            self.context.map(cx, binding, page, frame, object.access == Access::Write);
        }
        object.pages = Some(pages);
        Ok(objects)
    }

    /// Waits for the GPU, unbinds and unpins every object that overlaps `range`; cancels who gets their pages. Whether there was anything.
    pub(crate) fn drop_range(&self, cx: &mut MaySleep<'_>, range: Range) -> bool {
        let mut objects = self.objects.lock(cx);
        let mut any = false;
        for (&binding, object) in objects.map.iter_mut().filter(|(_, object)| object.range.overlaps(range)) {
            any |= object.getting.take().is_some() | object.pages.is_some();
            self.let_go(cx, binding, object);
        }
        any
    }

    /// The object of `binding` alone.
    pub(crate) fn drop_object(&self, cx: &mut MaySleep<'_>, binding: Binding) {
        let mut objects = self.objects.lock(cx);
        if let Some(object) = objects.map.get_mut(&binding) {
            object.getting = None;
            self.let_go(cx, binding, object);
        }
    }

    fn let_go(&self, cx: &mut MaySleep<'_>, binding: Binding, object: &mut Object) {
        let Some(pages) = object.pages.take() else { return };
        self.context.wait_idle(cx, Some(binding));
        self.context.unmap(cx, Some(binding), object.range);
        if std::mem::replace(&mut object.dirty, false) {
            pages.set_dirty();
        }
    }

    /// The mm dies.
    pub(crate) fn release(&self, cx: &mut MaySleep<'_>) {
        self.objects.lock(cx).released = true;
        if self.drop_range(cx, Range::ALL) {
            self.context.effect(Callback::Release);
        }
    }

    pub(crate) fn close(&self, cx: &mut MaySleep<'_>) {
        self.drop_range(cx, Range::ALL);
        self.objects.lock(cx).map.clear();
        self.registered.unregister(cx);
        self.context.forget_requests(cx);
    }
}

/// A design built on [`Gpu`].
pub(crate) trait Design: Send + Sync {
    /// Its GPU.
    fn gpu(&self) -> &Gpu;

    /// [`Driver::submit`].
    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError>;

    /// An object was bound.
    fn bound(&self, cx: &mut MaySleep<'_>, binding: Binding, range: Range) {
        let _ = (cx, binding, range);
    }

    /// [`Driver::run_work`].
    fn run_work(&self, cx: &mut MaySleep<'_>) -> bool {
        let _ = cx;
        false
    }

    /// Ends what runs by itself, before everything is closed.
    fn stop(&self, cx: &mut MaySleep<'_>) {
        let _ = cx;
    }
}

impl<D: Design> Driver for D {
    fn kind(&self) -> &'static Kind {
        self.gpu().kind
    }

    fn context(&self) -> &DeviceContext {
        &self.gpu().context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        let binding = self.gpu().bind(cx, range, access)?;
        self.bound(cx, binding, range);
        Ok(binding)
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        self.gpu().unbind(cx, binding)
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        Design::submit(self, cx, binding, ops)
    }

    fn run_work(&self, cx: &mut MaySleep<'_>) -> bool {
        Design::run_work(self, cx)
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        self.stop(cx);
        self.gpu().close(cx);
    }
}
