// SPDX-License-Identifier: MIT OR Apache-2.0
//! A notifier that writes down what it hears and looks at the page table each time.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod failure;
pub(crate) mod log;

use interleave::{Atomic, LockClass, MaySleep, PageContext, Sleep, SpinLock};
use mmu_notifier::{Event, Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};
use softmm::{FrameId, Mm};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

static RECORDER: LockClass = LockClass::new("test recorder");

/// `pages` pages from page number `first`.
pub(crate) fn range(first: u64, pages: u64) -> Range {
    Range::new(first << 12, pages << 12).expect("a test's own range")
}

/// One line of a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// invalidate_range_start.
    S(Option<Event>, Range),
    /// invalidate_range_end.
    E(Option<Event>, Range),
    /// release.
    X,
}

/// What a translation lets the CPU do, without the bits that are not notified.
type Translation = (FrameId, bool);

#[derive(Default)]
struct State {
    heard: Vec<Heard>,
    seen: BTreeMap<PageAddr, Translation>,
    /// What the open range led to at its start.
    held: Vec<FrameId>,
    wrong: Vec<String>,
}

/// Hears everything about one mm and checks that translations are taken away only between S and E, or
/// with a P or C.
pub(crate) struct Recorder {
    mm: Weak<Mm>,
    window: Range,
    /// A flush inside S..E frees what it flushed: a full batch, a dirty page of a file.
    frees_inside: bool,
    state: SpinLock<State>,
}

impl Recorder {
    /// Watches the ptes of `window`.
    pub(crate) fn new(mm: &Arc<Mm>, window: Range) -> Arc<Recorder> {
        Recorder::made(mm, window, false)
    }

    /// The same where frames may be freed before E.
    pub(crate) fn of_files(mm: &Arc<Mm>, window: Range) -> Arc<Recorder> {
        Recorder::made(mm, window, true)
    }

    fn made(mm: &Arc<Mm>, window: Range, frees_inside: bool) -> Arc<Recorder> {
        Arc::new(Recorder {
            mm: Arc::downgrade(mm),
            window,
            frees_inside,
            state: SpinLock::new(&RECORDER, State::default()),
        })
    }

    /// What was heard since the last call.
    pub(crate) fn take(&self, cx: &mut MaySleep<'_>) -> Vec<Heard> {
        std::mem::take(&mut self.state.lock(cx).heard)
    }

    /// Call it when no operation runs: nothing may have been lost since the last E.
    pub(crate) fn check_quiet(&self, cx: &mut MaySleep<'_>) {
        let mut state = self.state.lock(cx);
        self.look(&mut state, "after the operation", None);
        assert!(state.wrong.is_empty(), "{:#?}\nheard: {:#x?}", state.wrong, state.heard);
    }

    fn translations(&self) -> BTreeMap<PageAddr, Translation> {
        let Some(mm) = self.mm.upgrade() else { return BTreeMap::new() };
        let present = self.window.iter_pages().map(|page| (page, mm.peek_pte(page)));
        present
            .filter(|(_, pte)| pte.is_present())
            .map(|(page, pte)| (page, (mm.machine().frames().id(pte.pfn()), pte.is_writable())))
            .collect()
    }

    /// A translation that went, or leads elsewhere, or no longer allows a write, must lie in `allowed`.
    fn look(&self, state: &mut State, when: &str, allowed: Option<Range>) {
        let now = self.translations();
        for (&page, &(frame, writable)) in &state.seen {
            let kept = now.get(&page).is_some_and(|&(f, w)| f == frame && (w || !writable));
            if !kept && !allowed.is_some_and(|r| r.contains(Range::page(page))) {
                state.wrong.push(format!("{when}: {page:?} lost {frame:?}, {:?} now", now.get(&page)));
            }
        }
        state.seen = now;
    }
}

/// Registers for the life of the mm.
pub(crate) fn register(cx: &mut MaySleep<'_>, mm: &Mm, notifier: Arc<dyn MmuNotifier>) {
    std::mem::forget(mm.notifiers().register(cx, notifier).expect("the mm is alive"));
}

impl MmuNotifier for Recorder {
    fn ops(&self) -> Ops {
        Ops::START | Ops::END | Ops::RELEASE | Ops::PAGE | Ops::CHANGE_PTE
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let mut state = self.state.lock(&mut cx);
        self.look(&mut state, "at S", None);
        let inside = state.seen.iter().filter(|(page, _)| inv.range.contains(Range::page(**page)));
        state.held = inside.map(|(_, (frame, _))| *frame).collect();
        state.heard.push(Heard::S(inv.event, inv.range));
        Ok(())
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) {
        let mut state = self.state.lock(&mut cx);
        self.look(&mut state, "at E", Some(inv.range));
        if let Some(mm) = self.mm.upgrade() {
            for frame in std::mem::take(&mut state.held) {
                if !self.frees_inside && !mm.machine().frames().is_live(frame) {
                    state.wrong.push(format!("{frame:?} was freed before E"));
                }
            }
        }
        state.heard.push(Heard::E(inv.event, inv.range));
    }

    // The kernels that have these two replace a page with nothing around it.
    fn invalidate_page(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        self.look(&mut self.state.lock(&mut cx), "at P", Some(Range::page(page)));
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, _: Pte) {
        self.look(&mut self.state.lock(cx), "at C", Some(Range::page(page)));
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.state.lock(cx).heard.push(Heard::X);
    }
}
