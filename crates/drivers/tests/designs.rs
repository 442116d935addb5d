// SPDX-License-Identifier: MIT OR Apache-2.0
//! The five designs, side by side: what each costs and what each misses.

mod common;

use common::{World, addr, range};
use drivers::{
    Callback, DRIVERS, DeviceOp, Kind, design_atomic_change_pte as atomic,
    design_drop_everything as everything, design_exact_start_only as exact, design_flag_change_pte as flag,
    design_start_with_seq as seq,
};
use interleave::MaySleep;
use mmu_notifier::Access;
use softmm::{KernelProfile, Placement, Prot};

const DESIGNS: [&Kind; 5] = [&everything::KIND, &exact::KIND, &seq::KIND, &atomic::KIND, &flag::KIND];

fn under(profile: KernelProfile, kind: &'static Kind, f: impl FnOnce(&mut MaySleep<'_>, World)) {
    MaySleep::enter(|cx| {
        let world = World::under(cx, profile, kind);
        f(cx, world);
    });
}

#[test]
fn there_are_five() {
    assert_eq!(DRIVERS.iter().filter(|kind| kind.kernel == "design").count(), DESIGNS.len());
}

/// Pages got in the gap of munmap; what the device reads once the CPU has 9 there.
fn gap(kind: &'static Kind) -> u64 {
    let mut read = 0;
    under(KernelProfile::V3_16, kind, |cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let binding = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        assert_eq!(world.read(cx, binding, addr(16, 0)), Ok(7));
        let mm = std::sync::Arc::downgrade(&world.mm);
        world.in_next_gap(cx, move |cx, driver| {
            // Getting pages that fault wants mmap_lock, which munmap holds: these are got without.
            assert!(mm.upgrade().is_some());
            let _ = driver.try_access(cx, binding, DeviceOp::Read(addr(16, 0)));
        });
        world.mm.madvise_dontneed(cx, range(16, 1)).unwrap();
        world.store(cx, &world.mm, addr(16, 0), 9);
        read = world.read(cx, binding, addr(16, 0)).unwrap();
        world.end(cx);
    });
    read
}

#[test]
fn start_alone_has_a_gap_and_a_sequence_has_none() {
    assert_eq!(DESIGNS.map(gap), [7, 7, 9, 9, 9]);
}

/// Pages unbound by a change of memory that the device does not use.
fn unbinds_of_others_memory(kind: &'static Kind) -> u64 {
    let mut unbinds = 0;
    under(KernelProfile::V3_16, kind, |cx, world| {
        for page in 16..20 {
            world.store(cx, &world.mm, addr(page, 0), 7);
        }
        let binding = world.driver.bind(cx, range(16, 2), Access::Write).unwrap();
        for page in 16..18 {
            world.read(cx, binding, addr(page, 0)).unwrap();
        }
        world.mm.munmap(cx, range(18, 2));
        unbinds = world.driver.counts().unbinds;
        assert_eq!(world.read(cx, binding, addr(16, 0)), Ok(7));
        world.end(cx);
    });
    unbinds
}

#[test]
fn only_the_overkill_pays_for_memory_of_others() {
    assert_eq!(DESIGNS.map(unbinds_of_others_memory), [2, 0, 0, 0, 0]);
}

/// A read pin of a shared page, copied by a write of the CPU while a request is queued. What that request reads, what the next one reads,
/// and the effects of change_pte.
fn copy_on_write(profile: KernelProfile, kind: &'static Kind) -> (u64, u64, u64) {
    let mut result = (0, 0, 0);
    under(profile, kind, |cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let child = world.mm.fork(cx).unwrap();
        let binding = world.driver.bind(cx, range(16, 1), Access::Read).unwrap();
        assert_eq!(world.read(cx, binding, addr(16, 0)), Ok(7));
        let request = world.driver.submit(cx, binding, &[DeviceOp::Read(addr(16, 0))]).unwrap();
        world.store(cx, &world.mm, addr(16, 0), 8);
        let in_flight = world.driver.run(cx, request).unwrap()[0];
        let next = world.read(cx, binding, addr(16, 0)).unwrap();
        result = (in_flight, next, world.driver.counts().effects(Callback::ChangePte));
        child.mmput(cx);
        world.end(cx);
    });
    result
}

#[test]
fn with_the_pair_every_design_follows_copy_on_write() {
    let results = DESIGNS.map(|kind| copy_on_write(KernelProfile::V3_16, kind));
    // A request that was waited for at the start has read 7 before the change; the atomic design waits for none.
    assert_eq!(results, [(7, 8, 0), (7, 8, 0), (7, 8, 0), (8, 8, 0), (7, 8, 0)]);
}

#[test]
fn without_the_pair_the_atomic_one_follows_and_the_flag_is_late() {
    let results = DESIGNS.map(|kind| copy_on_write(KernelProfile::UNWRAPPED_A, kind));
    // The request that the flag's design had in flight read 7 after the CPU had stored 8.
    assert_eq!(results, [(7, 7, 0), (7, 7, 0), (7, 7, 0), (8, 8, 1), (7, 8, 1)]);
}

#[test]
fn exit_leaves_no_pin() {
    for kind in DESIGNS {
        MaySleep::enter(|cx| {
            let World { machine, mm, driver, .. } = World::under(cx, KernelProfile::V3_16, kind);
            machine.cpus()[0].store(cx, &mm, addr(16, 0), 7).unwrap();
            let binding = driver.bind(cx, range(16, 1), Access::Write).unwrap();
            driver.access(cx, binding, DeviceOp::Read(addr(16, 0))).unwrap();
            mm.mmput(cx);
            assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "{}", kind.name);
            assert!(driver.bind(cx, range(16, 1), Access::Write).is_err());
            driver.close(cx);
        });
    }
}

#[test]
fn a_write_after_unmap_and_map_reaches_the_new_page() {
    for kind in DESIGNS {
        under(KernelProfile::V6_18, kind, |cx, world| {
            world.store(cx, &world.mm, addr(16, 0), 7);
            let binding = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
            world.write(cx, binding, addr(16, 1), 8).unwrap();
            world.mm.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
            world.write(cx, binding, addr(16, 1), 9).unwrap();
            assert_eq!(world.load(cx, &world.mm, addr(16, 1)), 9, "{}", kind.name);
            assert!(world.driver.counts().repins > 0 || kind.name == "design-atomic-change-pte");
            world.end(cx);
        });
    }
}
