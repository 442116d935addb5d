// SPDX-License-Identifier: MIT OR Apache-2.0
//! Races of the mm with itself, explored. Those with a name of their own were lost once: an exploration finds each again if
//! its cause comes back.

mod common;

use common::range;
use interleave::explore::{Config, Report, Strategy, explore, forget};
use interleave::{AtomicBool, MaySleep, Ordering, scope};
use mmu_notifier::PageAddr;
use softmm::{FileKind, Foll, FrameId, KernelProfile, Machine, MapKind, Mm, Placement, Prot, Reclaim};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;

/// So small that an execution is short.
fn machine(profile: KernelProfile) -> Arc<Machine> {
    Machine::new(softmm::Config {
        frames: 6,
        tables: 8,
        swap_slots: 1,
        words_per_page: 1,
        gather_batch: 4,
        fault_around: 1,
        profile,
        ..softmm::Config::default()
    })
}

/// read(2) fills the page cache while another thread stores through a mapping, writes the page out and drops it.
fn fill_beside_writeback(cx: &mut MaySleep<'_>, profile: KernelProfile) {
    let machine = machine(profile);
    let file = machine.new_file(FileKind::Regular, 1);
    let Ok(user) = machine.new_mm() else { return };
    let window = Placement::Fixed(range(1, 1));
    user.mmap_file(cx, window, Prot::ReadWrite, &file, 0, MapKind::Shared).unwrap();
    scope(cx, |s, _| {
        s.spawn("reader", |cx| assert!(matches!(file.read(cx, 0, 0), Ok(0 | 7))));
        s.spawn("writer", |cx| {
            machine.cpus()[0].store(cx, &user, 0x1000, 7).unwrap();
            file.reclaim(cx, 0, true);
        });
    });
    assert_eq!(file.read(cx, 0, 0), Ok(7), "a store was lost");
    user.mmput(cx);
    drop(file);
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
}

fn frame_at(mm: &Mm, page: u64) -> FrameId {
    let page = PageAddr::new(page << 12).unwrap();
    mm.machine().frames().id(mm.peek_pte(page).pfn())
}

/// The only swap slot belongs to a page that is thrown away while reclaim has it locked; then it is needed.
fn swap_slot_beside_dontneed(cx: &mut MaySleep<'_>, profile: KernelProfile) {
    let machine = machine(profile);
    let Ok(user) = machine.new_mm() else { return };
    user.mmap(cx, Placement::Fixed(range(1, 2)), Prot::ReadWrite).unwrap();
    machine.cpus()[0].store(cx, &user, 0x1000, 7).unwrap();
    machine.cpus()[0].store(cx, &user, 0x2000, 8).unwrap();
    let (thrown, kept) = (frame_at(&user, 1), frame_at(&user, 2));
    scope(cx, |s, _| {
        s.spawn("reclaim", |cx| {
            machine.reclaim_page(cx, thrown, true);
        });
        s.spawn("dontneed", |cx| user.madvise_dontneed(cx, range(1, 1)).unwrap());
    });
    assert_eq!(machine.reclaim_page(cx, kept, true), Reclaim::Reclaimed, "a swap slot was lost");
    user.mmput(cx);
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
}

/// Could the store be made, and did gup_fast get the page?
type Outcome = (bool, bool);

/// A page is stored to and pinned while it is unmapped.
fn munmap_beside_store_and_gup(cx: &mut MaySleep<'_>, outcomes: &RefCell<BTreeSet<Outcome>>) {
    let machine = machine(KernelProfile::V6_18);
    let Ok(user) = machine.new_mm() else { return };
    let page = range(1, 1);
    user.mmap(cx, Placement::Fixed(page), Prot::ReadWrite).unwrap();
    let cpus = machine.cpus();
    let (stored, pinned) = (AtomicBool::new(false), AtomicBool::new(false));
    scope(cx, |s, _| {
        s.spawn("munmap", |cx| {
            forget();
            user.munmap(cx, page);
        });
        s.spawn("store", |cx| {
            forget();
            stored.store(cpus[0].store(cx, &user, 0x1000, 7).is_ok(), Ordering::SeqCst);
        });
        s.spawn("gup", |cx| {
            forget();
            let pages = user.get_user_pages_fast_only(cx, &cpus[1], page, Foll::PIN.write());
            pinned.store(!pages.is_empty(), Ordering::SeqCst);
        });
    });
    outcomes.borrow_mut().insert((stored.into_inner(), pinned.into_inner()));
    assert!(user.peek_pte(page.first_page()).is_none());
    user.mmput(cx);
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
}

fn explored(strategy: Strategy, scenario: impl Fn(&mut MaySleep<'_>)) -> Report {
    explore(&Config::new(strategy), scenario)
}

#[test]
fn a_page_that_is_read_in_is_never_older_than_the_disk() {
    for profile in [KernelProfile::UNWRAPPED_B, KernelProfile::V6_18] {
        let report = explored(Strategy::Preemptions(1), |cx| fill_beside_writeback(cx, profile));
        report.assert_ok();
        assert!(report.exhausted, "{}", profile.name);
    }
}

#[test]
fn a_swap_slot_that_nobody_needs_is_found_again() {
    for profile in [KernelProfile::V3_16, KernelProfile::V6_18] {
        let report = explored(Strategy::Preemptions(2), |cx| swap_slot_beside_dontneed(cx, profile));
        report.assert_ok();
        assert!(report.exhausted, "{}", profile.name);
    }
}

/// By the history of each execution and by the digests of states: a digest that left something out would lose an outcome.
#[test]
fn munmap_beside_store_and_gup_is_exhausted_both_ways() {
    let seen = [Strategy::Dpor, Strategy::ValueCache].map(|strategy| {
        let outcomes = RefCell::new(BTreeSet::new());
        let report = explored(strategy, |cx| munmap_beside_store_and_gup(cx, &outcomes));
        report.assert_ok();
        assert!(report.exhausted, "{strategy:?}");
        outcomes.into_inner()
    });
    assert_eq!(seen[0], seen[1]);
    // Pinned but not stored: the fault made the page present, and munmap came before the store was tried again.
    assert_eq!(seen[0], BTreeSet::from([(false, false), (false, true), (true, false), (true, true)]));
}
