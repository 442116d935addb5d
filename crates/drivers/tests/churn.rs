// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each driver on real threads beside munmap, mmap, fork and copy-on-write, with its device at work all the time.

mod common;

use common::{World, addr, range};
use drivers::{DRIVERS, DeviceOp, Driver, Holds, Kind, Options};
use interleave::{MaySleep, scope, yield_now};
use mmu_notifier::Access;
use softmm::{Config, KernelProfile, Mm, Placement, Prot};
use std::time::{Duration, Instant};

const PAGES: u64 = 8;
const ROUNDS: u64 = 120;

/// A generator of its own per thread: xorshift.
fn random(state: &mut u64, below: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % below
}

fn churn(profile: KernelProfile, kind: &'static Kind) {
    MaySleep::enter(|cx| {
        let config = Config { frames: 512, gather_batch: 3, cpus: 3, profile, ..Config::default() };
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
        let first = |cx: &mut MaySleep<'_>| {
            bindings
                .iter()
                .zip([16, 18, 20, 22])
                .filter(|&(&b, page)| driver.access(cx, b, DeviceOp::Read(addr(page, 0))).is_ok())
                .count()
        };
        assert_eq!(first(cx), bindings.len(), "{kind:?}: the device has something to lose");
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
        // i915 of 5.13 lets go of old pages at the next submission.
        first(cx);
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
        // A worker that still has the object lets it go.
        let patience = Instant::now() + Duration::from_secs(10);
        let mut entries = driver.context().entries(cx);
        while !entries.is_empty() && Instant::now() < patience {
            yield_now();
            entries = driver.context().entries(cx);
        }
        assert!(kind.holds == Holds::ProcessTable || entries.is_empty(), "{kind:?} leaves {entries:?}");
        world.end(cx);
    });
}

/// The kernels that a driver is right on: its own, and those that tell it at least as much.
fn profiles(kind: &Kind) -> Vec<KernelProfile> {
    let all = KernelProfile::ALL.to_vec();
    let of = |names: &[&str]| all.iter().copied().filter(|p| names.contains(&p.name)).collect();
    match kind.name {
        // Leaks pages on purpose.
        "i915-3.16" => Vec::new(),
        // They sleep where they must not; on these kernels nobody calls them there.
        "i915-sleeping-change-pte" | "i915-sleeping-invalidate-page" => of(&["v6_18"]),
        "kvm-3.16" => of(&["v3_16", "unwrapped_a", "unwrapped_b", "unwrapped_c", "v3_19", "v4_14", "v6_18"]),
        "kvm-5.13" | "kvm-no-bump" => of(&["v3_16", "v4_14", "v5_10", "v6_18"]),
        "kvm-6.18" => of(&["v4_14", "v5_10", "v6_18"]),
        "amd-iommu-v2-3.16" => of(&["v3_16", "unwrapped_a", "v3_19"]),
        "amd-iommu-v2-3.19" => of(&["v3_19", "v4_12"]),
        "iommu-sva-6.13" => of(&["v4_14", "v5_10", "v6_18"]),
        "rdma-odp-6.13" => of(&["v5_10", "v6_18"]),
        // Pinned pages may be out of date, and are never freed, whatever the kernel.
        _ => all,
    }
}

/// One test for all, so that each driver runs alone and a new one is in it by being listed.
#[test]
fn every_driver_survives_churn() {
    for kind in DRIVERS.iter().copied() {
        for profile in profiles(kind) {
            churn(profile, kind);
        }
    }
}
