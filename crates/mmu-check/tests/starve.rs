// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory runs out in every driver beside every path: a clean error, no rule broken, and nothing kept.

#[allow(dead_code)]
mod common;

use drivers::{Callbacks, DRIVERS, Holds, Kind};
use mmu_check::Rule;
use mmu_check::era::{Era, era};
use mmu_check::path::{PATHS, VARIANTS, named};
use mmu_check::scenario::{Cell, Sweep, Wrong, starve};
use mmu_notifier::Access;
use softmm::{Allocation, KernelProfile};

/// Preemptions in the orders that each failure is tried in.
const BOUND: u32 = 0;

/// The oldest and the newest kernel of those in which the driver lived, or could have.
fn kernels(kind: &Kind) -> Vec<KernelProfile> {
    let of = |which: Era| KernelProfile::ALL.into_iter().filter(move |profile| era(kind, profile) == which);
    let mut all: Vec<_> = of(Era::Lived).collect();
    if all.is_empty() {
        all = of(Era::Asked).collect();
    }
    let newest = all.split_off(all.len().saturating_sub(1));
    all.truncate(1);
    [all, newest].concat()
}

fn cells(kind: &'static Kind) -> Vec<Cell> {
    let reads = (kind.reads && kind.holds != Holds::ProcessTable).then_some(Access::Read);
    let mut cells = Vec::new();
    for profile in kernels(kind) {
        for access in [Some(Access::Write), reads].into_iter().flatten() {
            let cell = |path| Cell { kind, access, path, profile, callbacks: Callbacks::ALL };
            cells.extend(PATHS.iter().chain(VARIANTS).map(cell));
        }
    }
    cells
}

#[test]
fn every_allocation_of_every_driver_beside_every_path_may_fail() {
    let mut wrong = Vec::new();
    for kind in DRIVERS {
        let (mut sum, mut swept) = (Sweep::default(), 0_u64);
        for cell in cells(kind) {
            let Some(sweep) = starve(&cell, BOUND) else { continue };
            wrong.extend(sweep.wrong.iter().map(|starved| format!("{cell}: {starved}")));
            sum.add(sweep);
            swept += 1;
        }
        println!("{}: {swept} cells, {} failed, {} refused", kind.name, sum.failed, sum.refused);
        assert!(
            2 * swept > PATHS.len() as u64 && 2 * sum.failed > swept,
            "{}: {swept} cells, {sum:?}",
            kind.name
        );
    }
    assert!(wrong.is_empty(), "{}\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_leak_on_the_way_out_is_found() {
    let kind = &leaks_on_error::KIND;
    let path = named("munmap").expect("a path");
    let cell =
        Cell { kind, access: Access::Write, path, profile: KernelProfile::V6_18, callbacks: Callbacks::ALL };
    let sweep = starve(&cell, BOUND).expect("with enough memory nothing is wrong");
    let leaks: Vec<_> = sweep.wrong.iter().filter(|starved| starved.what == Allocation::Frame).collect();
    let [leak] = leaks[..] else { panic!("one allocation, the second page's: {:?}", sweep.wrong) };
    let Wrong::Broken(failure) = &leak.wrong else { panic!("{leak}") };
    assert_eq!(Rule::of_failure(failure.kind, &failure.message), Some(Rule::Frames), "{leak}");
    assert_eq!(leak.nth, 1, "the first page is there");
}

/// A driver that looks at two pages before it binds the first, and forgets the one it has if it does not get the other.
mod leaks_on_error {
    use crate::common::{Around, Bind, Close};
    use drivers::{BindError, Kind, vfio};
    use interleave::MaySleep;
    use mmu_notifier::{PAGE_SIZE, PageAddr, Range};
    use softmm::Foll;
    use std::sync::Arc;

    pub(crate) static KIND: Kind = Kind {
        name: "leaks-on-error",
        open: |cx, mm, device, options| {
            let inside = (vfio::KIND.open)(cx, mm, device, options)?;
            let bind: Bind = |cx, driver, range| {
                let mm = driver.context().mm();
                let got = |cx: &mut MaySleep<'_>, page| {
                    let pages = mm.get_user_pages(cx, Range::page(page), Foll::GET.write());
                    pages.map_err(|source| BindError::Fault { range, source })
                };
                let first = got(cx, range.first_page())?;
                let Ok(next) = PageAddr::new(range.first_page().get() + PAGE_SIZE) else { return Ok(()) };
                got(cx, next).map(drop).inspect_err(|_| std::mem::forget(first))
            };
            let close: Close = |cx, driver| driver.close(cx);
            Ok(Arc::new(Around { kind: &KIND, inside, bind, close, _beside: None }))
        },
        ..vfio::KIND
    };
}
