// SPDX-License-Identifier: MIT OR Apache-2.0
//! A fault on a page that may not be written as it is: do_wp_page, wp_page_copy.
//!
//! Alloc and copy first; then, `[` `]` under the ptl:
//!
//! | profile | sequence |
//! |---|---|
//! | v3_16 | S; [ pte_same? clr; add rmap; C; **set**; remove rmap of the old page ]; E; put |
//! | unwrapped_a | [ clr; C; **set** ]; put |
//! | unwrapped_b | [ clr; C; **set** ]; P for who has no change_pte; put |
//! | unwrapped_c | [ clr; C, or P for who has no change_pte; **set** ]; put |
//! | v3_19 .. v4_14 | S; [ clr R; C; **set** ]; R E; put |
//! | v5_10 | S; [ clr R; C; **set** ]; E; put |
//! | v6_18 | S; [ clr A; **set** ]; E; put |
//!
//! Reuse and un-share in place notify nothing: the page stays, and read-only to writable needs no shootdown.
//!
//! Who may write in place (the reuse rule), of anonymous pages that are not KSM's:
//! * v3_16 .. v4_14: no other pte and no swap entry, whoever else holds references; under the page lock;
//! * v5_10: nobody else holds a reference, which moves a pinned page away from its device;
//! * v6_18: PageAnonExclusive; else nobody else holds a reference, and the page becomes exclusive.
//!
//! FAULT_FLAG_UNSHARE (5.19) takes the same path for a FOLL_PIN read pin, and maps the copy read-only. So does a
//! FOLL_FORCE write to a mapping that is not writable.
//!
//! Locks: mmap_lock for reading; page lock, tried for under the ptl; ptl; an extra reference on the old page from
//! the first ptl section until after E, so that nobody reuses the frame while it is being copied.

use crate::error::FaultError;
use crate::fault::{FaultFlag, Faulted};
use crate::mm::Mm;
use crate::notify::End;
use crate::page_table::{PteGuard, TableId};
use crate::profile::Reuse;
use crate::pte::Pte;
use crate::vma::VmaTree;
use interleave::{Atomic, MaySleep, MutexGuard};
use mmu_notifier::{PageAddr, Pfn};

/// What the reuse rule says.
enum MayReuse {
    Yes,
    No,
    /// Ask again with the page lock held.
    LockPage,
}

impl Mm {
    /// `seen`: the mapped, read-only pte that the fault found. If it is another by now, nothing is done.
    pub(crate) fn do_wp_page(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        leaf: TableId,
        page: PageAddr,
        seen: Pte,
        flag: FaultFlag,
    ) -> Result<Faulted, FaultError> {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let vma = vmas.find(page.get()).ok_or(FaultError::Unmapped(page))?;
        let write = if vma.prot.writable() { Pte::WRITE } else { 0 };
        let mut held = None;
        let mut page_lock = None;
        loop {
            let mut guard = PteGuard::lock(tables, leaf, cx);
            if guard.get(page) != seen {
                return Ok(Faulted::default());
            }
            if seen.is_special() {
                break;
            }
            let old = seen.pfn();
            let (ptes, atomic) = guard.split();
            match self.wp_can_reuse_anon(atomic, old, page_lock.as_ref()) {
                MayReuse::Yes => {
                    frames.set_anon_vma(old, vma.anon_vma().unwrap_or_default(), vma.anon_index(page));
                    if flag == FaultFlag::Write {
                        ptes.set_bits(page, write | Pte::ACCESSED | Pte::DIRTY);
                    }
                    return Ok(Faulted { write: flag == FaultFlag::Write });
                }
                MayReuse::No => {
                    held.get_or_insert_with(|| frames.hold(old));
                    break;
                }
                MayReuse::LockPage => {
                    held.get_or_insert_with(|| frames.hold(old));
                    drop(guard);
                    page_lock = Some(frames.lock_page(cx, old));
                }
            }
        }
        drop(page_lock);
        let bits = match flag {
            FaultFlag::Write => write | Pte::ACCESSED | Pte::DIRTY,
            FaultFlag::Read | FaultFlag::Unshare => Pte::ACCESSED,
        };
        let result = self.wp_page_copy(cx, vmas, leaf, page, seen, bits);
        drop(held);
        result.map(|()| Faulted { write: flag == FaultFlag::Write })
    }

    fn wp_page_copy(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        leaf: TableId,
        page: PageAddr,
        seen: Pte,
        bits: u64,
    ) -> Result<(), FaultError> {
        let machine = self.machine();
        let frames = machine.frames();
        self.anon_vma_prepare(cx, vmas, page);
        let vma = vmas.find(page.get()).ok_or(FaultError::Unmapped(page))?;
        let new = frames.alloc()?;
        frames.copy_contents(new, seen.pfn());
        let end = if machine.profile().cow_only_ends { End::Only } else { End::Full };
        let replaced = self.change_pte_section(cx, page, end, |cx| {
            let mut guard = PteGuard::lock(machine.tables(), leaf, cx);
            if guard.get(page) != seen {
                return false;
            }
            let (ptes, cx) = guard.split();
            self.clear_flush_notify(ptes, cx, page);
            self.add_new_anon_rmap(vma, new, page);
            let pte = Pte::new(new, 0).modify(vma.prot).with(bits);
            self.set_pte_at_notify(ptes, cx, page, pte);
            if !seen.is_special() {
                frames.remove_rmap(seen.pfn());
            }
            true
        });
        match (replaced, seen.is_special()) {
            (true, true) => {}
            (true, false) => {
                if machine.profile().cow_frees_swap_cache {
                    machine.free_swap_cache(cx, seen.pfn());
                }
                frames.put(seen.pfn(), 1);
            }
            (false, _) => frames.put(new, 1),
        }
        Ok(())
    }

    /// Under the ptl of a pte that maps the page. `lock`: is the page locked by the caller?
    fn wp_can_reuse_anon(
        &self,
        cx: &mut Atomic<'_>,
        pfn: Pfn,
        lock: Option<&MutexGuard<'_, ()>>,
    ) -> MayReuse {
        let frames = self.machine().frames();
        if !frames.is_anon(pfn) || frames.is_ksm(pfn) {
            return MayReuse::No;
        }
        let reuse = match self.machine().profile().reuse {
            Reuse::SoleMapping => {
                let mine = if lock.is_none() { frames.trylock_page(cx, pfn) } else { None };
                if lock.is_none() && mine.is_none() {
                    return MayReuse::LockPage;
                }
                self.sole_mapping(cx, pfn)
            }
            Reuse::SoleReference => {
                let sole = || frames.refcount(pfn) == 1 && frames.mapcount(pfn) == 1;
                sole() && frames.trylock_page(cx, pfn).is_some_and(|_lock| sole())
            }
            Reuse::Exclusive => frames.exclusive(pfn) || self.make_exclusive(cx, pfn),
        };
        if reuse { MayReuse::Yes } else { MayReuse::No }
    }

    /// reuse_swap_page: the page is locked and mapped here. Takes it out of the swap cache if it is reused.
    fn sole_mapping(&self, cx: &mut Atomic<'_>, pfn: Pfn) -> bool {
        let machine = self.machine();
        if machine.frames().is_ksm(pfn) || machine.frames().mapcount(pfn) != 1 {
            return false;
        }
        machine.frames().swap_slot(pfn).is_none() || machine.try_to_free_swap(cx, pfn)
    }

    /// wp_can_reuse_anon_folio (5.19): nobody else holds the page, and it becomes exclusive.
    fn make_exclusive(&self, cx: &mut Atomic<'_>, pfn: Pfn) -> bool {
        let (machine, frames) = (self.machine(), self.machine().frames());
        let cached = u32::from(frames.swap_slot(pfn).is_some());
        if frames.refcount(pfn) > 1 + cached {
            return false;
        }
        let Some(_lock) = frames.trylock_page(cx, pfn) else { return false };
        if cached > 0 {
            machine.try_to_free_swap(cx, pfn);
        }
        if frames.is_ksm(pfn) || frames.refcount(pfn) != 1 {
            return false;
        }
        frames.set_exclusive(pfn, true);
        true
    }
}
