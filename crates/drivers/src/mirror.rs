// SPDX-License-Identifier: MIT OR Apache-2.0
//! A driver of one's own: the smallest trait from which a checker can make a [`Driver`].
//!
//! For hardware that faults and goes on, driven through one interval notifier for each range that is bound
//! (mmu_interval_notifier, HMM). What the driver does when its device faults and when the mm changes is all there is to write; the
//! device's page table and TLB, the notifier and the work come with it, through the [`Port`].
//!
//! Lock order: whatever the driver has > device TLB. [`Mirror::fault`] is called with no lock held.

use crate::bindings::Bindings;
use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Holds, Kind, Options, SubmitError, submit_checked};
use crate::engine::RequestId;
use crate::hmm::dirty_if_written;
use crate::listener::{IntervalDriver, IntervalListener};
use crate::op::{Binding, DeviceFault, DeviceOp};
use interleave::{Context, LockClass, MaySleep, Mutex, Sleep};
use mmu_notifier::{
    Access, IntervalNotifier, Invalidation, PageAddr, Range, Seq, SeqMoved, SetSeq, WouldBlock,
};
use softmm::{FaultError, Foll, Mm, UserPages};
use std::sync::{Arc, Weak};

static BINDINGS: LockClass = LockClass::new("mirror bindings");

/// What somebody's driver does for one range. It is made anew for each range, and for each execution of a check: its locks
/// are made in [`Mirror::new`] and not in statics.
pub trait Mirror: Send + Sync + Sized + 'static {
    /// How it keeps the pages that its device uses.
    const HOLDS: Holds = Holds::Nothing;

    /// For one range.
    fn new() -> Self;

    /// The device has no translation of `page` for `access`: get the page and [`Port::map`] it. `Ok` is no promise: the device tries
    /// again, and faults again if nothing is mapped.
    ///
    /// # Errors
    /// [`FaultError`], if the process has no such memory: the access fails.
    fn fault(
        &self,
        cx: &mut MaySleep<'_>,
        port: &Port<'_>,
        page: PageAddr,
        access: Access,
    ) -> Result<(), FaultError>;

    /// Pages of `inv.range` are about to change (`mmu_interval_notifier_ops.invalidate`): move the sequence with `seq`, take the
    /// translations away, and let no access through them be in flight any more when this returns.
    ///
    /// Ranges that must not block are refused before they come here.
    fn invalidate(
        &self,
        cx: &mut MaySleep<'_>,
        port: &Port<'_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> SeqMoved;
}

/// One range of a device: its page table, its TLB, and the notifier of the range.
pub struct Port<'a> {
    context: &'a DeviceContext,
    binding: Binding,
    range: Range,
    notifier: Option<&'a IntervalNotifier>,
}

impl Port<'_> {
    /// What is bound.
    pub fn range(&self) -> Range {
        self.range
    }

    /// get_user_pages for one page: it faults it in, and holds a reference until it is dropped.
    ///
    /// # Errors
    /// [`FaultError`].
    pub fn get_page(
        &self,
        cx: &mut MaySleep<'_>,
        page: PageAddr,
        access: Access,
    ) -> Result<UserPages, FaultError> {
        let foll = if access == Access::Write { Foll::GET.write() } else { Foll::GET };
        self.context.mm().get_user_pages(cx, Range::page(page), foll)
    }

    /// mmu_interval_read_begin: waits while an invalidation of the range is in flight. In a callback, where it would wait for
    /// itself, it returns at once, and [`Port::read_retry`] will say "changed".
    #[track_caller]
    pub fn read_begin(&self, cx: &mut MaySleep<'_>) -> Seq {
        let seq = self.notifier.and_then(|notifier| notifier.read_begin(cx).ok());
        seq.unwrap_or(Seq::new(u64::MAX))
    }

    /// mmu_interval_read_retry: has the range been invalidated since? Ask under the lock under which the callback moves the
    /// sequence.
    #[track_caller]
    pub fn read_retry(&self, seq: Seq) -> bool {
        let changed = self.notifier.is_none_or(|notifier| notifier.read_retry(seq));
        if changed {
            self.context.counters().retried(1);
        }
        changed
    }

    /// Writes an entry of the device's page table.
    pub fn map(&self, cx: &mut impl Context, page: PageAddr, to: &UserPages, access: Access) {
        if let Some(frame) = to.frames().next() {
            self.context.map(cx, self.binding, page, frame, access == Access::Write);
        }
    }

    /// Takes the entries within `range` out of the device's page table; what was written is marked dirty. What the TLB has cached
    /// stays.
    pub fn unmap(&self, cx: &mut impl Context, range: Range) {
        let taken = self.context.unmap(cx, Some(self.binding), range);
        for (.., entry) in &taken {
            dirty_if_written(self.context, entry);
        }
        if !taken.is_empty() {
            self.context.effect(Callback::Invalidate);
        }
    }

    /// Flushes the device's TLB within `range`, and waits for accesses in flight.
    #[track_caller]
    pub fn flush(&self, cx: &mut impl Context, range: Range) {
        self.context.flush(cx, Some(self.binding), range);
    }
}

/// The [`Kind`] of somebody's driver.
pub fn kind<M: Mirror>() -> &'static Kind {
    Adapter::<M>::KIND
}

struct Adapter<M: Mirror> {
    me: Weak<Adapter<M>>,
    options: Options,
    context: DeviceContext,
    bindings: Mutex<Bindings<Arc<Bound<M>>>>,
}

struct Bound<M> {
    object: Arc<Object<M>>,
    notifier: IntervalNotifier,
}

/// What the callback works on.
pub(crate) struct Object<M> {
    binding: Binding,
    range: Range,
    access: Access,
    mirror: M,
}

impl<M: Mirror> Adapter<M> {
    const KIND: &'static Kind = &Kind {
        name: "own",
        kernel: "none",
        summary: "a driver of one's own, on an interval notifier",
        holds: M::HOLDS,
        callbacks: Callbacks::of(&[Callback::Invalidate]),
        reads: true,
        open: |cx, mm, device, options| Ok(Adapter::<M>::open(cx, mm, device, options)),
    };

    fn open(cx: &mut MaySleep<'_>, mm: &Arc<Mm>, device: &Arc<Device>, options: Options) -> Arc<Adapter<M>> {
        let context = DeviceContext::open(cx, device, mm, Self::KIND.name, Root::Own);
        let bindings = Mutex::new(&BINDINGS, Bindings::default());
        Arc::new_cyclic(|me| Adapter { me: me.clone(), options, context, bindings })
    }

    fn bound(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Option<Arc<Bound<M>>> {
        self.bindings.lock(cx).get(&binding).cloned()
    }

    fn port<'a>(&'a self, object: &Object<M>, notifier: Option<&'a IntervalNotifier>) -> Port<'a> {
        Port { context: &self.context, binding: object.binding, range: object.range, notifier }
    }
}

impl<M: Mirror> IntervalDriver for Adapter<M> {
    type Object = Object<M>;

    fn invalidate(
        &self,
        object: &Object<M>,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        Ok(object.mirror.invalidate(cx, &self.port(object, None), inv, seq))
    }
}

impl<M: Mirror> Driver for Adapter<M> {
    fn kind(&self) -> &'static Kind {
        Self::KIND
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        let binding = self.bindings.lock(cx).reserve();
        let object = Arc::new(Object { binding, range, access, mirror: M::new() });
        let listener = IntervalListener::new(self.me.clone(), object.clone(), self.options);
        let notifier = self.context.mm().notifiers().insert_interval(cx, range, listener);
        let notifier = notifier.map_err(|source| BindError::Register { range, source })?;
        self.bindings.lock(cx).insert(binding, Arc::new(Bound { object, notifier }));
        Ok(binding)
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        let bound = self.bindings.lock(cx).remove(&binding);
        let bound = bound.ok_or(SubmitError::NotBound(binding))?;
        // While the notifier is there: no page that was written may be freed before it is marked.
        let port = self.port(&bound.object, None);
        port.unmap(cx, bound.object.range);
        port.flush(cx, bound.object.range);
        // Refused in a callback only; the notifier goes with the binding all the same.
        let _ = bound.notifier.remove(cx);
        Ok(())
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let bound = self.bound(cx, binding).ok_or(SubmitError::NotBound(binding))?;
        submit_checked(cx, &self.context, binding, bound.object.range, bound.object.access, ops)
    }

    fn device_fault(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        page: PageAddr,
        access: Access,
    ) -> Result<(), DeviceFault> {
        let missing = DeviceFault::NoTranslation { page, access };
        let bound = self.bound(cx, binding).ok_or(missing)?;
        let user = self.context.mm().mmget().ok_or(missing)?;
        let port = self.port(&bound.object, Some(&bound.notifier));
        let result = bound.object.mirror.fault(cx, &port, page, access);
        user.mmput(cx);
        result.map_err(|source| DeviceFault::Refused { page, source })
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        let open: Vec<_> = self.bindings.lock(cx).keys().copied().collect();
        for binding in open {
            let _ = self.unbind(cx, binding);
        }
        self.context.forget_requests(cx);
    }
}
