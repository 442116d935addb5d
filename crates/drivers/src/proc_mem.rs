// SPDX-License-Identifier: MIT OR Apache-2.0
//! /proc/PID/mem and ptrace: access_remote_vm, which reads and writes memory of a process by force.
//!
//! No binding outlives an access: get_user_pages with FOLL_FORCE (and FOLL_WRITE), copy through the page, put. A write to a private
//! mapping that is not writable must break copy-on-write first and land in the process's own page. Until 4.8 it could end in the
//! page cache, if MADV_DONTNEED took the copy between the fault and the second look (bug 41).
//!
//! No notifier: what happens to the mapping after get_user_pages is the caller's affair, the page is held.
//!
//! Lock order: the bindings' lock is held over nothing.

use crate::bindings::Bindings;
use crate::callbacks::Callbacks;
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Holds, Kind, SubmitError, check_ops, in_process};
use crate::engine::{RequestId, refuse};
use crate::op::{Binding, DeviceFault, DeviceOp};
use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::{Access, Range};
use softmm::{Foll, Mm, UserPages};
use std::collections::BTreeMap;
use std::sync::Arc;

static FILES: LockClass = LockClass::new("proc_mem files");

/// What it is.
pub static KIND: Kind = Kind {
    name: "proc-mem",
    kernel: "2.6.39",
    summary: "get_user_pages by force for each access",
    holds: Holds::Pages,
    callbacks: Callbacks::NONE,
    reads: true,
    open: |cx, mm, device, _| Ok(ProcMem::open(cx, mm, device)),
};

/// See the module.
pub struct ProcMem {
    context: DeviceContext,
    files: Mutex<Files>,
}

#[derive(Default)]
struct Files {
    open: Bindings<(Range, Access)>,
    /// Pages of accesses that are not over.
    held: BTreeMap<RequestId, (Binding, UserPages)>,
}

impl ProcMem {
    /// Nothing is registered.
    pub fn open(cx: &mut MaySleep<'_>, mm: &Arc<Mm>, device: &Arc<Device>) -> Arc<ProcMem> {
        let context = DeviceContext::open(cx, device, mm, KIND.name, Root::Own).following_pages();
        Arc::new(ProcMem { context, files: Mutex::new(&FILES, Files::default()) })
    }

    fn put(&self, cx: &mut MaySleep<'_>, request: RequestId) {
        let held = self.files.lock(cx).held.remove(&request);
        if let Some((binding, pages)) = held {
            let gone = self.context.unmap(cx, Some(binding), Range::ALL);
            self.context.flush(cx, Some(binding), Range::ALL);
            if gone.iter().any(|(_, _, entry)| entry.writable) {
                pages.set_dirty_lock(cx);
            }
        }
    }

    fn access_remote_vm(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let known = self.files.lock(cx).open.get(&binding).copied();
        let (range, access) = known.ok_or(SubmitError::NotBound(binding))?;
        check_ops(self.context.mm(), range, access, ops)?;
        let writes = ops.iter().any(|op| op.access() == Access::Write);
        let foll = if writes { Foll::GET.write().force() } else { Foll::GET.force() };
        let pages = self.context.mm().get_user_pages(cx, range, foll)?;
        for (page, frame) in range.iter_pages().zip(pages.frames()) {
            self.context.map(cx, binding, page, frame, writes);
        }
        let request = self.context.submit(cx, binding, ops);
        self.files.lock(cx).held.insert(request, (binding, pages));
        Ok(request)
    }
}

impl Driver for ProcMem {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        Ok(self.files.lock(cx).open.add((range, access)))
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        self.files.lock(cx).open.remove(&binding).map(drop).ok_or(SubmitError::NotBound(binding))
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let access_remote_vm = |cx: &mut MaySleep<'_>| self.access_remote_vm(cx, binding, ops);
        in_process(cx, self.context.mm(), access_remote_vm).unwrap_or(Err(SubmitError::Exited))
    }

    fn run(&self, cx: &mut MaySleep<'_>, request: RequestId) -> Result<Vec<u64>, DeviceFault> {
        let result = self.context().run(cx, request, &refuse);
        self.put(cx, request);
        result
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        let held: Vec<_> = self.files.lock(cx).held.keys().copied().collect();
        held.into_iter().for_each(|request| self.put(cx, request));
        self.files.lock(cx).open.clear();
        self.context.forget_requests(cx);
    }
}
