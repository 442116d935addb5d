// SPDX-License-Identifier: MIT OR Apache-2.0
//! A log of every callback, in the tokens of `sequences.rs`.

#![allow(dead_code, reason = "each test binary uses its own part")]

use super::register;
use interleave::{Atomic, LockClass, MaySleep, PageContext, Sleep, SpinLock};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};
use softmm::{FrameId, KernelProfile, Mm};
use std::sync::{Arc, Weak};

static LOG: LockClass = LockClass::new("test log");

/// What was mapped at page 16 when the operation began.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Before {
    pte: softmm::Pte,
    frame: Option<FrameId>,
}

/// See `sequences.rs`.
pub(crate) struct Log {
    mm: Weak<Mm>,
    before: SpinLock<Option<Before>>,
    pub(crate) tokens: SpinLock<Vec<String>>,
}

/// The page whose pte the tokens tell.
pub(crate) fn watched() -> PageAddr {
    PageAddr::new(16 << 12).unwrap()
}

impl Log {
    /// Registers a mirror, one that has invalidate_page alone, and one that shares the page table.
    pub(crate) fn of(cx: &mut MaySleep<'_>, mm: &Arc<Mm>) -> Arc<Log> {
        let log = Arc::new(Log {
            mm: Arc::downgrade(mm),
            before: SpinLock::new(&LOG, None),
            tokens: SpinLock::new(&LOG, Vec::new()),
        });
        register(cx, mm, Arc::new(PageOnly(log.clone())));
        register(cx, mm, Arc::new(Mirror(log.clone())));
        register(cx, mm, Arc::new(Tlb(log.clone())));
        log
    }

    /// The operation begins now.
    pub(crate) fn begin(&self, cx: &mut MaySleep<'_>) {
        let Some(mm) = self.mm.upgrade() else { return };
        let pte = mm.peek_pte(watched());
        let frame = pte.is_mapped().then(|| mm.machine().frames().id(pte.pfn()));
        *self.before.lock(cx) = Some(Before { pte, frame });
        self.tokens.lock(cx).clear();
    }

    fn note<C: interleave::Context + ?Sized>(&self, cx: &mut C, what: &str, range: Range) {
        let Some(before) = *self.before.lock(cx) else { return };
        let mut token = what.to_owned();
        if let Some(mm) = self.mm.upgrade() {
            let now = mm.peek_pte(watched());
            let same = now.is_swap() == before.pte.is_swap()
                && now.is_mapped() == before.pte.is_mapped()
                && now.is_present() == before.pte.is_present()
                && now.pfn() == before.pte.pfn()
                && now.is_writable() == before.pte.is_writable();
            token.push(if now.is_none() {
                '-'
            } else if same {
                '='
            } else {
                '*'
            });
            if before.frame.is_some_and(|frame| !mm.machine().frames().is_live(frame)) {
                token.push('!');
            }
        }
        if range == Range::ALL {
            token.push_str("all");
        } else if range != Range::page(watched()) {
            token.push_str(&format!("{}+{}", range.start() >> 12, range.pages()));
        }
        self.tokens.lock(cx).push(token);
    }
}

/// Mirrors a page table and has a change_pte, as KVM.
struct Mirror(Arc<Log>);
/// Has invalidate_page alone.
struct PageOnly(Arc<Log>);
/// Shares the page table.
struct Tlb(Arc<Log>);

impl MmuNotifier for Mirror {
    fn ops(&self) -> Ops {
        let young = Ops::CLEAR_FLUSH_YOUNG | Ops::CLEAR_YOUNG | Ops::TEST_YOUNG;
        Ops::START | Ops::END | Ops::PAGE | Ops::CHANGE_PTE | Ops::RELEASE | young
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        self.0.note(&mut cx, "S", inv.range);
        Ok(())
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) {
        self.0.note(&mut cx, "E", inv.range);
    }

    fn invalidate_page(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        let what = if matches!(cx, PageContext::May(_)) { "P" } else { "p" };
        self.0.note(&mut cx, what, Range::page(page));
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, _: Pte) {
        self.0.note(cx, "C", Range::page(page));
    }

    fn clear_flush_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.0.note(cx, "Y", range);
        false
    }

    fn clear_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.0.note(cx, "y", range);
        false
    }

    fn test_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.0.note(cx, "T", range);
        true
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.0.note(cx, "X", Range::page(watched()));
    }
}

impl MmuNotifier for PageOnly {
    fn ops(&self) -> Ops {
        Ops::PAGE
    }

    fn invalidate_page(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        let what = if matches!(cx, PageContext::May(_)) { "P~" } else { "p~" };
        self.0.note(&mut cx, what, Range::page(page));
    }
}

impl MmuNotifier for Tlb {
    fn ops(&self) -> Ops {
        Ops::SECONDARY_TLBS
    }

    fn arch_invalidate_secondary_tlbs(&self, cx: &mut Atomic<'_>, range: Range) {
        self.0.note(cx, "R", range);
    }
}

/// The profiles whose copy-on-write, reclaim and so on are alike: `a..b` by the order of [`KernelProfile::ALL`].
pub(crate) fn covers(names: &str, profile: &KernelProfile) -> bool {
    let place =
        |name: &str| KernelProfile::ALL.iter().position(|p| p.name == name).expect("a profile's name");
    let at = place(profile.name);
    names.split(' ').any(|part| match part.split_once("..") {
        Some((first, last)) => (place(first)..=place(last)).contains(&at),
        None => place(part) == at,
    })
}

/// Where one page is replaced under set_pte_at_notify.
pub(crate) const COPY: &[(&str, &str)] = &[
    ("v3_16", "S= C- E*"),
    ("unwrapped_a", "C-"),
    ("unwrapped_b", "C- P~*"),
    ("unwrapped_c", "C- p~-"),
    ("v3_19..v4_14", "S= R- C- R* E*"),
    ("v5_10", "S= R- C- E*"),
    ("v6_18", "S= R- E*"),
];
