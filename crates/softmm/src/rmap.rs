// SPDX-License-Identifier: MIT OR Apache-2.0
//! From a page to the ptes that map it: anon_vma (all versions; without the reuse of empty ones, 4.0).
//!
//! An anonymous page remembers an anon_vma and a page number. Every vma that may map the page is linked to that
//! anon_vma: the vma that made the page, the vmas that fork copied from it, and those to which mremap has moved its pages: a
//! page keeps its number, and each vma knows how far its addresses are from the numbers. A vma that fork made has an anon_vma of its own too, for its own pages, so that they are
//! not looked for in the parent.
//!
//! Invariants:
//! * All anon_vmas of a family of forks share one lock (`anon_vma->root->rwsem`).
//! * While it is held, no vma of the family can be unlinked, and so the page tables of a vma that was found stay:
//!   unmapping unlinks before it frees tables.
//! * A link names the addresses that a mm has linked, not single vmas: splitting and merging change nothing here.
//!
//! Notifiers: a walk visits a vma, and so notifies, also where the page turns out not to be mapped.
//!
//! Lock order: `mmap_lock`, `page_lock` -> `anon_vma` -> S..E, `ptl`. `anon_vma_rcu` is a leaf; it stands for the
//! RCU section in which the kernel goes from a page to its anon_vma.

use crate::machine::Machine;
use crate::mm::{Mm, MmId};
use crate::page_table::PteGuard;
use crate::vma::{Vma, VmaTree};
use interleave::{Context, Digest, LockClass, MaySleep, RwLock, SpinLock};
use mmu_notifier::{PageAddr, Pfn, Range};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Weak};

static ANON_VMA: LockClass = LockClass::new("anon_vma");
static ANON_VMA_RCU: LockClass = LockClass::new("anon_vma_rcu");

/// What a walk does at each place where a page may be mapped.
pub(crate) type Visit<'v> = dyn FnMut(&mut MaySleep<'_>, &Arc<Mm>, PageAddr) -> ControlFlow<()> + 'v;

/// Addresses of one mm under an anon_vma.
struct Link {
    id: MmId,
    mm: Weak<Mm>,
    range: Range,
    /// From an address in `range` to the number by which its page is looked for.
    shift: u64,
}

impl Link {
    /// The number of its first page: its place in the tree.
    fn first(&self) -> u64 {
        self.range.start().wrapping_add(self.shift)
    }
}

impl Digest for Link {
    fn digest(&self) -> u64 {
        (self.id.number(), self.range.start(), self.range.end()).digest()
    }
}

/// The anon_vmas that came out of one by forks; an empty one is not there.
struct Family {
    /// The first of them. Immutable.
    root: u64,
    /// By first page, then by age: so the kernel visits them.
    trees: RwLock<BTreeMap<u64, Vec<Link>>>,
}

/// Which family it is; what is in it is under a lock of its own.
impl Digest for Family {
    fn digest(&self) -> u64 {
        self.root
    }
}

/// The anon_vmas of a machine, by name.
pub(crate) struct AnonVmas {
    families: SpinLock<BTreeMap<u64, Arc<Family>>>,
}

impl AnonVmas {
    pub(crate) fn new() -> AnonVmas {
        AnonVmas { families: SpinLock::with_digest(&ANON_VMA_RCU, BTreeMap::new(), BTreeMap::digest) }
    }

    fn family<C: Context + ?Sized>(&self, cx: &mut C, anon_vma: u64) -> Option<Arc<Family>> {
        self.families.lock(cx).get(&anon_vma).cloned()
    }

    /// Do both anon_vmas have the same root?
    pub(crate) fn related<C: Context + ?Sized>(&self, cx: &mut C, a: u64, b: u64) -> bool {
        let families = self.families.lock(cx);
        matches!((families.get(&a), families.get(&b)), (Some(a), Some(b)) if Arc::ptr_eq(a, b))
    }
}

impl Mm {
    /// Gives the vma at `page` an anon_vma: that of a neighbour which it could merge with, else a new one
    /// (anon_vma_prepare; mmap_lock held for reading is enough).
    pub(crate) fn anon_vma_prepare(&self, cx: &mut MaySleep<'_>, vmas: &VmaTree, page: PageAddr) {
        let Some(vma) = vmas.find(page.get()).filter(|vma| vma.anon_vma().is_none()) else { return };
        let all = self.machine().anon_vmas();
        let shared = vmas.mergeable_anon_vma(vma);
        let known = shared.and_then(|id| all.family(cx, id));
        let id = shared.unwrap_or_else(|| self.machine().fresh_id());
        let family = known.unwrap_or_else(|| {
            Arc::new(Family {
                root: id,
                trees: RwLock::with_digest(&ANON_VMA, BTreeMap::new(), BTreeMap::digest),
            })
        });
        let mut trees = family.trees.write(cx);
        // A racing fault may have been first; then there is nothing to do.
        if vma.set_anon_vma(id) {
            all.families.lock(cx).insert(id, family.clone());
            self.link(&mut trees, id, vma);
        }
        drop(trees);
    }

    /// Links all of `vma`, which has grown, to its anon_vmas, if it has any (anon_vma_interval_tree_post_update_vma).
    pub(crate) fn anon_vma_link(&self, cx: &mut MaySleep<'_>, vma: &Vma) {
        let Some(id) = vma.anon_vma() else { return };
        let Some(family) = self.machine().anon_vmas().family(cx, id) else { return };
        let mut trees = family.trees.write(cx);
        vma.anon_vmas().for_each(|id| self.link(&mut trees, id, vma));
        drop(trees);
    }

    /// Links the child's copy of a vma, whose own anon_vma is new, to the family of the parent (anon_vma_fork).
    pub(crate) fn anon_vma_fork(&self, cx: &mut MaySleep<'_>, copy: &Vma) {
        let (Some(own), Some(parent)) = (copy.anon_vma(), copy.anon_vmas().next()) else { return };
        let all = self.machine().anon_vmas();
        let Some(family) = all.family(cx, parent) else { return };
        let mut trees = family.trees.write(cx);
        all.families.lock(cx).insert(own, family.clone());
        copy.anon_vmas().for_each(|id| self.link(&mut trees, id, copy));
        drop(trees);
    }

    /// `piece` is unmapped: no walk finds it afterwards (unlink_anon_vmas). Before its page tables go.
    pub(crate) fn unlink_anon_vmas(&self, cx: &mut MaySleep<'_>, piece: &Vma) {
        let all = self.machine().anon_vmas();
        let Some(family) = piece.anon_vma().and_then(|id| all.family(cx, id)) else { return };
        let mut trees = family.trees.write(cx);
        for id in piece.anon_vmas() {
            let Some(links) = trees.get_mut(&id) else { continue };
            subtract(links, self.id(), piece.range);
            if links.is_empty() {
                trees.remove(&id);
                all.families.lock(cx).remove(&id);
            }
        }
        drop(trees);
    }

    fn link(&self, trees: &mut BTreeMap<u64, Vec<Link>>, id: u64, vma: &Vma) {
        let links = trees.entry(id).or_default();
        subtract(links, self.id(), vma.range);
        links.push(Link { id: self.id(), mm: self.weak().clone(), range: vma.range, shift: vma.shift() });
        links.sort_by_key(Link::first);
    }

    /// A new page gets its first mapping (page_add_new_anon_rmap). Under the ptl; the vma has an anon_vma.
    pub(crate) fn add_new_anon_rmap(&self, vma: &Vma, pfn: Pfn, page: PageAddr) {
        let frames = self.machine().frames();
        frames.set_anon_vma(pfn, vma.anon_vma().unwrap_or_default(), vma.anon_index(page));
        frames.set_exclusive(pfn, self.machine().profile().has_exclusive());
        frames.add_rmap(pfn);
    }

    /// page_vma_mapped_walk: the ptl of the pte at `page`, if that pte maps `pfn`.
    pub(crate) fn mapped_pte<'l, 'c, C: Context + ?Sized>(
        &'l self,
        cx: &'c mut C,
        page: PageAddr,
        pfn: Pfn,
    ) -> Option<PteGuard<'l, 'c>> {
        let tables = self.machine().tables();
        let leaf = self.page_table.leaf(tables, page)?;
        let guard = PteGuard::lock(tables, leaf, cx);
        let pte = guard.get(page);
        (pte.is_mapped() && pte.pfn() == pfn).then_some(guard)
    }
}

/// Takes `range` of `mm` out of `links`.
fn subtract(links: &mut Vec<Link>, mm: MmId, range: Range) {
    let mut rest = Vec::new();
    links.retain(|link| {
        let Some(cut) = link.range.intersection(range).filter(|_| link.id == mm) else { return true };
        for (start, end) in [(link.range.start(), cut.start()), (cut.end(), link.range.end())] {
            if let Ok(range) = Range::new(start, end - start) {
                rest.push(Link { range, mm: link.mm.clone(), ..*link });
            }
        }
        false
    });
    links.append(&mut rest);
    links.sort_by_key(Link::first);
}

impl Machine {
    /// rmap_walk: calls `visit` for each place where the anonymous page may be mapped, until it breaks. The caller
    /// holds a reference on the page. [`crate::ksm`] says what a page of KSM's has instead of an anon_vma.
    pub(crate) fn rmap_walk(
        &self,
        cx: &mut MaySleep<'_>,
        pfn: Pfn,
        mut visit: impl FnMut(&mut MaySleep<'_>, &Arc<Mm>, PageAddr) -> ControlFlow<()>,
    ) {
        if self.frames().is_ksm(pfn) {
            self.rmap_walk_ksm(cx, pfn, &mut visit);
        } else if let Some((anon_vma, index)) = self.frames().anon_vma(pfn) {
            let _ = self.anon_vma_walk(cx, anon_vma, index, &mut visit);
        }
    }

    /// The places under one anon_vma of what [`Vma::anon_index`] numbers `index`.
    pub(crate) fn anon_vma_walk(
        &self,
        cx: &mut MaySleep<'_>,
        anon_vma: u64,
        index: PageAddr,
        visit: &mut Visit<'_>,
    ) -> ControlFlow<()> {
        let Some(family) = self.anon_vmas().family(cx, anon_vma) else { return ControlFlow::Continue(()) };
        let trees = family.trees.read(cx);
        let mut links = trees.get(&anon_vma).into_iter().flatten();
        links.try_for_each(|link| {
            let page = PageAddr::new(index.get().wrapping_sub(link.shift)).ok();
            match page.filter(|&page| link.range.contains(Range::page(page))).zip(link.mm.upgrade()) {
                Some((page, mm)) => visit(cx, &mm, page),
                None => ControlFlow::Continue(()),
            }
        })
    }
}
