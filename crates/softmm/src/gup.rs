// SPDX-License-Identifier: MIT OR Apache-2.0
//! get_user_pages: pages of an address space, held for somebody who is not the CPU (all versions).
//!
//! Sequence: none of its own. Faults that it causes notify as [`crate::cow`] says, **inside** the caller's gup: a
//! driver whose callback takes a lock that it holds around gup deadlocks, and one that cancels on invalidation
//! cancels itself.
//!
//! Slow: mmap_lock for reading; under the ptl of each page: is it present; FOLL_WRITE: is it writable; FOLL_PIN of an
//! anonymous page that is not exclusive, for reading: un-share it first (v6_18); else fault and look again; take the
//! reference under the ptl; FOLL_TOUCH marks it accessed, and dirty if for writing.
//!
//! Fast: interrupts off and no lock at all: walk; take a reference if there is one left; **look at the pte again** and
//! let go if it changed. FOLL_PIN lets go of everything if fork's `write_protect_seq` is odd or moved (5.11).
//! Falls back to the slow way for the rest.
//!
//! By version: v3_16 .. v4_14 have no FOLL_PIN, it is a FOLL_GET there; v3_16 .. v4_12 do not look at the pte again
//! in the fast way; only v6_18 un-shares and watches fork.
//!
//! FOLL_FORCE writes to a private mapping that is not writable: copy-on-write is broken as for a store and the pte
//! stays read-only. What then counts as the caller's own page: v3_16, v3_19 whatever is mapped, FOLL_WRITE is
//! dropped (so a MADV_DONTNEED in between gives the caller somebody else's page for writing: dirty COW); v4_12 ..
//! v5_10 a dirty pte, after such a fault; v6_18 an exclusive anonymous page.
//!
//! What the references do: FOLL_GET 1, FOLL_PIN [`GUP_PIN_COUNTING_BIAS`], the zero page none with FOLL_PIN (6.5).
//! Both keep the frame from being freed, neither keeps the pte from being unmapped or, for FOLL_GET, copied away.

use crate::error::FaultError;
use crate::fault::FaultFlag;
use crate::frame::{FrameId, GUP_PIN_COUNTING_BIAS, ZERO_PAGE};
use crate::machine::Machine;
use crate::mm::Mm;
use crate::page_table::PteGuard;
use crate::profile::Force;
use crate::pte::Pte;
use crate::tlb::Cpu;
use crate::vma::{Vma, VmaTree};
use interleave::{Context, MaySleep, Ordering};
use mmu_notifier::{PageAddr, Pfn, Range};
use std::sync::Arc;

/// FOLL_GET or FOLL_PIN: which kind of reference. A call takes one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FollRef {
    /// One reference.
    Get,
    /// A pin: fork and copy-on-write honour it.
    Pin,
}

/// How to get user pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foll {
    /// FOLL_WRITE.
    pub write: bool,
    /// FOLL_GET or FOLL_PIN.
    pub hold: FollRef,
    /// FOLL_LONGTERM; a read pin then un-shares the zero page too. Only with [`FollRef::Pin`]; ignored otherwise.
    pub longterm: bool,
    /// FOLL_FORCE: also where the mapping does not allow it (ptrace).
    pub force: bool,
}

impl Foll {
    /// FOLL_GET for reading.
    pub const GET: Foll = Foll { write: false, hold: FollRef::Get, longterm: false, force: false };
    /// FOLL_PIN for reading.
    pub const PIN: Foll = Foll { write: false, hold: FollRef::Pin, longterm: false, force: false };

    /// The same with FOLL_WRITE.
    pub const fn write(self) -> Foll {
        Foll { write: true, ..self }
    }

    /// The same with FOLL_LONGTERM.
    pub const fn longterm(self) -> Foll {
        Foll { longterm: true, ..self }
    }

    /// The same with FOLL_FORCE.
    pub const fn force(self) -> Foll {
        Foll { force: true, ..self }
    }

    /// check_vma_flags.
    fn allowed_by(self, vma: &Vma) -> bool {
        // FOLL_FORCE writes only where a copy can be made.
        if self.write {
            vma.prot.writable() || (self.force && !vma.shared())
        } else {
            vma.prot.readable() || self.force
        }
    }

    /// Is a FOLL_PIN one, on this kernel?
    fn pins(self, machine: &Machine) -> bool {
        self.hold == FollRef::Pin && machine.profile().foll_pin
    }

    /// gup_must_unshare, for a present pte.
    /// `shared`: a shared mapping has nothing to un-share.
    fn must_unshare(self, mm: &Mm, pte: Pte, shared: bool) -> bool {
        if self.write || self.hold != FollRef::Pin || !mm.machine().profile().read_pin_unshares {
            return false;
        }
        let frames = mm.machine().frames();
        let anon = !pte.is_special() && frames.is_anon(pte.pfn());
        if anon { !frames.exclusive(pte.pfn()) } else { self.longterm && !shared }
    }

    /// folio_fast_pin_allowed: what the slow way must look at, with the vma in hand (6.5).
    fn avoids(self, mm: &Mm, pte: Pte) -> bool {
        self.write && self.longterm && mm.machine().frames().is_file(pte.pfn())
    }

    /// can_follow_write_pte. `cow`: a fault for writing has been through here (FOLL_COW).
    fn may_write(self, mm: &Mm, vma: &Vma, pte: Pte, cow: bool) -> bool {
        if pte.is_writable() || !self.force {
            return pte.is_writable();
        }
        let frames = mm.machine().frames();
        match mm.machine().profile().force {
            Force::DropsWrite => false,
            Force::DirtyAfterCow => cow && pte.is_dirty(),
            Force::Exclusive => {
                !vma.prot.writable() && frames.is_anon(pte.pfn()) && frames.exclusive(pte.pfn())
            }
        }
    }

    fn references(self, machine: &Machine, pfn: Pfn) -> u32 {
        if !self.pins(machine) {
            return 1;
        }
        let counted = pfn != ZERO_PAGE || !machine.profile().zero_page_unpinned;
        if counted { GUP_PIN_COUNTING_BIAS } else { 0 }
    }
}

/// Pages that are held. Dropping it drops the references (put_page, unpin_user_page); that may happen in any context.
#[must_use]
pub struct UserPages {
    machine: Arc<Machine>,
    foll: Foll,
    pages: Vec<Pfn>,
}

impl UserPages {
    fn none(mm: &Mm, foll: Foll) -> UserPages {
        UserPages { machine: mm.machine_arc().clone(), foll, pages: Vec::new() }
    }

    /// The frames, in address order.
    pub fn frames(&self) -> impl ExactSizeIterator<Item = FrameId> {
        self.pages.iter().map(|&pfn| self.machine.frames().id(pfn))
    }

    /// set_page_dirty of each page, for who wrote them without the CPU (unpin_user_pages_dirty_lock).
    pub fn set_dirty(&self) {
        self.pages
            .iter()
            .filter(|&&pfn| pfn != ZERO_PAGE)
            .for_each(|&pfn| self.machine.frames().set_dirty(pfn));
    }

    /// The same with each page locked meanwhile, one after the other (set_page_dirty_lock): whoever works on the page as a
    /// whole does not see it become dirty in between. Not from a callback: reclaim and truncate call with a page locked.
    pub fn set_dirty_lock(&self, cx: &mut MaySleep<'_>) {
        for &pfn in self.pages.iter().filter(|&&pfn| pfn != ZERO_PAGE) {
            let lock = self.machine.frames().lock_page(cx, pfn);
            self.machine.frames().set_dirty(pfn);
            drop(lock);
        }
    }

    /// The same where the page lock is free, in any context (trylock_page). How many pages were locked and have lost their
    /// dirty bit.
    pub fn try_set_dirty<C: Context + ?Sized>(&self, cx: &mut C) -> usize {
        let mut lost = 0;
        for &pfn in self.pages.iter().filter(|&&pfn| pfn != ZERO_PAGE) {
            match self.machine.frames().trylock_page(cx, pfn) {
                Some(_lock) => self.machine.frames().set_dirty(pfn),
                None => lost += 1,
            }
        }
        lost
    }

    /// How they are held.
    pub fn foll(&self) -> Foll {
        self.foll
    }
}

impl Drop for UserPages {
    fn drop(&mut self) {
        for &pfn in &self.pages {
            let references = self.foll.references(&self.machine, pfn);
            if references > 0 {
                self.machine.frames().put(pfn, references);
            }
        }
    }
}

impl Mm {
    /// get_user_pages / pin_user_pages of all pages of `range`, faulting in what is missing.
    ///
    /// # Errors
    /// The fault that failed first. Unlike the kernel, which returns the pages before it, none is held then.
    pub fn get_user_pages(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        foll: Foll,
    ) -> Result<UserPages, FaultError> {
        let mut got = UserPages::none(self, foll);
        self.gup_slow(cx, range.iter_pages(), &mut got)?;
        Ok(got)
    }

    /// get_user_pages_fast / pin_user_pages_fast on `cpu`.
    ///
    /// # Errors
    /// As [`Mm::get_user_pages`].
    pub fn get_user_pages_fast(
        &self,
        cx: &mut MaySleep<'_>,
        cpu: &Cpu,
        range: Range,
        foll: Foll,
    ) -> Result<UserPages, FaultError> {
        let mut got = self.get_user_pages_fast_only(cx, cpu, range, foll);
        let done = got.pages.len();
        self.gup_slow(cx, range.iter_pages().skip(done), &mut got)?;
        Ok(got)
    }

    /// mm_set_has_pinned_flag, before the first pin can be seen.
    fn note_pin(&self, foll: Foll) {
        if foll.pins(self.machine()) && !self.has_pinned.load(Ordering::SeqCst) {
            self.has_pinned.store(true, Ordering::SeqCst);
        }
    }

    /// One page with interrupts off (gup_fast_pte_range). Special ptes are left to the slow way.
    fn gup_fast_page(&self, page: PageAddr, foll: Foll) -> Option<Pfn> {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let pte = self.page_table.peek(tables, page);
        if !pte.is_present() || pte.is_special() || (foll.write && !pte.is_writable()) {
            return None;
        }
        let (pfn, references) = (pte.pfn(), foll.references(self.machine(), pte.pfn()));
        if !frames.try_get(pfn, references) {
            return None;
        }
        let rechecks = self.machine().profile().gup_fast_rechecks;
        let changed = rechecks && self.page_table.peek(tables, page) != pte;
        if changed || foll.must_unshare(self, pte, false) || foll.avoids(self, pte) {
            frames.put(pfn, references);
            return None;
        }
        Some(pfn)
    }

    fn gup_slow(
        &self,
        cx: &mut MaySleep<'_>,
        mut pages: impl ExactSizeIterator<Item = PageAddr>,
        got: &mut UserPages,
    ) -> Result<(), FaultError> {
        if pages.len() == 0 {
            return Ok(());
        }
        self.note_pin(got.foll);
        let vmas = self.vmas.read(cx);
        pages.try_for_each(|page| {
            got.pages.push(self.gup_page(cx, &vmas, page, got.foll)?);
            Ok(())
        })
    }

    pub(crate) fn gup_page(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        page: PageAddr,
        foll: Foll,
    ) -> Result<Pfn, FaultError> {
        let vma = vmas.find(page.get()).ok_or(FaultError::Unmapped(page))?;
        if !foll.allowed_by(vma) {
            return Err(FaultError::Access(page));
        }
        // vma_needs_dirty_tracking: a long pin would write behind the back of writeback.
        let tracked = vma.file.as_ref().is_some_and(|file| file.shared && file.file.kind().dirty_accounted());
        let refused = foll.write && foll.longterm && foll.hold == FollRef::Pin && tracked;
        if refused && self.machine().profile().longterm_refuses_files {
            return Err(FaultError::NotPinnable(page));
        }
        let (mut now, mut cow) = (foll, false);
        loop {
            let flag = match self.follow_page(cx, vma, page, now, cow) {
                Ok(Some(pfn)) => return Ok(pfn),
                Ok(None) => return Err(FaultError::NotPinnable(page)),
                Err(flag) => flag,
            };
            let faulted = self.handle_mm_fault(cx, vmas, page, flag)?;
            if faulted.write && !vma.prot.writable() {
                match self.machine().profile().force {
                    Force::DropsWrite => now.write = false,
                    Force::DirtyAfterCow => cow = true,
                    Force::Exclusive => {}
                }
            }
        }
    }

    /// follow_page_pte: the page with its reference; `None`: memory that has no page (-EFAULT); or the fault that
    /// is needed first.
    fn follow_page(
        &self,
        cx: &mut MaySleep<'_>,
        vma: &Vma,
        page: PageAddr,
        foll: Foll,
        cow: bool,
    ) -> Result<Option<Pfn>, FaultFlag> {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let fault = if foll.write { FaultFlag::Write } else { FaultFlag::Read };
        let leaf = self.page_table.leaf(tables, page).ok_or(fault)?;
        let mut guard = PteGuard::lock(tables, leaf, cx);
        let pte = guard.get(page);
        if !pte.is_mapped() || (foll.write && !foll.may_write(self, vma, pte, cow)) {
            return Err(fault);
        }
        if foll.must_unshare(self, pte, vma.shared()) {
            return Err(FaultFlag::Unshare);
        }
        if pte.is_special() && pte.pfn() != ZERO_PAGE {
            return Ok(None);
        }
        let references = foll.references(self.machine(), pte.pfn());
        if references > 0 {
            frames.get(pte.pfn(), references);
        }
        if foll.write {
            frames.set_dirty(pte.pfn());
        }
        guard.set_bits(page, Pte::ACCESSED);
        Ok(Some(pte.pfn()))
    }
}

impl Mm {
    /// get_user_pages_fast_only (`__get_user_pages_fast` before 5.8): the leading pages of `range` that can be had with
    /// interrupts off and without a fault; maybe none. Never sleeps.
    pub fn get_user_pages_fast_only<C: Context + ?Sized>(
        &self,
        cx: &mut C,
        cpu: &Cpu,
        range: Range,
        foll: Foll,
    ) -> UserPages {
        let mut got = UserPages::none(self, foll);
        self.note_pin(foll);
        let watches_fork = foll.pins(self.machine()) && self.machine().profile().gup_fast_sees_fork;
        let seq = self.write_protect_seq.load(Ordering::SeqCst);
        if !(watches_fork && seq % 2 == 1) {
            let irq_off = cpu.irq_off(cx);
            for page in range.iter_pages() {
                match self.gup_fast_page(page, foll) {
                    Some(pfn) => got.pages.push(pfn),
                    None => break,
                }
            }
            drop(irq_off);
            if watches_fork && self.write_protect_seq.load(Ordering::SeqCst) != seq {
                got = UserPages::none(self, foll);
            }
        }
        got
    }
}

impl UserPages {
    /// Pages that are held.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// None?
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Splits off the pages from the `at`th on, for who lets them go one by one.
    pub fn split_off(&mut self, at: usize) -> UserPages {
        let pages = self.pages.split_off(at.min(self.pages.len()));
        UserPages { machine: self.machine.clone(), foll: self.foll, pages }
    }
}
