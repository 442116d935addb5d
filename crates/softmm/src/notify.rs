// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the paths share of telling notifiers: the pair, set_pte_at_notify, ptep_clear_flush.
//!
//! set_pte_at_notify, under the ptl, the pte cleared and flushed before: C; **set**. C comes first because the page and
//! the write permission change together: a CPU that already wrote the new page would be ahead of a device that still
//! reads the old one.
//!
//! | profile | around | in the place of C, for who has no change_pte |
//! |---|---|---|
//! | v3_16 .. v5_10 | S, E | - |
//! | unwrapped_a | - | - |
//! | unwrapped_b | - | after the unlock: P, may sleep |
//! | unwrapped_c | - | under the ptl: P, atomic |
//! | v6_18 | S, E | no C at all |

use crate::mm::Mm;
use crate::page_table::Ptes;
use crate::profile::{Fallback, SecondaryTlbs};
use crate::pte::Pte;
use interleave::{Atomic, Context, MaySleep, PageContext};
use mmu_notifier::{Event, Invalidation, PageAddr, Range, WouldBlock};

/// How a section ends: see [`mmu_notifier::InvalidateSection`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Full,
    /// Secondary TLBs have been flushed inside.
    Only,
}

impl Mm {
    fn invalidation(&self, range: Range, event: Event) -> Invalidation {
        if self.machine().profile().events {
            Invalidation::new(range, event)
        } else {
            Invalidation::of_unknown_kind(range)
        }
    }

    /// S; `change`; E. Blockable.
    pub(crate) fn invalidate<R>(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        event: Event,
        change: impl FnOnce(&mut MaySleep<'_>) -> R,
    ) -> R {
        let section = self.notifiers.invalidate_range_start(cx, self.invalidation(range, event));
        let result = change(cx);
        section.invalidate_range_end(cx);
        result
    }

    /// S, and if every callback could do without sleeping: `change`; E. Otherwise neither.
    pub(crate) fn invalidate_nonblock<R>(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        event: Event,
        change: impl FnOnce(&mut MaySleep<'_>) -> R,
    ) -> Result<R, WouldBlock> {
        let section = self.notifiers.invalidate_range_start_nonblock(cx, self.invalidation(range, event))?;
        let result = change(cx);
        section.invalidate_range_end(cx);
        Ok(result)
    }

    /// What stands around a set_pte_at_notify of `page`. `change` says whether it changed anything, and so does this.
    pub(crate) fn change_pte_section(
        &self,
        cx: &mut MaySleep<'_>,
        page: PageAddr,
        end: End,
        change: impl FnOnce(&mut MaySleep<'_>) -> bool,
    ) -> bool {
        let profile = self.machine().profile().change_pte;
        if profile.pair {
            let inv = self.invalidation(Range::page(page), Event::Clear);
            let section = self.notifiers.invalidate_range_start(cx, inv);
            let changed = change(cx);
            match end {
                End::Full => section.invalidate_range_end(cx),
                End::Only => section.invalidate_range_only_end(cx),
            }
            return changed;
        }
        let changed = change(cx);
        if changed && profile.fallback == Fallback::PageAfterUnlock {
            self.notifiers.invalidate_page_without_change_pte(PageContext::May(cx), page);
        }
        changed
    }

    /// Stores `pte` where it was cleared and flushed.
    pub(crate) fn set_pte_at_notify(
        &self,
        ptes: &mut Ptes<'_>,
        cx: &mut Atomic<'_>,
        page: PageAddr,
        pte: Pte,
    ) {
        let profile = self.machine().profile().change_pte;
        if profile.called {
            let seen = mmu_notifier::Pte { pfn: pte.pfn(), writable: pte.is_writable() };
            self.notifiers.change_pte(cx, page, seen);
        }
        if !profile.pair && profile.fallback == Fallback::PageUnderPtl {
            self.notifiers.invalidate_page_without_change_pte(PageContext::Atomic(cx), page);
        }
        ptes.set(page, pte);
    }

    /// ptep_clear_flush: the CPUs, and with them secondary TLBs where they hang on the CPUs' flush.
    pub(crate) fn clear_flush<C: Context + ?Sized>(
        &self,
        ptes: &mut Ptes<'_>,
        cx: &mut C,
        page: PageAddr,
    ) -> Pte {
        let pte = ptes.get_and_clear(page);
        self.machine().flush_tlb_range(cx, self, Range::page(page));
        pte
    }

    /// ptep_clear_flush_notify: and R (3.19 to 6.5).
    pub(crate) fn clear_flush_notify(&self, ptes: &mut Ptes<'_>, cx: &mut Atomic<'_>, page: PageAddr) -> Pte {
        let pte = self.clear_flush(ptes, cx, page);
        self.invalidate_secondary(cx, Range::page(page));
        pte
    }

    /// R: mmu_notifier_invalidate_range, where the mm calls it.
    pub(crate) fn invalidate_secondary<C: Context + ?Sized>(&self, cx: &mut C, range: Range) {
        if self.machine().profile().secondary_tlbs == SecondaryTlbs::Mm {
            self.secondary_tlbs(cx, range);
        }
    }

    pub(crate) fn secondary_tlbs<C: Context + ?Sized>(&self, cx: &mut C, range: Range) {
        interleave::preempt_disable(cx, |cx: &mut Atomic<'_>| {
            self.notifiers.arch_invalidate_secondary_tlbs(cx, range);
        });
    }
}
