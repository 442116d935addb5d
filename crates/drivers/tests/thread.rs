// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the exchange of 2014 argues about, one script each, under the kernels that it compares: 3.16, and 3.16 without the
//! pair around change_pte. The explorer finds these by itself; here they are written down, so that a change to a model is noticed.

mod common;

use common::{World, addr, range};
use drivers::{
    Binding, Callback, DeviceFault, DeviceOp, DriverError, Kind, SubmitError,
    amd_iommu_invalidate_range as iommu_sva, amd_iommu_v2_3_16 as iommu_v2, i915_v3_16, i915_v3_16_ro,
    i915_v4_19, i915_v5_13, kvm_v3_16, kvm_v6_18, rdma_odp, vfio,
};
use interleave::MaySleep;
use mmu_notifier::Access;
use softmm::{FileKind, KernelProfile, MapKind, Merge, MmUser, Placement, Prot, Reap, Reclaim};

const V3_16: KernelProfile = KernelProfile::V3_16;
const UNWRAPPED: KernelProfile = KernelProfile::UNWRAPPED_A;

fn under(profile: KernelProfile, kind: &'static Kind, f: impl FnOnce(&mut MaySleep<'_>, World)) {
    MaySleep::enter(|cx| {
        let world = World::under(cx, profile, kind);
        f(cx, world);
    });
}

/// Page 16 holds 7, is shared with a child, and is bound.
fn shared(cx: &mut MaySleep<'_>, world: &World, access: Access) -> (MmUser, Binding) {
    world.store(cx, &world.mm, addr(16, 0), 7);
    let child = world.mm.fork(cx).unwrap();
    let binding = world.driver.bind(cx, range(16, 1), access).unwrap();
    (child, binding)
}

/// A read-only pin of a shared page, then the CPU writes. What the device reads, and what after the child writes its own.
fn read_pin_then_copy_on_write(profile: KernelProfile) -> (u64, u64) {
    let mut reads = (0, 0);
    under(profile, &i915_v3_16_ro::KIND, |cx, world| {
        let (child, object) = shared(cx, &world, Access::Read);
        assert_eq!(world.read(cx, object, addr(16, 0)), Ok(7));
        world.store(cx, &world.mm, addr(16, 0), 8);
        reads.0 = world.read(cx, object, addr(16, 0)).unwrap();
        world.store(cx, &child, addr(16, 0), 99);
        reads.1 = world.read(cx, object, addr(16, 0)).unwrap();
        child.mmput(cx);
        world.end(cx);
    });
    reads
}

#[test]
fn without_the_pair_a_read_pin_goes_stale_and_then_reads_the_child() {
    assert_eq!(read_pin_then_copy_on_write(V3_16), (8, 8));
    assert_eq!(read_pin_then_copy_on_write(UNWRAPPED), (7, 99), "the CPU has 8");
}

#[test]
fn with_the_pair_a_read_pin_taken_in_its_gap_is_stale_too() {
    under(V3_16, &i915_v3_16_ro::KIND, |cx, world| {
        let (child, object) = shared(cx, &world, Access::Read);
        world.in_next_gap(cx, move |cx, driver| {
            assert_eq!(driver.try_access(cx, object, DeviceOp::Read(addr(16, 0))), Ok(7));
        });
        world.store(cx, &world.mm, addr(16, 0), 8);
        assert_eq!(world.read(cx, object, addr(16, 0)), Ok(7), "the CPU has 8");
        child.mmput(cx);
        world.end(cx);
    });
}

#[test]
fn a_write_pin_cannot_be_taken_in_the_gap_of_copy_on_write() {
    under(V3_16, &i915_v3_16::MENDED, |cx, world| {
        let (child, object) = shared(cx, &world, Access::Write);
        world.in_next_gap(cx, move |cx, driver| {
            let read = driver.try_access(cx, object, DeviceOp::Read(addr(16, 0)));
            assert_eq!(read, Err(DriverError::Submit(SubmitError::Again)), "the pte is read-only");
        });
        world.store(cx, &world.mm, addr(16, 0), 8);
        assert_eq!(world.read(cx, object, addr(16, 0)), Ok(8));
        child.mmput(cx);
        world.end(cx);
    });
}

/// A write pin in the gap of fork, then the parent writes. What the parent's device then reads, and whether its write lands in
/// the child.
fn write_pin_in_the_gap_of_fork(profile: KernelProfile) -> (u64, bool) {
    let mut result = (0, false);
    under(profile, &i915_v3_16::MENDED, |cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let object = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        world.in_next_gap(cx, move |cx, driver| {
            assert_eq!(driver.try_access(cx, object, DeviceOp::Read(addr(16, 0))), Ok(7));
        });
        let child = world.mm.fork(cx).unwrap();
        world.store(cx, &world.mm, addr(16, 0), 8);
        let read = world.read(cx, object, addr(16, 0)).unwrap();
        world.write(cx, object, addr(16, 1), 66).unwrap();
        result = (read, world.load(cx, &child, addr(16, 1)) == 66);
        child.mmput(cx);
        world.end(cx);
    });
    result
}

#[test]
fn the_pair_heals_the_gap_of_fork_for_a_write_pin() {
    assert_eq!(write_pin_in_the_gap_of_fork(V3_16), (8, false));
    assert_eq!(
        write_pin_in_the_gap_of_fork(UNWRAPPED),
        (7, true),
        "the parent's device writes the child's memory"
    );
}

/// A write pin, swap-out and a read: the pte is read-only and clean, and KSM does not look at the references. Does the device's write
/// reach the CPU?
fn write_pin_then_ksm(profile: KernelProfile) -> bool {
    let mut seen = false;
    under(profile, &i915_v3_16::MENDED, |cx, world| {
        let (a, b) = (range(17, 1).first_page(), range(16, 1).first_page());
        world.store(cx, &world.mm, addr(16, 0), 5);
        world.store(cx, &world.mm, addr(17, 0), 5);
        let object = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        assert_eq!(world.read(cx, object, addr(16, 0)), Ok(5));
        assert_eq!(world.machine.reclaim_page(cx, world.frame(16), true), Reclaim::Held);
        assert_eq!(world.load(cx, &world.mm, addr(16, 0)), 5);
        world.mm.madvise_mergeable(cx, range(16, 2), true).unwrap();
        assert_eq!(world.machine.ksm_merge(cx, (&world.mm, a), (&world.mm, b)), Merge::Merged);
        world.write(cx, object, addr(16, 1), 9).unwrap();
        seen = world.load(cx, &world.mm, addr(16, 1)) == 9;
        world.end(cx);
    });
    seen
}

#[test]
fn without_the_pair_a_write_pin_is_lost_to_ksm() {
    assert!(write_pin_then_ksm(V3_16));
    assert!(!write_pin_then_ksm(UNWRAPPED));
}

/// The page that a probe put into a text mapping, made writable and pinned; then the probe is removed. Does the device's write reach the
/// CPU?
fn write_pin_then_uprobe_removal(profile: KernelProfile) -> bool {
    let mut seen = false;
    under(profile, &i915_v3_16::MENDED, |cx, world| {
        let text = range(40, 1);
        let file = world.machine.new_file(FileKind::Regular, 1);
        let (at, kind) = (Placement::Fixed(text), MapKind::Private);
        world.mm.mmap_file(cx, at, Prot::Read, &file, 0, kind).unwrap();
        world.load(cx, &world.mm, addr(40, 0));
        file.uprobe_register(cx, 0, 0).unwrap();
        world.mm.mprotect(cx, text, Prot::ReadWrite).unwrap();
        let object = world.driver.bind(cx, text, Access::Write).unwrap();
        world.write(cx, object, addr(40, 1), 1).unwrap();
        file.uprobe_unregister(cx, 0, 0).unwrap();
        world.write(cx, object, addr(40, 1), 9).unwrap();
        seen = world.load(cx, &world.mm, addr(40, 1)) == 9;
        world.driver.close(cx);
        world.mm.munmap(cx, text);
        file.truncate(cx, 0).unwrap();
        world.end(cx);
    });
    seen
}

#[test]
fn without_the_pair_a_write_pin_is_lost_to_the_removal_of_a_uprobe() {
    assert!(write_pin_then_uprobe_removal(V3_16));
    assert!(!write_pin_then_uprobe_removal(UNWRAPPED));
}

/// A read pin of a page that was never written; then the CPU writes. What the device reads.
fn read_pin_of_the_zero_page(profile: KernelProfile) -> u64 {
    let mut read = 0;
    under(profile, &i915_v3_16_ro::KIND, |cx, world| {
        let object = world.driver.bind(cx, range(16, 1), Access::Read).unwrap();
        assert_eq!(world.read(cx, object, addr(16, 0)), Ok(0));
        world.store(cx, &world.mm, addr(16, 0), 8);
        read = world.read(cx, object, addr(16, 0)).unwrap();
        world.end(cx);
    });
    read
}

#[test]
fn without_the_pair_a_read_pin_of_the_zero_page_reads_zeros_for_ever() {
    assert_eq!((read_pin_of_the_zero_page(V3_16), read_pin_of_the_zero_page(UNWRAPPED)), (8, 0));
}

/// A guest maps a shared page, the CPU writes. What the guest reads; callbacks of change_pte and those with an effect.
fn guest_and_copy_on_write(profile: KernelProfile, kind: &'static Kind) -> (Option<u64>, u64, u64) {
    let mut result = (None, 0, 0);
    under(profile, kind, |cx, world| {
        let (child, slot) = shared(cx, &world, Access::Write);
        assert_eq!(world.read(cx, slot, addr(16, 0)), Ok(7));
        world.store(cx, &world.mm, addr(16, 0), 8);
        child.mmput(cx);
        let read = world.read(cx, slot, addr(16, 0)).ok();
        let counts = world.driver.counts();
        result = (read, counts.callbacks(Callback::ChangePte), counts.effects(Callback::ChangePte));
        let seen = world.finish(cx);
        assert_eq!(seen.freed.is_empty(), read.is_some(), "{seen:?}");
    });
    result
}

#[test]
fn kvms_change_pte_is_dead_code_within_the_pair_and_needed_without() {
    assert_eq!(guest_and_copy_on_write(V3_16, &kvm_v3_16::KIND), (Some(8), 1, 0));
    assert_eq!(guest_and_copy_on_write(UNWRAPPED, &kvm_v3_16::KIND), (Some(8), 1, 1));
    assert_eq!(guest_and_copy_on_write(V3_16, &kvm_v3_16::KIND_5_13), (Some(8), 1, 0));
    assert_eq!(guest_and_copy_on_write(UNWRAPPED, &kvm_v3_16::KIND_5_13), (None, 1, 0), "a freed page");
    assert_eq!(
        guest_and_copy_on_write(UNWRAPPED, &kvm_v3_16::NO_BUMP),
        (Some(8), 1, 1),
        "no fault was in flight"
    );
    assert_eq!(guest_and_copy_on_write(KernelProfile::V6_18, &kvm_v6_18::KIND), (Some(8), 0, 0));
}

/// What VFIO's device wrote after fork and a write of the parent: does the parent see it?
fn vfio_and_fork(profile: KernelProfile) -> bool {
    let mut seen = false;
    under(profile, &vfio::KIND, |cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let dma = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        let child = world.mm.fork(cx).unwrap();
        world.store(cx, &world.mm, addr(16, 0), 8);
        world.write(cx, dma, addr(16, 1), 9).unwrap();
        seen = world.load(cx, &world.mm, addr(16, 1)) == 9;
        child.mmput(cx);
        world.end(cx);
    });
    seen
}

#[test]
fn pins_without_notifier_want_a_fork_that_copies() {
    assert!(!vfio_and_fork(V3_16));
    assert!(vfio_and_fork(KernelProfile::V5_10));
    assert!(vfio_and_fork(KernelProfile::V6_18));
}

/// What VFIO's device wrote after the page was swapped out, read back and written: does the CPU see it?
fn vfio_and_swap(profile: KernelProfile) -> bool {
    let mut seen = false;
    under(profile, &vfio::KIND, |cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let dma = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        assert_eq!(world.machine.reclaim_page(cx, world.frame(16), true), Reclaim::Held);
        assert_eq!(world.load(cx, &world.mm, addr(16, 0)), 7);
        world.store(cx, &world.mm, addr(16, 0), 8);
        world.write(cx, dma, addr(16, 1), 9).unwrap();
        seen = world.load(cx, &world.mm, addr(16, 1)) == 9;
        world.end(cx);
    });
    seen
}

#[test]
fn pins_without_notifier_want_a_reuse_rule_that_does_not_count_references() {
    assert!(vfio_and_swap(V3_16));
    assert!(!vfio_and_swap(KernelProfile::V5_10), "two references: the CPU gets a copy");
    assert!(vfio_and_swap(KernelProfile::V6_18));
}

#[test]
fn between_start_and_end_the_iommu_finds_nothing_anywhere() {
    under(KernelProfile::V4_14, &iommu_v2::KIND, |cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let process = world.driver.bind(cx, range(16, 8), Access::Write).unwrap();
        assert_eq!(world.read(cx, process, addr(16, 0)), Ok(7));
        // Reclaim holds no mmap_lock between start and end, so that the page request can be answered.
        world.store(cx, &world.mm, addr(20, 0), 1);
        world.in_next_gap(cx, move |cx, driver| {
            let driver = driver.clone();
            let user = interleave::spawn("device user", move |cx| {
                driver.try_access(cx, process, DeviceOp::Read(addr(16, 0)))
            });
            let read = user.join(cx).unwrap();
            assert!(matches!(read, Err(DriverError::Device(DeviceFault::GaveUp { .. }))), "{read:?}");
        });
        let frame = world.frame(20);
        assert_eq!(world.machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed);
        assert_eq!(world.read(cx, process, addr(16, 0)), Ok(7), "another page went, and it is over");
        world.end(cx);
    });
}

#[test]
fn an_iommu_follows_copy_on_write_and_swap_by_flushing() {
    for (profile, kind) in [
        (V3_16, &iommu_v2::KIND),
        (UNWRAPPED, &iommu_v2::KIND),
        (KernelProfile::V3_19, &iommu_sva::KIND_3_19),
        (KernelProfile::V5_10, &iommu_sva::KIND),
        (KernelProfile::V6_18, &iommu_sva::KIND),
    ] {
        under(profile, kind, |cx, world| {
            let (child, process) = shared(cx, &world, Access::Write);
            assert_eq!(world.read(cx, process, addr(16, 0)), Ok(7));
            world.store(cx, &world.mm, addr(16, 0), 8);
            assert_eq!(world.read(cx, process, addr(16, 0)), Ok(8), "{}", profile.name);
            world.write(cx, process, addr(16, 1), 9).unwrap();
            assert_eq!(world.machine.reclaim_page(cx, world.frame(16), true), Reclaim::Reclaimed);
            assert_eq!(
                world.read(cx, process, addr(16, 1)),
                Ok(9),
                "{}: the device's write was dirty",
                profile.name
            );
            child.mmput(cx);
            world.end(cx);
        });
    }
}

#[test]
fn i915_without_release_keeps_its_pins_when_the_process_exits() {
    MaySleep::enter(|cx| {
        let World { machine, mm, driver, .. } = World::under(cx, KernelProfile::V4_14, &i915_v4_19::KIND);
        machine.cpus()[0].store(cx, &mm, addr(16, 0), 7).unwrap();
        let object = driver.bind(cx, range(16, 1), Access::Write).unwrap();
        driver.access(cx, object, DeviceOp::Read(addr(16, 0))).unwrap();
        mm.mmput(cx);
        assert_eq!(driver.counts().all_callbacks(), 0);
        assert_eq!(machine.frames().free_frames() + 1, machine.frames().total_frames());
        driver.close(cx);
        assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
    });
}

#[test]
fn i915_of_5_13_waits_for_the_gpu_and_that_of_6_10_does_not() {
    for (kind, ran) in [(&i915_v5_13::KIND, 1), (&i915_v5_13::KIND_6_10, 0)] {
        under(KernelProfile::V6_18, kind, |cx, world| {
            world.store(cx, &world.mm, addr(16, 0), 7);
            let object = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
            let request = world.driver.submit(cx, object, &[DeviceOp::Read(addr(16, 0))]).unwrap();
            world.mm.munmap(cx, range(16, 1));
            let counts = world.driver.counts();
            assert_eq!((counts.accesses, counts.unbinds), (ran, 0), "{}: the pins stay", kind.name);
            assert_eq!(world.driver.run(cx, request), Ok(vec![7]));
            let again = world.driver.submit(cx, object, &[]);
            assert!(matches!(again, Err(SubmitError::Fault(_))), "{again:?}");
            assert_eq!(world.driver.counts().unbinds, 1);
            world.end(cx);
        });
    }
}

#[test]
fn odp_refuses_to_block_and_dirties_what_was_written() {
    under(KernelProfile::V6_18, &rdma_odp::KIND, |cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let region = world.driver.bind(cx, range(16, 2), Access::Write).unwrap();
        world.write(cx, region, addr(16, 1), 9).unwrap();
        assert_eq!(world.machine.reclaim_page(cx, world.frame(16), true), Reclaim::Reclaimed);
        assert_eq!(
            world.load(cx, &world.mm, addr(16, 1)),
            9,
            "what the device wrote went to swap and came back"
        );
        assert!(matches!(world.mm.oom_reap(cx), Reap::Left(left) if !left.is_empty()));
        world.end(cx);
    });
}
