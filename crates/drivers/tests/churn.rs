// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each driver on real threads beside munmap, mmap, fork and copy-on-write, with its device at work all the time.

mod common;

use common::{World, addr, range, window};
use drivers::{DRIVERS, DeviceOp, Driver, Holds, Kind, Options};
use interleave::{MaySleep, scope};
use mmu_notifier::Access;
use softmm::{Config, Mm, Placement, Prot};

const PAGES: u64 = 8;
const ROUNDS: u64 = 600;

/// A generator of its own per thread: xorshift.
fn random(state: &mut u64, below: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % below
}

fn churn(kind: &'static Kind) {
    MaySleep::enter(|cx| {
        let config = Config { frames: 512, gather_batch: 3, cpus: 3, ..Config::default() };
        let world = World::on(cx, config, kind, Options { cpu: 2, ..Options::default() });
        let (mm, driver): (&Mm, &dyn Driver) = (&world.mm, &*world.driver);
        let bind = |cx: &mut MaySleep<'_>| {
            (0..PAGES / 2)
                .filter_map(|i| driver.bind(cx, range(16 + 2 * i, 2), Access::Write).ok())
                .collect::<Vec<_>>()
        };
        for page in 16..16 + PAGES {
            world.store(cx, mm, addr(page, 0), 1);
        }
        let bindings = bind(cx);
        assert!(!bindings.is_empty(), "{kind:?} binds nothing");
        let done = scope(cx, |s, cx| {
            s.spawn("mapper", |cx| {
                let mut seed = 1;
                for _ in 0..ROUNDS {
                    let at = random(&mut seed, PAGES);
                    let piece = range(16 + at, 1 + random(&mut seed, PAGES - at));
                    mm.mmap(cx, Placement::Fixed(piece), Prot::ReadWrite).unwrap();
                    for page in piece.iter_pages() {
                        let _ = world.machine.cpus()[0].store(cx, mm, page.get(), 1);
                    }
                }
            });
            s.spawn("writer", |cx| {
                let mut seed = 2;
                for i in 0..ROUNDS * 4 {
                    world.store(cx, mm, addr(16 + random(&mut seed, PAGES), 1), i);
                }
            });
            s.spawn("forker", |cx| {
                let mut seed = 3;
                for i in 0..ROUNDS / 4 {
                    let child = mm.fork(cx).unwrap();
                    let _ =
                        world.machine.cpus()[1].store(cx, &child, addr(16 + random(&mut seed, PAGES), 1), i);
                    child.mmput(cx);
                }
            });
            let user = s.spawn("device user", |cx| {
                let (mut seed, mut done) = (4, 0_u64);
                for i in 0..ROUNDS * 4 {
                    let at = random(&mut seed, PAGES);
                    let binding = bindings[(at / 2) as usize % bindings.len()];
                    let op = match i % 2 {
                        0 => DeviceOp::Read(addr(16 + at, 1)),
                        _ => DeviceOp::Write(addr(16 + at, 2), i),
                    };
                    done += u64::from(driver.access(cx, binding, op).is_ok());
                }
                done
            });
            user.join(cx).expect("the device user lives")
        });
        let counts = driver.counts();
        assert!(done > 0 && counts.accesses > 0, "{kind:?}: the device did nothing: {counts:?}");
        if !kind.callbacks.is_empty() {
            assert!(
                counts.all_callbacks() > 0 && counts.unbinds + counts.flushes > 0,
                "{kind:?} heard nothing: {counts:?}"
            );
        }
        for binding in bindings {
            driver.unbind(cx, binding).unwrap();
        }
        let entries = driver.context().entries(cx);
        assert!(kind.holds == Holds::ProcessTable || entries.is_empty(), "{kind:?} leaves {entries:?}");
        world.end(cx);
    });
}

/// One test for all, so that each driver runs alone and a new one is in it by being listed.
#[test]
fn every_driver_survives_churn() {
    for kind in DRIVERS.iter().copied().filter(|kind| kind.name != "i915-3.16") {
        churn(kind);
    }
    assert!(window().pages() == PAGES);
}
