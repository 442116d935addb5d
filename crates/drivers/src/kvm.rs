// SPDX-License-Identifier: MIT OR Apache-2.0
//! What KVM's guest memory has in common from 3.16 to 6.18: memslots, how a fault gets its page, page ageing.

use crate::bindings::Bindings;
use crate::callbacks::Callback;
use crate::device::DeviceContext;
use crate::op::{Binding, DeviceFault};
use interleave::{Atomic, Context, MaySleep};
use mmu_notifier::{Access, PageAddr, Range};
use softmm::{Foll, Mm, UserPages};

/// A memslot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) range: Range,
    pub(crate) access: Access,
}

pub(crate) type Slots = Bindings<Slot>;

/// A page that a fault holds for a moment.
pub(crate) struct Gup {
    held: UserPages,
    writable: bool,
}

/// hva_to_pfn: the page with a reference. A read fault in a slot that may be written takes the page for writing if that needs
/// no fault, so that the first write does not fault again.
pub(crate) fn gup(
    cx: &mut MaySleep<'_>,
    mm: &Mm,
    cpu: usize,
    page: PageAddr,
    access: Access,
    most: Access,
) -> Result<Gup, DeviceFault> {
    let range = Range::page(page);
    let cpus = mm.machine().cpus();
    let cpu = &cpus[cpu % cpus.len()];
    let foll = if access == Access::Write { Foll::GET.write() } else { Foll::GET };
    let held = mm
        .get_user_pages_fast(cx, cpu, range, foll)
        .map_err(|source| DeviceFault::Refused { page, source })?;
    if access == Access::Read && most == Access::Write {
        let again = mm.get_user_pages_fast_only(cx, cpu, range, Foll::GET.write());
        if !again.is_empty() {
            return Ok(Gup { held: again, writable: true });
        }
    }
    Ok(Gup { held, writable: access == Access::Write })
}

impl Gup {
    /// Writes the spte, marks the page dirty if it may be written, and drops the reference. Under mmu_lock.
    pub(crate) fn map(
        self,
        cx: &mut impl Context,
        context: &DeviceContext,
        binding: Binding,
        page: PageAddr,
    ) {
        if let Some(frame) = self.held.frames().next() {
            context.map(cx, binding, page, frame, self.writable);
        }
        if self.writable {
            self.held.set_dirty();
        }
    }
}

/// Were the pages accessed? Clears the bits unless `kind` only looks, and flushes if it is to. Under mmu_lock.
pub(crate) fn age(cx: &mut Atomic<'_>, context: &DeviceContext, range: Range, kind: Callback) -> bool {
    let young = context.young(cx, range, kind != Callback::TestYoung);
    if young && kind == Callback::ClearFlushYoung {
        context.flush(cx, None, range);
    }
    if young {
        context.effect(kind);
    }
    young
}
