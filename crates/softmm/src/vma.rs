// SPDX-License-Identifier: MIT OR Apache-2.0
//! Virtual memory areas and the tree that holds them (v6.18).
//!
//! Invariants: vmas do not overlap; neighbours that could be one are one right after mmap. The tree changes only
//! under mmap_lock for writing; `anon_vma` of a vma may be set, once, under mmap_lock for reading.
//!
//! The `anon_vma` matters to notifiers: fork copies page tables, and so notifies, only for vmas that have one, and
//! two vmas with different ones stay apart, which makes two notified ranges out of one.

use crate::page_cache::{File, FileKind};
use interleave::{AtomicU64, Digest, Ordering};
use mmu_notifier::{PAGE_SHIFT, PageAddr, Range};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the CPU may do with a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prot {
    /// Neither load nor store (PROT_NONE).
    None,
    /// Loads (PROT_READ).
    Read,
    /// Loads and stores (PROT_READ | PROT_WRITE).
    ReadWrite,
}

impl Prot {
    /// VM_READ.
    pub const fn readable(self) -> bool {
        !matches!(self, Prot::None)
    }

    /// VM_WRITE.
    pub const fn writable(self) -> bool {
        matches!(self, Prot::ReadWrite)
    }
}

/// The file that a vma maps (vm_file, vm_pgoff, VM_SHARED).
#[derive(Debug, Clone)]
pub(crate) struct VmaFile {
    pub(crate) file: Arc<File>,
    /// Which page of the file the vma begins with.
    pub(crate) pgoff: u64,
    pub(crate) shared: bool,
}

impl VmaFile {
    /// Which page of the file `page` shows (linear_page_index).
    pub(crate) fn index(&self, vma: &Vma, page: PageAddr) -> u64 {
        self.pgoff + ((page.get() - vma.range.start()) >> PAGE_SHIFT)
    }
}

/// A mapping: of a file, or private and anonymous.
#[derive(Debug)]
pub(crate) struct Vma {
    pub(crate) range: Range,
    pub(crate) prot: Prot,
    /// 0 until the first page of its own (anon_vma_prepare).
    anon_vma: AtomicU64,
    /// The anon_vmas of its ancestors, the oldest first: fork gave them. A vma that has any merges with nothing that
    /// has no anon_vma.
    inherited: Vec<u64>,
    /// Its pages were charged to the commit limit (VM_ACCOUNT). Nothing here is limited, but two vmas of which one is
    /// charged stay apart.
    pub(crate) accounted: bool,
    /// KSM may merge its pages (VM_MERGEABLE).
    pub(crate) mergeable: bool,
    /// What it maps; `None` is anonymous memory.
    pub(crate) file: Option<VmaFile>,
    /// Of anonymous memory: how far its vm_pgoff is from its address, in bytes. Not 0 where mremap has moved pages.
    shift: u64,
}

impl Vma {
    pub(crate) fn new(range: Range, prot: Prot) -> Vma {
        Vma {
            range,
            prot,
            anon_vma: AtomicU64::new(0),
            inherited: Vec::new(),
            accounted: prot.writable(),
            mergeable: false,
            file: None,
            shift: 0,
        }
    }

    pub(crate) fn of_file(range: Range, prot: Prot, file: VmaFile) -> Vma {
        Vma { accounted: prot.writable() && !file.shared, file: Some(file), ..Vma::new(range, prot) }
    }

    /// Do writes reach others (VM_SHARED)? If not, the mapping is copy-on-write (is_cow_mapping).
    pub(crate) fn shared(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.shared)
    }

    /// Do some of its ptes lead to memory that has no page (VM_MIXEDMAP)?
    pub(crate) fn is_mixed_map(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.file.kind() == FileKind::Xip)
    }

    pub(crate) fn anon_vma(&self) -> Option<u64> {
        Some(self.anon_vma.load(Ordering::SeqCst)).filter(|&id| id != 0)
    }

    /// False if it has one already.
    pub(crate) fn set_anon_vma(&self, id: u64) -> bool {
        self.anon_vma.compare_exchange(0, id, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Its anon_vma and those of its ancestors, the oldest first.
    pub(crate) fn anon_vmas(&self) -> impl Iterator<Item = u64> {
        self.inherited.iter().copied().chain(self.anon_vma())
    }

    /// How far [`Vma::anon_index`] is from the address.
    pub(crate) fn shift(&self) -> u64 {
        match &self.file {
            Some(file) => (file.pgoff << PAGE_SHIFT).wrapping_sub(self.range.start()),
            None => self.shift,
        }
    }

    /// By what number an anonymous page that is made at `page` is looked for (linear_page_index).
    pub(crate) fn anon_index(&self, page: PageAddr) -> PageAddr {
        PageAddr::new(page.get().wrapping_add(self.shift())).unwrap_or(page)
    }

    /// What mremap puts at `to` for the part `from` (copy_vma). Without an anon_vma no page is looked for yet, and the new place
    /// may as well be like any other there.
    pub(crate) fn moved(&self, from: Range, to: Range) -> Vma {
        let piece = self.piece(from);
        let shift = match piece.anon_vma() {
            Some(_) => self.shift.wrapping_add(from.start()).wrapping_sub(to.start()),
            None => 0,
        };
        Vma { range: to, shift, ..piece }
    }

    /// mprotect_fixup: private memory that becomes writable is charged, and never given back,
    /// except (`unaccounts`) where no page was ever of its own.
    pub(crate) fn protect(&mut self, prot: Prot, unaccounts: bool) {
        if prot.writable() {
            self.accounted |= !self.shared() && !self.prot.writable();
        } else if unaccounts && self.file.is_none() && self.anon_vma().is_none() {
            self.accounted = false;
        }
        self.prot = prot;
    }

    fn forked(&self) -> bool {
        !self.inherited.is_empty()
    }

    /// A piece of this vma, with its anon_vma (__split_vma).
    fn piece(&self, range: Range) -> Vma {
        let anon_vma = AtomicU64::new(self.anon_vma.load(Ordering::SeqCst));
        let file = self.file.as_ref().map(|file| VmaFile {
            pgoff: file.pgoff + ((range.start() - self.range.start()) >> PAGE_SHIFT),
            ..file.clone()
        });
        Vma { range, anon_vma, inherited: self.inherited.clone(), file, ..*self }
    }

    /// The child's copy at fork (anon_vma_fork), with `anon_vma` of its own if the parent has one.
    pub(crate) fn for_child(&self, anon_vma: impl FnOnce() -> u64) -> Vma {
        let own = self.anon_vma().map(|_| anon_vma());
        let (anon_vma, inherited) = (AtomicU64::new(own.unwrap_or(0)), self.anon_vmas().collect());
        Vma { anon_vma, inherited, file: self.file.clone(), ..*self }
    }

    /// Could `next`, which starts where this ends, be part of this one (can_vma_merge_after)?
    fn merges_with(&self, next: &Vma) -> bool {
        let anon_vmas_allow = match (self.anon_vma(), next.anon_vma()) {
            (Some(a), Some(b)) => a == b,
            (Some(_), None) => !self.forked(),
            (None, Some(_)) => !next.forked(),
            (None, None) => true,
        };
        self.prot == next.prot && self.alike(next) && anon_vmas_allow
    }

    /// Does `next` begin where this ends, and differ at most in protection and anon_vma (anon_vma_compatible)?
    fn alike(&self, next: &Vma) -> bool {
        let one_file = match (&self.file, &next.file) {
            (None, None) => self.shift == next.shift,
            (Some(a), Some(b)) => {
                Arc::ptr_eq(&a.file, &b.file)
                    && a.shared == b.shared
                    && a.pgoff + self.range.pages() == b.pgoff
            }
            _ => false,
        };
        let one_account = self.accounted == next.accounted;
        self.range.end() == next.range.start() && self.mergeable == next.mergeable && one_account && one_file
    }
}

/// The vmas of one mm, by start address: what mmap_lock guards.
#[derive(Debug, Default)]
pub(crate) struct VmaTree {
    vmas: BTreeMap<u64, Vma>,
    /// The last user is gone.
    pub(crate) exited: bool,
    /// A breakpoint was set in this mm or in the one that it was forked from (MMF_HAS_UPROBES).
    pub(crate) has_uprobes: bool,
}

impl Digest for Vma {
    fn digest(&self) -> u64 {
        let file = self.file.as_ref().map(|file| (file.file.id(), file.pgoff, file.shared));
        let place = (self.range.start(), self.range.end(), self.shift, self.prot as u8);
        (place, self.anon_vma.peek(), &self.inherited, self.accounted, self.mergeable, file).digest()
    }
}

impl Digest for VmaTree {
    fn digest(&self) -> u64 {
        (&self.vmas, self.exited, self.has_uprobes).digest()
    }
}

impl VmaTree {
    /// vma_lookup.
    pub(crate) fn find(&self, addr: u64) -> Option<&Vma> {
        self.vmas.range(..=addr).next_back().map(|(_, vma)| vma).filter(|vma| vma.range.contains_addr(addr))
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Vma> {
        self.vmas.values()
    }

    pub(crate) fn overlapping(&self, range: Range) -> impl Iterator<Item = &Vma> {
        let first = self.find(range.start()).map_or(range.start(), |vma| vma.range.start());
        self.vmas.range(first..range.end()).map(|(_, vma)| vma)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.vmas.is_empty()
    }

    /// For a `range` that has been detached: the end of the last vma below `range` and the start of the first one
    /// above: page tables wholly between them serve nobody but `range`.
    pub(crate) fn neighbours(&self, range: Range) -> (u64, u64) {
        let below = self.vmas.range(..range.start()).next_back().map_or(0, |(_, vma)| vma.range.end());
        let above = self.vmas.range(range.end()..).next().map_or(u64::MAX, |(&start, _)| start);
        (below, above)
    }

    /// Adds a vma that overlaps none, and leaves it apart from its neighbours.
    pub(crate) fn insert(&mut self, vma: Vma) {
        self.vmas.insert(vma.range.start(), vma);
    }

    /// Adds a vma that overlaps none, merged with its neighbours where that is possible (vma_merge_new_range).
    pub(crate) fn insert_merging(&mut self, mut vma: Vma) {
        let prev = self.vmas.range(..vma.range.start()).next_back().map(|(&start, _)| start);
        if let Some(prev) = prev.filter(|start| self.vmas[start].merges_with(&vma)) {
            vma = join(self.vmas.remove(&prev).expect("just seen"), &vma);
        }
        if let Some(next) = self.vmas.get(&vma.range.end()).filter(|next| vma.merges_with(next)) {
            let start = next.range.start();
            let next = self.vmas.remove(&start).expect("just seen");
            vma = join(vma, &next);
        }
        self.insert(vma);
    }

    /// Takes `range` out of the tree; vmas that reach past it are split. The pieces taken out, in order.
    pub(crate) fn detach(&mut self, range: Range) -> Vec<Vma> {
        let hit: Vec<u64> = self.overlapping(range).map(|vma| vma.range.start()).collect();
        let mut out = Vec::with_capacity(hit.len());
        for start in hit {
            let vma = self.vmas.remove(&start).expect("just seen");
            let Some(cut) = vma.range.intersection(range) else { continue };
            for (start, end) in [(vma.range.start(), cut.start()), (cut.end(), vma.range.end())] {
                if let Ok(rest) = Range::new(start, end - start) {
                    self.insert(vma.piece(rest));
                }
            }
            out.push(vma.piece(cut));
        }
        out
    }

    /// The anon_vma of a neighbour that `vma`, which has none, could merge with once their protections were equal
    /// (find_mergeable_anon_vma). Not one that came by fork, lest it get ever more users.
    pub(crate) fn mergeable_anon_vma(&self, vma: &Vma) -> Option<u64> {
        let next = self.vmas.get(&vma.range.end());
        let prev = self.vmas.range(..vma.range.start()).next_back().map(|(_, prev)| prev);
        let of_next = next.filter(|next| vma.alike(next) && !next.forked()).and_then(Vma::anon_vma);
        let of_prev = prev.filter(|prev| prev.alike(vma) && !prev.forked()).and_then(Vma::anon_vma);
        of_next.or(of_prev)
    }

    /// Changes the part of every vma that lies in `range`, split and merged as needed (vma_modify).
    pub(crate) fn modify(&mut self, range: Range, change: impl Fn(&mut Vma)) {
        for mut piece in self.detach(range) {
            change(&mut piece);
            self.insert_merging(piece);
        }
    }

    /// The highest gap of `len` bytes below `top` (top-down layout, v6.18 default), if there is one.
    pub(crate) fn find_gap(&self, len: u64, bottom: u64, top: u64) -> Option<Range> {
        let mut ceiling = top;
        for vma in self.vmas.values().rev() {
            if vma.range.end() <= ceiling && ceiling - vma.range.end() >= len {
                break;
            }
            ceiling = ceiling.min(vma.range.start());
        }
        let start = ceiling.checked_sub(len).filter(|&start| start >= bottom)?;
        Range::new(start, len).ok()
    }
}

fn join(mut low: Vma, high: &Vma) -> Vma {
    low.range =
        Range::new(low.range.start(), low.range.len() + high.range.len()).expect("neighbours in user space");
    if low.anon_vma().is_none() {
        low.anon_vma.store(high.anon_vma.load(Ordering::SeqCst), Ordering::SeqCst);
        low.inherited = high.inherited.clone();
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(page: u64, pages: u64) -> Range {
        Range::new(page << 12, pages << 12).unwrap()
    }

    fn ranges(tree: &VmaTree) -> Vec<(u64, u64)> {
        tree.iter().map(|v| (v.range.start() >> 12, v.range.pages())).collect()
    }

    #[test]
    fn neighbours_merge_unless_anon_vmas_differ() {
        let mut tree = VmaTree::default();
        tree.insert_merging(Vma::new(range(1, 1), Prot::Read));
        tree.insert_merging(Vma::new(range(3, 1), Prot::Read));
        tree.insert_merging(Vma::new(range(2, 1), Prot::Read));
        assert_eq!(ranges(&tree), [(1, 3)]);
        tree.insert_merging(Vma::new(range(4, 1), Prot::ReadWrite));
        assert_eq!(ranges(&tree), [(1, 3), (4, 1)]);

        let mut apart = VmaTree::default();
        apart.insert_merging(Vma::new(range(1, 1), Prot::Read));
        apart.insert_merging(Vma::new(range(3, 1), Prot::Read));
        for (page, id) in [(1, 1), (3, 2)] {
            assert!(apart.find(page << 12).unwrap().set_anon_vma(id));
        }
        apart.insert_merging(Vma::new(range(2, 1), Prot::Read));
        assert_eq!(ranges(&apart), [(1, 2), (3, 1)]);
    }

    #[test]
    fn detach_splits_at_both_ends() {
        let mut tree = VmaTree::default();
        tree.insert_merging(Vma::new(range(1, 4), Prot::Read));
        tree.insert_merging(Vma::new(range(6, 4), Prot::ReadWrite));
        let out: Vec<_> = tree.detach(range(2, 5)).iter().map(|v| v.range).collect();
        assert_eq!(out, [range(2, 3), range(6, 1)]);
        assert_eq!(ranges(&tree), [(1, 1), (7, 3)]);
        assert_eq!(tree.neighbours(range(2, 5)), (2 << 12, 7 << 12));
        assert!(tree.find(2 << 12).is_none() && tree.find((7 << 12) + 5).is_some());
    }

    #[test]
    fn the_highest_gap_is_taken() {
        let mut tree = VmaTree::default();
        assert_eq!(tree.find_gap(2 << 12, 1 << 12, 10 << 12), Some(range(8, 2)));
        tree.insert(Vma::new(range(8, 2), Prot::Read));
        tree.insert(Vma::new(range(5, 2), Prot::Read));
        assert_eq!(tree.find_gap(1 << 12, 1 << 12, 10 << 12), Some(range(7, 1)));
        assert_eq!(tree.find_gap(2 << 12, 1 << 12, 10 << 12), Some(range(3, 2)));
        assert_eq!(tree.find_gap(5 << 12, 1 << 12, 10 << 12), None);
    }
}
