// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every allocation of every path fails once, one after the other, under every profile: the operation says so, does the
//! same thing when it is tried again, no contents are lost and nothing leaks.

mod common;

use common::failure::Failure;
use common::range;
use interleave::MaySleep;
use mmu_notifier::PageAddr;
use softmm::{Allocation, Config, Foll, KernelProfile, Machine, Merge, MmUser, Placement, Prot, Reclaim};
use std::sync::Arc;

/// Counts the failures, and does what failed once more.
struct Steps {
    what: Allocation,
    failures: u32,
}

impl Steps {
    fn step<T, E: Failure + std::fmt::Debug>(
        &mut self,
        cx: &mut MaySleep<'_>,
        mut f: impl FnMut(&mut MaySleep<'_>) -> Result<T, E>,
    ) -> T {
        match f(cx) {
            Ok(done) => done,
            Err(error) => {
                assert_eq!(error.allocation(), Some(self.what), "{error:?}");
                self.failures += 1;
                f(cx).expect("only one allocation fails")
            }
        }
    }
}

fn page(n: u64) -> PageAddr {
    PageAddr::new(n << 12).unwrap()
}

/// Every path that allocates. The last page of a page-table page and the first of the next.
fn script(cx: &mut MaySleep<'_>, machine: &Arc<Machine>, steps: &mut Steps) {
    let cpu = &machine.cpus()[0];
    let user: MmUser = steps.step(cx, |_| machine.new_mm());
    let mm = &user;
    mm.mmap(cx, Placement::Fixed(range(510, 4)), Prot::ReadWrite).unwrap();
    // First touches, zero page, copy-on-write off it.
    for n in 510..513 {
        steps.step(cx, |cx| cpu.store(cx, mm, n << 12, n));
    }
    steps.step(cx, |cx| cpu.load(cx, mm, 513 << 12));
    steps.step(cx, |cx| cpu.store(cx, mm, 513 << 12, 513));
    // A pinned page: fork copies it.
    let pin = steps.step(cx, |cx| mm.get_user_pages(cx, range(510, 1), Foll::PIN.write()));
    let child = steps.step(cx, |cx| mm.fork(cx));
    drop(pin);
    // Copy-on-write of a shared page, un-sharing, a forced write.
    steps.step(cx, |cx| cpu.store(cx, &child, 511 << 12, 1));
    drop(steps.step(cx, |cx| mm.get_user_pages(cx, range(512, 1), Foll::PIN)));
    child.mprotect(cx, range(513, 1), Prot::Read).unwrap();
    drop(steps.step(cx, |cx| child.get_user_pages(cx, range(513, 1), Foll::GET.write().force())));
    // Out to swap and back.
    let frame = machine.frames().id(mm.peek_pte(page(511)).pfn());
    steps.step(cx, |cx| match machine.reclaim_page(cx, frame, true) {
        Reclaim::Reclaimed => Ok(()),
        other => Err(other),
    });
    assert_eq!(steps.step(cx, |cx| cpu.load(cx, mm, 511 << 12)), 511);
    // Merged, and un-merged by a store and by madvise.
    mm.madvise_mergeable(cx, range(510, 4), true).unwrap();
    steps.step(cx, |cx| cpu.store(cx, mm, 510 << 12, 7));
    steps.step(cx, |cx| cpu.store(cx, mm, 511 << 12, 7));
    assert_eq!(machine.ksm_merge(cx, (mm, page(510)), (mm, page(511))), Merge::Merged);
    steps.step(cx, |cx| cpu.store(cx, mm, 511 << 12, 8));
    steps.step(cx, |cx| mm.madvise_mergeable(cx, range(510, 4), false));
    // A merge that is taken back, with or without memory for it.
    mm.madvise_mergeable(cx, range(510, 4), true).unwrap();
    assert_eq!(machine.ksm_merge(cx, (mm, page(510)), (mm, page(511))), Merge::Differs);

    let contents: Vec<_> = (510..514).map(|n| steps.step(cx, |cx| cpu.load(cx, mm, n << 12))).collect();
    assert_eq!(contents, [7, 8, 512, 513]);
    let of_child: Vec<_> = (510..514).map(|n| steps.step(cx, |cx| cpu.load(cx, &child, n << 12))).collect();
    assert_eq!(of_child, [510, 1, 512, 513]);
    child.mmput(cx);
    user.mmput(cx);
}

#[test]
fn each_allocation_may_fail_once() {
    MaySleep::enter(|cx| {
        for profile in KernelProfile::ALL {
            for (what, at_least) in
                [(Allocation::Frame, 8), (Allocation::Table, 8), (Allocation::SwapSlot, 1)]
            {
                let mut n = 0;
                loop {
                    n += 1;
                    let machine = Machine::new(Config { profile, frames: 32, ..Config::default() });
                    machine.fail_nth(what, n);
                    let mut steps = Steps { what, failures: 0 };
                    script(cx, &machine, &mut steps);
                    for frame in machine.swap_cache(cx) {
                        assert_eq!(machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed);
                    }
                    assert_eq!(machine.frames().free_frames(), 32, "{} {what:?} {n}", profile.name);
                    assert_eq!((machine.tables_in_use(), machine.swap().in_use(cx)), (0, 0));
                    if machine.failure_is_due(what) {
                        assert_eq!(steps.failures, 0);
                        break;
                    }
                    // break_cow without memory is KSM's own business.
                    assert!(steps.failures <= 1, "{} {what:?} {n}", profile.name);
                }
                assert!(n > at_least, "{n} {what:?}: the script allocates more than that");
            }
        }
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{reports:#?}");
    });
}

#[test]
fn without_swap_nothing_is_reclaimed() {
    MaySleep::enter(|cx| {
        let machine = Machine::new(Config { swap_slots: 0, ..Config::default() });
        let user = machine.new_mm().unwrap();
        user.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
        machine.cpus()[0].store(cx, &user, 16 << 12, 1).unwrap();
        let frame = machine.frames().id(user.peek_pte(page(16)).pfn());
        assert_eq!(machine.reclaim_page(cx, frame, true), Reclaim::NoSwap);
        assert_eq!(machine.cpus()[0].load(cx, &user, 16 << 12), Ok(1));
        user.mmput(cx);
        assert_eq!(machine.reclaim_page(cx, frame, true), Reclaim::NotAnonymous, "it is free");
    });
}
