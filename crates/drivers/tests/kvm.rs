// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM: the retry, the pairing with changes of slots, and ageing.

mod common;

use common::{World, addr, by_hand, range};
use drivers::kvm_v6_18::KIND;
use drivers::{Callback, DeviceFault, DeviceOp, DriverError, SubmitError};
use interleave::MaySleep;
use mmu_notifier::Access;
use softmm::FaultError;

fn with(f: impl FnOnce(&mut MaySleep<'_>, World)) {
    MaySleep::enter(|cx| {
        let world = World::new(cx, &KIND, by_hand());
        f(cx, world);
    });
}

#[test]
fn a_fault_between_start_and_end_installs_nothing() {
    with(|cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let slot = world.driver.bind(cx, range(16, 2), Access::Write).unwrap();
        world.in_next_gap(cx, move |cx, driver| {
            let read = driver.try_access(cx, slot, DeviceOp::Read(addr(16, 0)));
            assert!(matches!(read, Err(DriverError::Device(DeviceFault::GaveUp { .. }))), "{read:?}");
            assert!(driver.context().entries(cx).is_empty());
        });
        world.mm.munmap(cx, range(16, 1));
        assert!(world.driver.counts().retries > 0);
        let gone = world.read(cx, slot, addr(16, 0));
        let source = FaultError::Unmapped(range(16, 1).first_page());
        assert_eq!(
            gone,
            Err(DriverError::Device(DeviceFault::Refused { page: range(16, 1).first_page(), source }))
        );
        world.end(cx);
    });
}

#[test]
fn copy_on_write_moves_the_guest_to_the_new_page() {
    with(|cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let slot = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        assert_eq!(world.read(cx, slot, addr(16, 0)), Ok(7));
        let child = world.mm.fork(cx).unwrap();
        assert_eq!(world.read(cx, slot, addr(16, 0)), Ok(7), "read-only now");
        world.store(cx, &world.mm, addr(16, 0), 8);
        assert_eq!(world.read(cx, slot, addr(16, 0)), Ok(8));
        world.write(cx, slot, addr(16, 0), 9).unwrap();
        assert_eq!((world.load(cx, &world.mm, addr(16, 0)), world.load(cx, &child, addr(16, 0))), (9, 7));
        child.mmput(cx);
        world.end(cx);
    });
}

#[test]
fn a_read_fault_maps_for_writing_if_that_costs_nothing() {
    with(|cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let slot = world.driver.bind(cx, range(16, 2), Access::Write).unwrap();
        world.read(cx, slot, addr(16, 0)).unwrap();
        world.read(cx, slot, addr(17, 0)).unwrap();
        let writable: Vec<_> = world.driver.context().entries(cx).iter().map(|(.., t)| t.writable).collect();
        assert_eq!(writable, [true, false], "the zero page is for reading");
        world.end(cx);
    });
}

#[test]
fn other_addresses_of_the_mm_do_not_disturb() {
    with(|cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let slot = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        world.read(cx, slot, addr(16, 0)).unwrap();
        world.mm.munmap(cx, range(20, 2));
        let counts = world.driver.counts();
        assert_eq!(
            (counts.callbacks(Callback::Start), counts.effects(Callback::Start), counts.unbinds),
            (1, 0, 0)
        );
        world.driver.unbind(cx, slot).unwrap();
        assert_eq!(world.driver.unbind(cx, slot), Err(SubmitError::NotBound(slot)));
        world.end(cx);
    });
}

#[test]
fn exit_drops_everything() {
    MaySleep::enter(|cx| {
        let World { machine, mm, witness, driver, .. } = World::new(cx, &KIND, by_hand());
        machine.cpus()[0].store(cx, &mm, addr(16, 0), 7).unwrap();
        let slot = driver.bind(cx, range(16, 1), Access::Write).unwrap();
        driver.access(cx, slot, DeviceOp::Read(addr(16, 0))).unwrap();
        mm.mmput(cx);
        assert_eq!(driver.counts().effects(Callback::Release), 1);
        assert!(driver.access(cx, slot, DeviceOp::Read(addr(16, 0))).is_err());
        driver.close(cx);
        let seen = witness.take(cx);
        assert!(seen.freed.is_empty() && seen.stale.is_empty(), "{seen:#?}");
        assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
    });
}
