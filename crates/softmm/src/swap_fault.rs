// SPDX-License-Identifier: MIT OR Apache-2.0
//! A fault on a swap entry: do_swap_page.
//!
//! Sequence: read the page unless it is cached; lock_page; [ pte_same? **set**; swap_free ]; unlock. No notifier:
//! nothing becomes present where something was. A write that may not have the page for itself goes on to
//! [`crate::cow`].
//!
//! | profile | mapped writable if |
//! |---|---|
//! | v3_16 .. v5_10 | a write fault, and the entry was the only one and no pte maps the page (reuse_swap_page) |
//! | v6_18 | the entry was exclusive, or nobody else holds a reference |
//!
//! A page that KSM had merged is read back for one mm, and copied for every other (ksm_might_need_to_copy).
//!
//! Locks: mmap_lock for reading; page lock; ptl.

use crate::error::FaultError;
use crate::fault::{FaultFlag, Faulted};
use crate::frame::Held;
use crate::mm::Mm;
use crate::page_table::{PteGuard, TableId};
use crate::pte::Pte;
use crate::swap::Slot;
use crate::vma::VmaTree;
use interleave::MaySleep;
use mmu_notifier::{PageAddr, Pfn};

impl Mm {
    /// `entry`: the swap entry that the fault found. If it is another by now, nothing is done.
    pub(crate) fn do_swap_page(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        leaf: TableId,
        page: PageAddr,
        entry: Pte,
        flag: FaultFlag,
    ) -> Result<Faulted, FaultError> {
        let machine = self.machine();
        let frames = machine.frames();
        let (Some(vma), Some(slot)) = (vmas.find(page.get()), entry.swap_slot()) else {
            return Ok(Faulted::default());
        };
        self.anon_vma_prepare(cx, vmas, page);
        let Some(cached) = machine.swap_in(cx, slot)? else { return Ok(Faulted::default()) };
        let held = Held::adopt(frames, cached);
        let lock = frames.lock_page(cx, cached);
        if frames.swap_slot(cached) != Some(slot) {
            return Ok(Faulted::default());
        }
        let copy = if self.needs_copy_after_swap(cx, vma.anon_vma(), cached, vma.anon_index(page)) {
            let copy = frames.alloc()?;
            frames.copy_contents(copy, cached);
            Some(copy)
        } else {
            None
        };
        let mut guard = PteGuard::lock(machine.tables(), leaf, cx);
        if guard.get(page) != entry {
            drop(guard);
            if let Some(unused) = copy {
                frames.put(unused, 1);
            }
            return Ok(Faulted::default());
        }
        let (ptes, atomic) = guard.split();
        let pfn = copy.unwrap_or(cached);
        let sole = if machine.profile().has_exclusive() {
            machine.swap().free(atomic, slot);
            if flag == FaultFlag::Write && !frames.is_ksm(cached) && frames.refcount(cached) == 2 {
                machine.try_to_free_swap(atomic, cached);
            }
            machine.try_to_free_swap_if_full(atomic, cached);
            let sole = entry.swap_exclusive() || frames.refcount(pfn) == 1;
            sole && !frames.is_ksm(pfn)
        } else {
            let sole = flag == FaultFlag::Write && self.reuse_swap_page(atomic, pfn, slot);
            machine.swap().free(atomic, slot);
            sole
        };
        let write = if sole && vma.prot.writable() { Pte::WRITE } else { 0 };
        let dirty = if sole && flag == FaultFlag::Write { Pte::DIRTY } else { 0 };
        let pte = Pte::new(pfn, 0).modify(vma.prot).with(Pte::ACCESSED | write | dirty);
        if copy.is_none() {
            // The fault's reference becomes the mapping's.
            std::mem::forget(held);
        }
        frames.add_rmap(pfn);
        if !frames.is_anon(pfn) {
            let owner = if sole { vma.anon_vma() } else { vma.anon_vmas().next() };
            frames.set_anon_vma(pfn, owner.unwrap_or_default(), vma.anon_index(page));
        }
        if machine.profile().has_exclusive() {
            frames.set_exclusive(pfn, sole);
        } else {
            machine.try_to_free_swap_if_full(atomic, cached);
        }
        ptes.set(page, pte);
        drop(lock);
        drop(guard);
        if flag == FaultFlag::Write && !sole {
            return self.do_wp_page(cx, vmas, leaf, page, pte, flag);
        }
        Ok(Faulted { write: flag == FaultFlag::Write })
    }

    /// Does a page that was KSM's belong to another family, or to another address, since it was read back?
    fn needs_copy_after_swap(
        &self,
        cx: &mut MaySleep<'_>,
        anon_vma: Option<u64>,
        cached: Pfn,
        index: PageAddr,
    ) -> bool {
        let Some((of_page, at)) = self.machine().frames().anon_vma(cached) else { return false };
        at != index || !anon_vma.is_some_and(|own| self.machine().anon_vmas().related(cx, own, of_page))
    }

    /// reuse_swap_page before the entry is freed: the entry is the only way to the page. Takes the page out of the
    /// cache.
    fn reuse_swap_page(&self, cx: &mut interleave::Atomic<'_>, pfn: Pfn, slot: Slot) -> bool {
        let (machine, frames) = (self.machine(), self.machine().frames());
        if frames.is_ksm(pfn) {
            return false;
        }
        let cached = frames.swap_slot(pfn).is_some();
        let entries = if cached { machine.swap().count(cx, slot) } else { 0 };
        let sole = frames.mapcount(pfn) + entries <= 1;
        if sole && cached {
            machine.delete_from_swap_cache(cx, pfn);
        }
        sole
    }
}
