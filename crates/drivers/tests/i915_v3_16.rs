// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rules of i915's userptr of 3.16, one by one.

mod common;

use common::{World, addr, by_hand, range, window};
use drivers::i915_v3_16::{KIND, MENDED};
use drivers::{BindError, Callback, DeviceOp, DriverBug, Options, SubmitError};
use interleave::MaySleep;
use mmu_notifier::Access;
use softmm::{FaultError, Placement, Prot};

fn with(f: impl FnOnce(&mut MaySleep<'_>, World)) {
    MaySleep::enter(|cx| {
        let world = World::new(cx, &MENDED, by_hand());
        f(cx, world);
    });
}

#[test]
fn read_only_objects_are_refused() {
    with(|cx, world| {
        assert_eq!(world.driver.bind(cx, window(), Access::Read), Err(BindError::ReadOnly(window())));
        world.end(cx);
    });
}

#[test]
fn pages_that_are_there_are_got_at_once_and_shared() {
    with(|cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let object = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        assert_eq!(world.driver.try_access(cx, object, DeviceOp::Read(addr(16, 0))), Ok(7));
        world.driver.try_access(cx, object, DeviceOp::Write(addr(16, 1), 8)).unwrap();
        assert_eq!(world.load(cx, &world.mm, addr(16, 1)), 8);
        world.end(cx);
    });
}

#[test]
fn an_overlapping_object_is_refused_and_for_now_while_there_are_workers() {
    with(|cx, world| {
        let object = world.driver.bind(cx, range(16, 2), Access::Write).unwrap();
        let overlapping = range(17, 2);
        assert_eq!(world.driver.bind(cx, overlapping, Access::Write), Err(BindError::Overlaps(overlapping)));
        assert!(world.driver.submit(cx, object, &[]).is_err(), "a worker is queued");
        assert_eq!(world.driver.bind(cx, overlapping, Access::Write), Err(BindError::Again(overlapping)));
        world.driver.unbind(cx, object).unwrap();
        let again = world.driver.bind(cx, overlapping, Access::Write);
        assert_eq!(
            again,
            Err(BindError::Again(overlapping)),
            "the worker's reference keeps the object in the tree"
        );
        assert!(world.driver.run_work(cx));
        assert!(world.driver.bind(cx, overlapping, Access::Write).is_ok());
        world.end(cx);
    });
}

#[test]
fn missing_pages_are_eagain_until_the_worker_is_done() {
    with(|cx, world| {
        let object = world.driver.bind(cx, range(16, 2), Access::Write).unwrap();
        let op = [DeviceOp::Write(addr(17, 0), 5)];
        for _ in 0..3 {
            assert_eq!(world.driver.submit(cx, object, &op), Err(SubmitError::Again));
        }
        assert!(world.driver.run_work(cx));
        assert!(!world.driver.run_work(cx), "one worker for three tries");
        let request = world.driver.submit(cx, object, &op).unwrap();
        assert_eq!(world.driver.run(cx, request), Ok(vec![5]));
        world.end(cx);
    });
}

#[test]
fn the_workers_error_is_told_once() {
    with(|cx, world| {
        let object = world.driver.bind(cx, range(40, 1), Access::Write).unwrap();
        assert_eq!(world.driver.submit(cx, object, &[]), Err(SubmitError::Again));
        world.driver.run_work(cx);
        let error = FaultError::Unmapped(range(40, 1).first_page());
        assert_eq!(world.driver.submit(cx, object, &[]), Err(SubmitError::Fault(error)));
        assert_eq!(world.driver.submit(cx, object, &[]), Err(SubmitError::Again), "a new worker");
        world.end(cx);
    });
}

#[test]
fn an_invalidation_cancels_the_worker() {
    with(|cx, world| {
        let object = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        assert_eq!(world.driver.submit(cx, object, &[]), Err(SubmitError::Again));
        world.mm.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
        world.driver.run_work(cx);
        assert_eq!(world.driver.counts().cancelled, 1);
        assert!(
            world.driver.submit(cx, object, &[]).is_ok(),
            "the worker has faulted the page in all the same"
        );
        world.end(cx);
    });
}

#[test]
fn a_worker_that_breaks_copy_on_write_cancels_itself_and_the_next_try_is_fast() {
    with(|cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let object = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        let child = world.mm.fork(cx).unwrap();
        assert_eq!(world.driver.submit(cx, object, &[]), Err(SubmitError::Again), "read-only after fork");
        world.driver.run_work(cx);
        assert_eq!(world.driver.counts().cancelled, 1);
        assert_eq!(world.driver.try_access(cx, object, DeviceOp::Read(addr(16, 0))), Ok(7));
        child.mmput(cx);
        world.end(cx);
    });
}

#[test]
fn the_callback_waits_for_the_gpu_and_drops_the_pins() {
    with(|cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let object = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        let request = world.driver.submit(cx, object, &[DeviceOp::Read(addr(16, 0))]).unwrap();
        world.mm.munmap(cx, range(16, 1));
        let counts = world.driver.counts();
        assert_eq!((counts.accesses, counts.unbinds, counts.effects(Callback::Start)), (1, 1, 1));
        assert_eq!(world.driver.run(cx, request), Ok(vec![7]), "it ran before the page went");
        world.end(cx);
    });
}

#[test]
fn a_pin_taken_between_start_and_the_change_is_stale() {
    with(|cx, world| {
        world.store(cx, &world.mm, addr(16, 0), 7);
        let object = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        world.in_next_gap(cx, move |cx, driver| {
            assert_eq!(driver.try_access(cx, object, DeviceOp::Read(addr(16, 0))), Ok(7), "bound again");
        });
        world.mm.munmap(cx, range(16, 1));
        world.mm.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
        world.store(cx, &world.mm, addr(16, 0), 9);
        let read = world.driver.try_access(cx, object, DeviceOp::Read(addr(16, 0)));
        assert_eq!(read, Ok(7), "stale: the CPU has 9 there, and no callback is to come");
        world.end(cx);
    });
}

#[test]
fn switched_off_the_callback_does_not_come() {
    MaySleep::enter(|cx| {
        let callbacks = drivers::Callbacks::ALL.without(Callback::Start);
        let world = World::new(cx, &MENDED, Options { callbacks, ..by_hand() });
        world.store(cx, &world.mm, addr(16, 0), 7);
        let object = world.driver.bind(cx, range(16, 1), Access::Write).unwrap();
        world.read(cx, object, addr(16, 0)).unwrap();
        world.mm.munmap(cx, range(16, 1));
        let counts = world.driver.counts();
        assert_eq!((counts.all_callbacks(), counts.unbinds), (0, 0));
        world.end(cx);
    });
}

#[test]
fn as_released_neighbouring_pages_are_neither_put_nor_dirtied() {
    MaySleep::enter(|cx| {
        let world = World::new(cx, &KIND, by_hand());
        for page in 16..19 {
            world.store(cx, &world.mm, addr(page, 0), 7);
        }
        let object = world.driver.bind(cx, range(16, 3), Access::Write).unwrap();
        world.write(cx, object, addr(16, 1), 8).unwrap();
        let before = world.machine.frames().free_frames();
        world.mm.munmap(cx, range(16, 3));
        let seen = world.witness.take(cx);
        assert_eq!(seen.bugs, [DriverBug::LeakedPins { pages: 2 }, DriverBug::LostDirty { pages: 2 }]);
        assert_eq!(
            world.machine.frames().free_frames(),
            before + 1,
            "frames are handed out in order, so all three touch"
        );
        world.driver.close(cx);
        world.mm.mmput(cx);
        assert_eq!(world.machine.frames().free_frames() + 2, world.machine.frames().total_frames());
    });
}
