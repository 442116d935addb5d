// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations that are more than one call of softmm's, and those in which the kernel may choose.

use super::{Model, ModelError, faulted, odd};
use crate::diff::script::{NOPS, PAGES, Who};
use crate::diff::step::{Answer, page};
use crate::diff::subject::PAGE_OUT_TRIES;
use interleave::MaySleep;
use mmu_notifier::{PageAddr, Range};
use softmm::uprobes::BREAKPOINT;
use softmm::{FileKind, Foll, FrameId, Machine, MapKind, Mm, Placement, Prot, UserPages};
use std::sync::Arc;

impl Model {
    pub(super) fn probe(&mut self, cx: &mut MaySleep<'_>, at: u64) -> Result<Answer, ModelError> {
        if self.probe.is_some() {
            return Ok(Answer::Skipped);
        }
        self.file.write(cx, at, 0, NOPS).map_err(odd)?;
        self.file.uprobe_register(cx, at, 0).map_err(odd)?;
        self.probe = Some(at);
        Ok(Answer::Done)
    }

    /// Removal gives a copy up unless somebody holds it, and by looking the page up it may itself have put it into a batch.
    pub(super) fn unprobe(
        &mut self,
        cx: &mut MaySleep<'_>,
        kept: &[(Who, u64)],
    ) -> Result<Answer, ModelError> {
        let Some(probed) = self.probe.take() else { return Ok(Answer::Skipped) };
        let mut held = Vec::new();
        for &(by, at) in kept {
            let Some(mm) = self.mm(by) else { continue };
            // What is in swap space, the removal reads back as this does.
            let Ok(got) = mm.get_user_pages(cx, Range::page(page(at)), Foll::GET.force()) else { continue };
            if got.frames().all(|frame| self.is_probed(frame)) {
                held.push(got);
            }
        }
        let everywhere =
            [Who::Parent, Who::Child].into_iter().flat_map(|by| (0..PAGES).map(move |at| (by, at)));
        let owned = |&(by, at): &(Who, u64)| {
            let mm = self.mm(by)?;
            self.anonymous(mm, at).filter(|&frame| self.is_probed(frame))
        };
        let probes: Vec<_> = everywhere.filter(|place| owned(place).is_some()).collect();
        self.file.uprobe_unregister(cx, probed, 0).map_err(odd)?;
        // Closing a perf event looks at every mapping once more, and finds the file's page where a copy was given up.
        for (by, at) in probes {
            let Some(mm) = self.mm(by).filter(|mm| mm.peek_pte(page(at)).is_none()) else { continue };
            drop(mm.get_user_pages(cx, Range::page(page(at)), Foll::GET.force()));
        }
        self.told += usize::from(!held.is_empty());
        Ok(Answer::Done)
    }

    fn is_probed(&self, frame: FrameId) -> bool {
        let frames = self.machine.frames();
        frames.is_anon(frame.pfn) && frames.read(frame, 0) == Ok(BREAKPOINT)
    }

    pub(super) fn pin(
        &mut self,
        cx: &mut MaySleep<'_>,
        range: Range,
        moved: &[(Who, u64)],
    ) -> Result<Answer, ModelError> {
        if self.pin.is_some() {
            return Ok(Answer::Skipped);
        }
        let held: Vec<_> = moved.iter().filter_map(|&(_, at)| hold(cx, &self.parent, page(at))).collect();
        self.told += usize::from(!held.is_empty());
        let cpu = &self.machine.cpus()[0];
        match self.parent.get_user_pages_fast(cx, cpu, range, Foll::PIN.write().longterm()) {
            Ok(pages) => {
                self.pin = Some(pages);
                Ok(Answer::Done)
            }
            Err(e) => faulted(e),
        }
    }

    /// The frame of an anonymous page.
    pub(super) fn anonymous(&self, mm: &Mm, at: u64) -> Option<FrameId> {
        let (pte, frames) = (mm.peek_pte(page(at)), self.machine.frames());
        let anonymous = pte.is_mapped() && !pte.is_special() && frames.is_anon(pte.pfn());
        anonymous.then(|| frames.id(pte.pfn()))
    }

    pub(super) fn page_out(
        &mut self,
        cx: &mut MaySleep<'_>,
        by: Who,
        at: u64,
        chose: Option<bool>,
    ) -> Result<Answer, ModelError> {
        let frames = self.machine.frames();
        let found = self.mm(by).map(|mm| (mm, mm.peek_pte(page(at))));
        let counted = found.filter(|(_, pte)| pte.is_mapped() && !pte.is_special());
        let Some((mm, pfn)) =
            counted.map(|(mm, pte)| (mm, pte.pfn())).filter(|(_, pfn)| frames.mapcount(*pfn) == 1)
        else {
            return Ok(Answer::Skipped);
        };
        if chose == Some(false) && !frames.maybe_dma_pinned(pfn) {
            self.unprovoked += 1;
            return Ok(Answer::Skipped);
        }
        // As the subject: what MADV_FREE gave up and was written again needs a second try.
        for _ in 0..PAGE_OUT_TRIES {
            match self.file.cached(cx).iter().find(|(_, cached)| *cached == pfn) {
                Some(&(index, _)) => drop(self.file.reclaim(cx, index, true)),
                None => drop(self.machine.reclaim_page(cx, frames.id(pfn), true)),
            }
            if !mm.peek_pte(page(at)).is_mapped() {
                break;
            }
        }
        Ok(if mm.peek_pte(page(at)).is_mapped() { Answer::Skipped } else { Answer::Done })
    }

    pub(super) fn merge(
        &mut self,
        cx: &mut MaySleep<'_>,
        first: u64,
        second: u64,
        chose: Option<bool>,
    ) -> Result<Answer, ModelError> {
        let (mm, frames) = (&self.parent, self.machine.frames());
        let (Some(one), Some(other)) = (self.anonymous(mm, first), self.anonymous(mm, second)) else {
            return Ok(Answer::Skipped);
        };
        if one == other || self.child.is_some() || self.pin.is_some() {
            return Ok(Answer::Skipped);
        }
        for at in [first, second] {
            mm.madvise_mergeable(cx, Range::page(page(at)), true).map_err(odd)?;
        }
        let words = [one, other].map(|frame| frames.read(frame, 0).ok());
        if words[0] != words[1] {
            return Ok(Answer::Skipped);
        }
        if chose == Some(false) {
            self.unprovoked += 1;
            return Ok(Answer::Skipped);
        }
        // ksmd goes by address: it puts the first page into its unstable tree and finds it when it comes to the second.
        let mm: &Mm = mm;
        let (first, second) = ((mm, page(first)), (mm, page(second)));
        match (frames.is_ksm(one.pfn), frames.is_ksm(other.pfn)) {
            (true, _) => self.machine.ksm_merge_with(cx, one, second),
            (_, true) => self.machine.ksm_merge_with(cx, other, first),
            _ => self.machine.ksm_merge(cx, second, first),
        };
        Ok(Answer::Done)
    }
}

/// As the subject's process: it has had a breakpoint.
pub(super) fn prime(cx: &mut MaySleep<'_>, machine: &Arc<Machine>, mm: &Mm) -> Result<(), ModelError> {
    let (file, there) = (machine.new_file(FileKind::Shmem, 1), Range::page(page(0)));
    file.write(cx, 0, 0, NOPS).map_err(odd)?;
    mm.mmap_file(cx, Placement::Fixed(there), Prot::Read, &file, 0, MapKind::Private).map_err(odd)?;
    file.uprobe_register(cx, 0, 0).map_err(odd)?;
    file.uprobe_unregister(cx, 0, 0).map_err(odd)?;
    mm.munmap(cx, there);
    Ok(())
}

/// process_vm_readv, or process_vm_writev of `value`, from the remote side.
pub(super) fn through_pin(
    cx: &mut MaySleep<'_>,
    mm: &Mm,
    at: PageAddr,
    value: Option<u64>,
) -> Result<Answer, ModelError> {
    let foll = if value.is_some() { Foll::PIN.write() } else { Foll::PIN };
    let pages = match mm.get_user_pages(cx, Range::page(at), foll) {
        Ok(pages) => pages,
        Err(e) => return faulted(e),
    };
    let frames = mm.machine().frames();
    let frame = pages.frames().next().ok_or_else(|| odd("no page"))?;
    match value {
        None => frames.read(frame, 0).map(Answer::Word).map_err(odd),
        Some(value) => {
            frames.write(frame, 0, value).map_err(odd)?;
            pages.set_dirty_lock(cx);
            Ok(Answer::Done)
        }
    }
}

/// The kernel copied the page. If softmm, left alone, would reuse it and may as well copy, hold it while it writes.
pub(super) fn hold(cx: &mut MaySleep<'_>, mm: &Mm, at: PageAddr) -> Option<UserPages> {
    let (pte, frames) = (mm.peek_pte(at), mm.machine().frames());
    let free_to_choose = pte.is_present()
        && !pte.is_writable()
        && frames.is_anon(pte.pfn())
        && !frames.exclusive(pte.pfn())
        && frames.refcount(pte.pfn()) == 1;
    if free_to_choose { mm.get_user_pages(cx, Range::page(at), Foll::GET).ok() } else { None }
}
