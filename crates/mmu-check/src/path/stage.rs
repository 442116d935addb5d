// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process on a machine, and the verbs in which paths are written.

use super::{X, Y};
use crate::oracle::mapped;
use interleave::explore::note;
use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::{PageAddr, Range};
use softmm::{File, FileKind, Machine, MapKind, Mm, MmUser, Placement, Prot};
use std::sync::Arc;

static USER: LockClass = LockClass::new("process");

/// One page.
pub(crate) fn page(number: u64) -> PageAddr {
    PageAddr::new(number << 12).unwrap_or(Range::ALL.last_page())
}

/// The range of one page.
pub(crate) fn range(number: u64) -> Range {
    Range::page(page(number))
}

/// [`X`] and [`Y`].
fn both() -> Range {
    Range::new(X << 12, (Y + 1 - X) << 12).unwrap_or(range(X))
}

/// A process on a machine, and what a path leaves behind.
pub struct Stage {
    /// The machine.
    pub machine: Arc<Machine>,
    /// The address space.
    pub mm: Arc<Mm>,
    /// A file of one page.
    pub file: Arc<File>,
    /// The process; a path that ends it takes it.
    pub(crate) user: Mutex<Option<MmUser>>,
    /// Other processes, which end after everything.
    pub(crate) children: Mutex<Vec<MmUser>>,
}

// What a verb cannot do, because the process is gone or out of memory, it leaves: nothing changed then, which is no fault of a
// driver's, and whether anything happened at all is asserted by counts.
impl Stage {
    pub(crate) fn new(machine: Arc<Machine>, user: MmUser, kind: FileKind) -> Stage {
        let file = machine.new_file(kind, 1);
        let children = Mutex::new(&USER, Vec::new());
        Stage { mm: (*user).clone(), machine, file, user: Mutex::new(&USER, Some(user)), children }
    }

    pub(crate) fn store(&self, cx: &mut MaySleep<'_>, page: u64, value: u64) {
        note(|| format!("store {value} at {:#x}", page << 12));
        let _ = self.machine.cpus()[1].store(cx, &self.mm, page << 12, value);
    }

    pub(crate) fn load(&self, cx: &mut MaySleep<'_>, page: u64) {
        note(|| format!("load from {:#x}", page << 12));
        let _ = self.machine.cpus()[1].load(cx, &self.mm, page << 12);
    }

    /// The process's other thread: stores through what is mapped by then, and does not fault.
    pub(crate) fn store_if_writable(&self, cx: &mut MaySleep<'_>, value: u64) {
        let writable = matches!(mapped(&self.mm, page(X)), Some((_, true)));
        if let Some(cpu) = self.machine.cpus().get(2).filter(|_| writable) {
            note(|| format!("store {value} through the page that is mapped"));
            let _ = cpu.store(cx, &self.mm, X << 12, value);
        }
    }

    pub(crate) fn anonymous(&self, cx: &mut MaySleep<'_>) {
        let _ = self.mm.mmap(cx, Placement::Fixed(both()), Prot::ReadWrite);
    }

    pub(crate) fn filled(&self, cx: &mut MaySleep<'_>) {
        self.anonymous(cx);
        self.store(cx, X, 1);
    }

    pub(crate) fn of_file(&self, cx: &mut MaySleep<'_>, prot: Prot, kind: MapKind) {
        let _ = self.mm.mmap_file(cx, Placement::Fixed(range(X)), prot, &self.file, 0, kind);
    }

    pub(crate) fn protect(&self, cx: &mut MaySleep<'_>, prot: Prot) {
        note(|| format!("mprotect({prot:?})"));
        let _ = self.mm.mprotect(cx, range(X), prot);
    }

    /// An invalidation that changes nothing: whoever listens to start and end has no translation afterwards.
    pub(crate) fn make_cold(&self, cx: &mut MaySleep<'_>) {
        self.protect(cx, Prot::Read);
        self.protect(cx, Prot::ReadWrite);
    }

    pub(crate) fn dontneed(&self, cx: &mut MaySleep<'_>, range: Range) {
        note(|| "madvise(MADV_DONTNEED)".to_owned());
        let _ = self.mm.madvise_dontneed(cx, range);
    }

    pub(crate) fn free(&self, cx: &mut MaySleep<'_>, range: Range) {
        note(|| "madvise(MADV_FREE)".to_owned());
        let _ = self.mm.madvise_free(cx, range);
    }

    pub(crate) fn mremap(&self, cx: &mut MaySleep<'_>, from: u64, to: u64) {
        note(|| format!("mremap {:#x} to {:#x}", from << 12, to << 12));
        let _ = self.mm.mremap(cx, range(from), range(to));
    }

    pub(crate) fn fork(&self, cx: &mut MaySleep<'_>) {
        note(|| "fork".to_owned());
        if let Ok(child) = self.mm.fork(cx) {
            self.children.lock(cx).push(child);
        }
    }

    pub(crate) fn child_stores(&self, cx: &mut MaySleep<'_>, value: u64) {
        note(|| format!("the child stores {value}"));
        let child = self.children.lock(cx).first().map(|child| (**child).clone());
        if let Some(child) = child {
            let _ = self.machine.cpus()[1].store(cx, &child, X << 12, value);
        }
    }

    pub(crate) fn children_exit(&self, cx: &mut MaySleep<'_>) {
        note(|| "the child exits".to_owned());
        let children = std::mem::take(&mut *self.children.lock(cx));
        children.into_iter().for_each(|child| child.mmput(cx));
    }

    /// The process ends.
    pub(crate) fn exit(&self, cx: &mut MaySleep<'_>) {
        note(|| "the process exits".to_owned());
        let user = self.user.lock(cx).take();
        if let Some(user) = user {
            user.mmput(cx);
        }
    }

    pub(crate) fn mergeable(&self, cx: &mut MaySleep<'_>, x: u64, y: u64) {
        self.anonymous(cx);
        self.store(cx, X, x);
        self.store(cx, Y, y);
        let _ = self.mm.madvise_mergeable(cx, both(), true);
    }

    pub(crate) fn merge(&self, cx: &mut MaySleep<'_>) {
        note(|| "ksmd merges the page".to_owned());
        self.machine.ksm_merge(cx, (&self.mm, page(Y)), (&self.mm, page(X)));
    }

    pub(crate) fn swap_out(&self, cx: &mut MaySleep<'_>) {
        note(|| "reclaim".to_owned());
        if let Some((frame, _)) = mapped(&self.mm, page(X)) {
            self.machine.reclaim_page(cx, frame, true);
        }
    }

    pub(crate) fn probe(&self, cx: &mut MaySleep<'_>) {
        note(|| "uprobe_register".to_owned());
        let _ = self.file.uprobe_register(cx, 0, 0);
    }

    pub(crate) fn unprobe(&self, cx: &mut MaySleep<'_>) {
        note(|| "uprobe_unregister".to_owned());
        let _ = self.file.uprobe_unregister(cx, 0, 0);
    }
}
