// SPDX-License-Identifier: MIT OR Apache-2.0
//! A mutex where one must not sleep is reported at run time. One test alone in its binary: reports are of the whole process.

mod common;

use common::{World, addr, by_hand, range};
use drivers::{Callback, Kind, i915_sleeping};
use interleave::MaySleep;
use interleave::lockdep::{ReportKind, take_reports};
use mmu_notifier::Access;
use softmm::{Config, KernelProfile};

/// Copy-on-write and reclaim under `profile`; how often the sleeping callback ran, and the reports of sleep in atomic context.
fn reports(profile: KernelProfile, kind: &'static Kind, callback: Callback) -> (u64, usize) {
    MaySleep::enter(|cx| {
        let world = World::on(cx, Config { profile, ..Config::default() }, kind, by_hand());
        world.store(cx, &world.mm, addr(16, 0), 7);
        let child = world.mm.fork(cx).unwrap();
        let object = world.driver.bind(cx, range(16, 1), Access::Read).unwrap();
        world.read(cx, object, addr(16, 0)).unwrap();
        world.store(cx, &world.mm, addr(16, 0), 8);
        assert_eq!(world.read(cx, object, addr(16, 0)), Ok(8), "wrong it is, but not stale");
        let frame = world.frame(16);
        world.machine.reclaim_page(cx, frame, true);
        let ran = world.driver.counts().callbacks(callback);
        let sleeps = |r: &&interleave::lockdep::Report| matches!(r.kind, ReportKind::SleepInAtomic);
        let found = take_reports().iter().filter(sleeps).count();
        child.mmput(cx);
        world.driver.close(cx);
        world.mm.mmput(cx);
        let _ = take_reports();
        (ran, found)
    })
}

#[test]
fn sleeping_in_change_pte_and_under_the_ptl_is_reported() {
    let (ran, found) = reports(KernelProfile::V3_16, &i915_sleeping::CHANGE_PTE, Callback::ChangePte);
    assert!(ran > 0 && found > 0, "{ran} {found}");
    let (ran, found) = reports(KernelProfile::V3_16, &i915_sleeping::INVALIDATE_PAGE, Callback::Page);
    assert!(ran > 0 && found == 0, "until 4.10 it may sleep: {ran} {found}");
    let (ran, found) = reports(KernelProfile::V4_12, &i915_sleeping::INVALIDATE_PAGE, Callback::Page);
    assert!(ran > 0 && found > 0, "{ran} {found}");
}
