// SPDX-License-Identifier: MIT OR Apache-2.0
//! What each path fires, in order: the path is run once, alone, and notifiers write down what they hear.
//!
//! More than one, because invalidate_page goes, where there is no pair, only to who has no change_pte.

use crate::path::{Path, Stage, X};
use interleave::explore::Ghost;
use interleave::{Atomic, MaySleep, PageContext, Sleep};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, PAGE_SIZE, PageAddr, Pte, Range, WouldBlock};
use softmm::{KernelProfile, Machine};
use std::fmt;
use std::sync::Arc;

/// One notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// S, E, P, C, R (invalidate_range, arch_invalidate_secondary_tlbs), Y (young), X (release).
    pub letter: char,
    /// First page, relative to the page that the path works on.
    pub first: i64,
    /// Pages; 0: to the end of the address space.
    pub pages: u64,
}

impl Heard {
    fn new(letter: char, range: Range) -> Heard {
        let first = (range.start() / PAGE_SIZE) as i64 - X as i64;
        let pages = if range == Range::ALL { 0 } else { (range.end() - range.start()) / PAGE_SIZE };
        Heard { letter, first, pages }
    }
}

impl fmt::Display for Heard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Heard { letter, first, pages } = self;
        match (first, pages) {
            (0, 1) => write!(f, "{letter}"),
            (_, 0) => write!(f, "{letter}(all)"),
            _ => write!(f, "{letter}({first:+} {pages})"),
        }
    }
}

struct Recorder {
    ops: Ops,
    heard: Arc<Ghost<Vec<Heard>>>,
}

impl Recorder {
    fn note(&self, letter: char, range: Range) {
        self.heard.update(|heard| heard.push(Heard::new(letter, range)));
    }
}

impl MmuNotifier for Recorder {
    fn ops(&self) -> Ops {
        self.ops
    }

    fn invalidate_range_start(&self, _: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        self.note('S', inv.range);
        Ok(())
    }

    fn invalidate_range_end(&self, _: Sleep<'_, '_>, inv: &Invalidation) {
        self.note('E', inv.range);
    }

    fn invalidate_page(&self, _: PageContext<'_, '_>, page: PageAddr) {
        self.note('P', Range::page(page));
    }

    fn change_pte(&self, _: &mut Atomic<'_>, page: PageAddr, _: Pte) {
        self.note('C', Range::page(page));
    }

    fn arch_invalidate_secondary_tlbs(&self, _: &mut Atomic<'_>, range: Range) {
        self.note('R', range);
    }

    fn clear_flush_young(&self, _: &mut Atomic<'_>, range: Range) -> bool {
        self.note('Y', range);
        false
    }

    fn release(&self, _: &mut MaySleep<'_>) {
        self.note('X', Range::ALL);
    }
}

/// The notifiers that listen, each to a part: see the module; and 6.6 and later refuse one that hears secondary TLBs and
/// the pair.
const EARS: [Ops; 3] = [
    Ops::SECONDARY_TLBS,
    Ops::PAGE,
    Ops::START.and(Ops::END).and(Ops::CHANGE_PTE).and(Ops::CLEAR_FLUSH_YOUNG).and(Ops::RELEASE),
];

/// What `path` fires under `profile` in its process, what prepares it not counted.
pub fn heard(cx: &mut MaySleep<'_>, path: &Path, profile: KernelProfile) -> Vec<Heard> {
    let machine = Machine::new(softmm::Config {
        frames: 64,
        tables: 32,
        swap_slots: 16,
        words_per_page: 2,
        fault_around: 1,
        profile,
        ..softmm::Config::default()
    });
    let Ok(user) = machine.new_mm() else { return Vec::new() };
    let stage = Stage::new(machine, user, path.file);
    (path.prepare)(cx, &stage);
    (path.bound)(cx, &stage);
    let heard = Arc::new(Ghost::new(Vec::new()));
    let mut registrations = Vec::new();
    for ops in EARS {
        let recorder = Arc::new(Recorder { ops, heard: heard.clone() });
        registrations.extend(stage.mm.notifiers().register(cx, recorder));
    }
    (path.run)(cx, &stage);
    // Unregistering calls release, which is none of the path's.
    let told = heard.read(Clone::clone);
    for registration in registrations {
        // Refused inside its own callbacks alone, and none runs here.
        let _ = registration.unregister(cx);
    }
    end(cx, stage);
    told
}

fn end(cx: &mut MaySleep<'_>, stage: Stage) {
    let Stage { user, children, .. } = stage;
    for user in children.into_inner().into_iter().chain(user.into_inner()) {
        user.mmput(cx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::named;

    fn letters(path: &str, profile: KernelProfile) -> String {
        let path = named(path).expect("a path");
        MaySleep::enter(|cx| heard(cx, path, profile)).iter().map(|heard| heard.letter).collect()
    }

    #[test]
    fn the_pair_and_what_stands_in_its_place() {
        assert_eq!(letters("cow-zero", KernelProfile::V3_16), "SCE");
        assert_eq!(letters("cow-zero", KernelProfile::UNWRAPPED_A), "C");
        assert_eq!(letters("cow-zero", KernelProfile::UNWRAPPED_B), "CP");
        assert_eq!(letters("cow-zero", KernelProfile::V6_18), "SRE");
    }

    #[test]
    fn a_page_that_leaves_by_swap_is_told_by_page_until_4_13() {
        assert!(letters("swap-out", KernelProfile::V3_16).contains('P'));
        let now = letters("swap-out", KernelProfile::V6_18);
        assert!(!now.contains('P') && now.contains('S'), "{now}");
    }
}
