// SPDX-License-Identifier: MIT OR Apache-2.0
//! Uprobes: a breakpoint in the text of every process that maps a file (kernel/events/uprobes.c).
//!
//! A probe is a word of a page of a file. Every private mapping that covers it, present ones and those to come, gets a copy
//! of the page with a breakpoint; the file keeps its bytes. Registering wants mappings that are not writable, because
//! otherwise the process may have a page of its own there; **removing takes writable ones too** (mprotect came in
//! between), and looks for no pin.
//!
//! Sequence, per mapping:
//!
//! | profile | register: the page is replaced | remove |
//! |---|---|---|
//! | v3_16, v3_19 .. v4_14 | lock_page; S; [ clr R; C; **set** copy ]; put; E; unlock | the same, with another copy |
//! | unwrapped_* | as copy-on-write: see `notify` | the same |
//! | v5_10 | S; [ clr R; C; **set** copy ]; put; E(+R) | if the bytes are the file's again: S; [ clr R ]; put; E; else as before |
//! | v6_18 | copy-on-write if needed, as FOLL_WRITE\|FOLL_FORCE does it; then **no S, no E**: [ clr A; write the word; **set** the same page ] | S(CLEAR); [ clr A; write the word; the file's bytes again and nobody else holds the copy? put : **set** the same page ]; E |
//!
//! R is there from v3_19 on. A mapping that has the breakpoint already is left alone, and a fresh mapping of the file is probed
//! at mmap. A removal passes over every mm that never had one (MMF_HAS_UPROBES). In v6_18 a copy that sits in a per-CPU batch
//! counts as held, and looking it up for the removal may put it into one, so the running kernel often keeps it where softmm
//! does not.
//!
//! What is not here: the kernel sets a breakpoint that a mapping has lost (MADV_DONTNEED, swap-out) again whenever it splits or
//! merges the vma.
//!
//! Locks: register_rwsem of the file; dup_mmap_sem for writing (fork holds it for reading: nobody copies half a set of
//! breakpoints); i_mmap for reading while the mappings are listed; then one mm after the other: mmap_lock for writing; page
//! lock over S..E until v5_10; ptl.

use crate::error::{FaultError, OutOfMemory, UprobeError};
use crate::mm::{Mm, MmUser};
use crate::notify::End;
use crate::page_cache::{File, FileKind};
use crate::profile::Uprobes;
use crate::pte::Pte;
use crate::vma::{Vma, VmaTree};
use crate::{Foll, Frames};
use interleave::{Digest, MaySleep};
use mmu_notifier::{Event, PageAddr, Pfn, Range};

/// What a word holds that is probed.
pub const BREAKPOINT: u64 = 0xcccc_cccc_cccc_cccc;

/// A probe: which word of which page of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) index: u64,
    pub(crate) word: usize,
}

impl Digest for Place {
    fn digest(&self) -> u64 {
        (self.index, self.word).digest()
    }
}

/// Which way the word is to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Insert,
    /// Back to what the file had when the probe was registered.
    Restore(u64),
}

impl Change {
    fn value(self) -> u64 {
        match self {
            Change::Insert => BREAKPOINT,
            Change::Restore(original) => original,
        }
    }

    /// valid_vma.
    fn concerns(self, vma: &Vma) -> bool {
        !vma.shared() && vma.file.is_some() && (self != Change::Insert || !vma.prot.writable())
    }
}

impl File {
    /// Sets a breakpoint on word `word` of page `index` in every private mapping that cannot write it.
    ///
    /// # Errors
    /// [`UprobeError`]; no breakpoint is left behind.
    pub fn uprobe_register(&self, cx: &mut MaySleep<'_>, index: u64, word: usize) -> Result<(), UprobeError> {
        if self.kind() == FileKind::Xip {
            return Err(UprobeError::NoPageCache);
        }
        let original = self.read(cx, index, word)?;
        if original == BREAKPOINT {
            return Err(UprobeError::IsBreakpoint);
        }
        let place = Place { index, word };
        let registering = self.register_rwsem.lock(cx);
        if self.uprobes.lock(cx).insert(place, original).is_some() {
            return Err(UprobeError::Exists);
        }
        let result = self.for_each_vma(cx, place, Change::Insert);
        if result.is_err() {
            self.uprobes.lock(cx).remove(&place);
            // What cannot be restored for lack of memory stays, as in the kernel.
            let _ = self.for_each_vma(cx, place, Change::Restore(original));
        }
        drop(registering);
        Ok(result?)
    }

    /// Takes the breakpoint out again.
    ///
    /// # Errors
    /// [`UprobeError`]: no such probe, or no memory for a copy, and then breakpoints stay behind where it was missing.
    pub fn uprobe_unregister(
        &self,
        cx: &mut MaySleep<'_>,
        index: u64,
        word: usize,
    ) -> Result<(), UprobeError> {
        let place = Place { index, word };
        let registering = self.register_rwsem.lock(cx);
        let Some(original) = self.uprobes.lock(cx).remove(&place) else { return Err(UprobeError::Missing) };
        let result = self.for_each_vma(cx, place, Change::Restore(original));
        drop(registering);
        Ok(result?)
    }

    /// register_for_each_vma. A restore goes on where it can after a failure.
    fn for_each_vma(&self, cx: &mut MaySleep<'_>, place: Place, change: Change) -> Result<(), OutOfMemory> {
        let _no_fork = self.machine().dup_mmap_sem().write(cx);
        let mut result = Ok(());
        // build_map_info puts each mapping in front of those before it.
        for (user, page) in self.mappings_of(cx, place.index).into_iter().rev() {
            if change != Change::Insert || result.is_ok() {
                let changed = self.change_in(cx, &user, page, place, change);
                result = result.and(changed);
            }
            user.mmput(cx);
        }
        result
    }

    fn mappings_of(&self, cx: &mut MaySleep<'_>, index: u64) -> Vec<(MmUser, PageAddr)> {
        let i_mmap = self.i_mmap_lock_read(cx);
        let private = i_mmap.iter().filter(|rmap| !rmap.shared);
        let covering = private.filter_map(|rmap| Some((rmap.mm()?, rmap.address(index)?)));
        // The address first: a user that is taken must be given back.
        covering.filter_map(|(mm, page)| Some((mm.mmget()?, page))).collect()
    }

    fn change_in(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &Mm,
        page: PageAddr,
        place: Place,
        change: Change,
    ) -> Result<(), OutOfMemory> {
        let mut vmas = mm.vmas.write(cx);
        let Some(vma) = vmas.find(page.get()).filter(|vma| change.concerns(vma)) else { return Ok(()) };
        let here =
            |file: &crate::vma::VmaFile| file.file.id() == self.id() && file.index(vma, page) == place.index;
        if !vma.file.as_ref().is_some_and(here) {
            return Ok(());
        }
        if change == Change::Insert {
            vmas.has_uprobes = true;
        } else if !vmas.has_uprobes {
            return Ok(());
        }
        mm.write_opcode(cx, &vmas, page, place, change)
    }
}

impl Mm {
    /// uprobe_mmap: a new mapping of the file gets the breakpoints that are registered. One that cannot be set is missing.
    pub(crate) fn uprobe_mmap(&self, cx: &mut MaySleep<'_>, vmas: &mut VmaTree, range: Range) {
        let Some((vma, file)) = vmas.find(range.start()).and_then(|vma| Some((vma, vma.file.as_ref()?)))
        else {
            return;
        };
        if !Change::Insert.concerns(vma) {
            return;
        }
        let places: Vec<Place> = file.file.uprobes.lock(cx).keys().copied().collect();
        let pages = range.iter_pages().map(|page| (page, file.index(vma, page)));
        let covered = |(page, index)| {
            places.iter().filter(move |place| place.index == index).map(move |&place| (page, place))
        };
        let probed: Vec<_> = pages.flat_map(covered).collect();
        vmas.has_uprobes |= !probed.is_empty();
        for (page, place) in probed {
            let _ = self.write_opcode(cx, vmas, page, place, Change::Insert);
        }
    }

    /// uprobe_write_opcode. A page that cannot be had (past the end of the file) has no breakpoint.
    fn write_opcode(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        page: PageAddr,
        place: Place,
        change: Change,
    ) -> Result<(), OutOfMemory> {
        let style = self.machine().profile().uprobes;
        let frames = self.machine().frames();
        let breaks_cow = style == Uprobes::InPlace && change == Change::Insert;
        let mut foll = if breaks_cow { Foll::GET.force().write() } else { Foll::GET.force() };
        loop {
            let old = match self.gup_page(cx, vmas, page, foll) {
                Ok(old) => old,
                Err(FaultError::OutOfMemory(error)) => return Err(error),
                Err(_) => return Ok(()),
            };
            let done = self.write_opcode_in(cx, vmas, page, place, (change, style), old);
            frames.put(old, 1);
            match done? {
                Written::Done => return Ok(()),
                Written::Again => {}
                Written::NotOwn => foll = foll.write(),
            }
        }
    }

    fn write_opcode_in(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        page: PageAddr,
        place: Place,
        (change, style): (Change, Uprobes),
        old: Pfn,
    ) -> Result<Written, OutOfMemory> {
        let frames = self.machine().frames();
        // verify_opcode: is it as it shall be already?
        let is_set = frames.contents(old)[place.word] == BREAKPOINT;
        let nothing_to_restore =
            change != Change::Insert && style != Uprobes::Replace && !frames.is_anon(old);
        if is_set == (change == Change::Insert) || nothing_to_restore {
            return Ok(Written::Done);
        }
        match style {
            Uprobes::Replace | Uprobes::ReplaceOrZap => {
                self.replace_by_copy(cx, vmas, page, place, (change, style), old)
            }
            Uprobes::InPlace if change == Change::Insert => {
                Ok(self.write_in_place(cx, vmas, page, place, change, old))
            }
            Uprobes::InPlace => Ok(self.invalidate(cx, Range::page(page), Event::Clear, |cx| {
                self.write_in_place(cx, vmas, page, place, change, old)
            })),
        }
    }

    /// Until 6.15: a copy of the page takes its place (__replace_page).
    fn replace_by_copy(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        page: PageAddr,
        place: Place,
        (change, style): (Change, Uprobes),
        old: Pfn,
    ) -> Result<Written, OutOfMemory> {
        let frames = self.machine().frames();
        self.anon_vma_prepare(cx, vmas, page);
        let Some(vma) = vmas.find(page.get()) else { return Ok(Written::Done) };
        let copy = frames.alloc()?;
        frames.copy_contents(copy, old);
        frames.store_word(copy, place.word, change.value());
        let zaps = style == Uprobes::ReplaceOrZap && change != Change::Insert;
        let new = if zaps && is_of_file(cx, frames, vma, page, copy) {
            frames.put(copy, 1);
            None
        } else {
            Some(copy)
        };
        let lock = frames.lock_page(cx, old);
        let replaced = self.change_pte_section(cx, page, End::Full, |cx| {
            let Some(mut guard) = self.mapped_pte(cx, page, old) else { return false };
            let (ptes, atomic) = guard.split();
            self.clear_flush_notify(ptes, atomic, page);
            if let Some(new) = new {
                self.add_new_anon_rmap(vma, new, page);
                self.set_pte_at_notify(ptes, atomic, page, vm_page_prot(vma, new));
            }
            frames.remove_rmap(old);
            drop(guard);
            frames.put(old, 1);
            true
        });
        drop(lock);
        match (replaced, new) {
            (true, _) => Ok(Written::Done),
            (false, new) => {
                new.into_iter().for_each(|unused| frames.put(unused, 1));
                Ok(Written::Again)
            }
        }
    }

    /// 6.16 and later: the word is written where it is, with the pte out of the way (__uprobe_write).
    fn write_in_place(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        page: PageAddr,
        place: Place,
        change: Change,
        old: Pfn,
    ) -> Written {
        let frames = self.machine().frames();
        let Some(vma) = vmas.find(page.get()) else { return Written::Done };
        let of_file = cached_contents(cx, vma, page);
        let Some(mut guard) = self.mapped_pte(cx, page, old) else { return Written::Again };
        let (ptes, atomic) = guard.split();
        if !ptes.get(page).is_writable() && !frames.exclusive(old) {
            return Written::NotOwn;
        }
        let pte = self.clear_flush(ptes, atomic, page);
        frames.store_word(old, place.word, change.value());
        // One reference is the mapping's, one the caller's.
        let only_ours = frames.refcount(old) == 2 + u32::from(frames.swap_slot(old).is_some());
        let zap =
            change != Change::Insert && only_ours && of_file.is_some_and(|of| of == frames.contents(old));
        if zap {
            frames.remove_rmap(old);
        } else {
            ptes.set(page, pte.with(Pte::DIRTY));
        }
        drop(guard);
        if zap {
            self.machine().free_swap_cache(cx, old);
            frames.put(old, 1);
        }
        Written::Done
    }
}

/// How an attempt went.
enum Written {
    Done,
    /// The pte changed meanwhile.
    Again,
    /// The page is not the mapping's own yet.
    NotOwn,
}

fn vm_page_prot(vma: &Vma, pfn: Pfn) -> Pte {
    Pte::new(pfn, 0).modify(vma.prot).with(Pte::ACCESSED)
}

/// Does the page cache hold what `pfn` holds?
fn is_of_file(cx: &mut MaySleep<'_>, frames: &Frames, vma: &Vma, page: PageAddr, pfn: Pfn) -> bool {
    cached_contents(cx, vma, page).is_some_and(|contents| contents == frames.contents(pfn))
}

/// What the page cache has for `page`, if it has anything (find_get_page).
fn cached_contents(cx: &mut MaySleep<'_>, vma: &Vma, page: PageAddr) -> Option<Box<[u64]>> {
    let file = vma.file.as_ref()?;
    let frames = file.file.frames();
    let cached = file.file.find_get(cx, file.index(vma, page))?;
    let contents = frames.contents(cached);
    frames.put(cached, 1);
    Some(contents)
}
