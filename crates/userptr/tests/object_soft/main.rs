// SPDX-License-Identifier: MIT OR Apache-2.0
//! Objects over softmm: the code that runs live, with an mm that can be stopped anywhere and a device that tells when it
//! touches a page that is gone.

mod device;
mod explored;
#[path = "../modelled/mod.rs"]
mod modelled;

use std::sync::Arc;
use std::time::Duration;

use device::{Holds, SoftDevice, When};
use interleave::{AtomicBool, MaySleep, Ordering, scope};
use mmu_notifier::primary::PrimaryMmu;
use mmu_notifier::{Access, GupError, PAGE_SIZE, Range};
use modelled::{map, pages};
use softmm::{FileKind, Machine, MapKind, Mm, Placement, Prot};
use userptr::device::{Command, DeviceAddr, DeviceError, WaitError};
use userptr::object::{Driver, Flags, Iommu, Object, ObjectError};

const READ_ONLY: Flags = Flags { read_only: true, probe: false };

fn load(cx: &mut MaySleep<'_>, mm: &Mm, range: Range) -> u64 {
    mm.machine().cpus()[0].load(cx, mm, range.start()).unwrap()
}

type SoftObject<M = Mm> = Object<M, SoftDevice>;

fn object<M: PrimaryMmu + 'static>(
    driver: &Driver<M, SoftDevice>,
    range: Range,
    flags: Flags,
) -> SoftObject<M> {
    // SAFETY: addresses of softmm are no memory of this process.
    unsafe { driver.object_at(range.start() as usize, range.len() as usize, flags) }.unwrap()
}

fn copy(dst: DeviceAddr, src: DeviceAddr) -> Command {
    Command::Copy { dst, src, len: 8 }
}

/// An mm of its own and a driver on it; afterwards no frame may be missing.
fn with_mm(
    holds: Holds,
    when: When,
    f: impl FnOnce(&mut MaySleep<'_>, &Arc<Mm>, &Driver<Mm, SoftDevice>, &SoftDevice),
) {
    let machine = Machine::new(softmm::Config::default());
    MaySleep::enter(|cx| {
        let user = machine.new_mm().unwrap();
        let device = SoftDevice::new(&machine, holds, when);
        let iommu = Iommu::remapping(DeviceAddr(1 << 40), 1 << 20);
        let driver = Driver::new(Arc::clone(&user), device.clone(), iommu);
        f(cx, &user, &driver, &device);
        assert_eq!(device.mapped(cx), 0, "a mapping was leaked");
        user.mmput(cx);
    });
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "a pin was leaked");
}

fn each_hold(f: impl Fn(&mut MaySleep<'_>, &Arc<Mm>, &Driver<Mm, SoftDevice>, &SoftDevice)) {
    with_mm(Holds::Pins, When::AtOnce, &f);
    with_mm(Holds::Nothing, When::AtOnce, &f);
}

#[test]
fn memory_is_replaced_under_an_object_and_the_next_batch_sees_the_new() {
    each_hold(|cx, mm, driver, device| {
        map(cx, mm, pages(0, 1), 1);
        map(cx, mm, pages(8, 1), 0);
        let (from, to) =
            (object(driver, pages(0, 1), READ_ONLY), object(driver, pages(8, 1), Flags::default()));
        let space = driver.space();
        let src = space.bind(&from, Some(DeviceAddr(0x7000))).unwrap();
        let dst = space.bind(&to, None).unwrap();
        for value in 1..4 {
            space.execute(&[&from, &to], &[copy(dst, src)]).unwrap().wait().unwrap();
            assert_eq!(load(cx, mm, pages(8, 1)), value);
            assert!(from.has_pages());
            mm.munmap(cx, pages(0, 1));
            assert!(!from.has_pages() && to.has_pages());
            assert_eq!(device.mapped(cx), 1, "the page of the other is still mapped");
            map(cx, mm, pages(0, 1), value + 1);
        }
        assert_eq!((driver.stats().got, driver.stats().invalidated), (4, 3));
    });
}

#[test]
fn a_hole_is_refused_and_so_is_a_mapping_that_vanished() {
    each_hold(|cx, mm, driver, device| {
        map(cx, mm, pages(0, 2), 1);
        let space = driver.space();
        // SAFETY: addresses of softmm are no memory of this process.
        let probed = unsafe {
            driver.object_at(
                pages(1, 1).start() as usize,
                2 * PAGE_SIZE as usize,
                Flags { probe: true, ..READ_ONLY },
            )
        };
        let hole = |error: ObjectError| match error {
            ObjectError::Device(DeviceError::Pages(GupError::NotMapped { at, .. })) => at.get(),
            other => panic!("{other}"),
        };
        assert_eq!(hole(probed.unwrap_err()), pages(2, 1).start());
        let holey = object(driver, pages(1, 2), Flags::default());
        let at = space.bind(&holey, None).unwrap();
        let fill = Command::Fill { dst: at, len: 8, byte: 1 };
        assert_eq!(hole(space.execute(&[&holey], &[fill]).unwrap_err()), pages(2, 1).start());
        assert_eq!(load(cx, mm, pages(1, 1)), 1, "nothing of it was executed");
        map(cx, mm, pages(2, 1), 1);
        space.execute(&[&holey], &[fill]).unwrap().wait().unwrap();
        mm.munmap(cx, pages(1, 1));
        assert_eq!(hole(space.execute(&[&holey], &[fill]).unwrap_err()), pages(1, 1).start());
        assert_eq!(device.mapped(cx), 0);
    });
}

#[test]
fn commands_reach_the_bytes_of_the_listed_objects_and_nothing_else() {
    each_hold(|cx, mm, driver, _| {
        map(cx, mm, pages(0, 4), 1);
        // SAFETY: addresses of softmm are no memory of this process.
        let small =
            unsafe { driver.object_at(pages(0, 1).start() as usize + 8, 16, Flags::default()) }.unwrap();
        let (ro, other) =
            (object(driver, pages(1, 1), READ_ONLY), object(driver, pages(2, 1), Flags::default()));
        let space = driver.space();
        let at = space.bind(&small, Some(DeviceAddr(0x1000))).unwrap();
        assert_eq!(at, DeviceAddr(0x1008));
        let (ro_at, other_at) = (space.bind(&ro, None).unwrap(), space.bind(&other, None).unwrap());
        let list = [&small, &ro];
        let fill = |dst: u64, len| Command::Fill { dst: DeviceAddr(dst), len, byte: 0xff };
        for (command, ok) in [
            (fill(0x1008, 16), true),
            (fill(0x1018, 0), true),
            (fill(0xdead, 0), true),
            (fill(0x1008, 17), false),
            (fill(0x1007, 1), false),
            (fill(0x1018, 1), false),
            (fill(0x1000, 8), false),
            (fill(ro_at.0, 8), false),
            (copy(at, ro_at), true),
            (copy(at, other_at), false),
            (copy(at, DeviceAddr(0x5_0000)), false),
        ] {
            match space.execute(&list, &[command]) {
                Ok(execution) => {
                    assert!(ok, "{command:?}");
                    execution.wait().unwrap();
                }
                Err(ObjectError::NotBound { .. }) => assert!(!ok, "{command:?}"),
                Err(error) => panic!("{command:?}: {error}"),
            }
        }
        assert_eq!(load(cx, mm, pages(0, 1)), 1, "the word before the object");
        let next = mm.machine().cpus()[0].load(cx, mm, pages(0, 1).start() + 24).unwrap();
        assert_eq!(next, 0, "the word behind it");
    });
}

#[test]
fn objects_overlap_and_are_bound_twice() {
    each_hold(|cx, mm, driver, device| {
        map(cx, mm, pages(0, 3), 1);
        let (left, right) =
            (object(driver, pages(0, 2), Flags::default()), object(driver, pages(1, 2), Flags::default()));
        let (one, two) = (driver.space(), driver.space());
        let page = DeviceAddr(0x1_0000);
        assert_eq!(one.bind(&left, Some(page)).unwrap(), two.bind(&right, Some(page)).unwrap());
        assert!(matches!(one.bind(&right, Some(page)), Err(ObjectError::Address { .. })));
        let again = two.bind(&left, Some(DeviceAddr(0x2_0000))).unwrap();
        // Both lead to the middle page.
        let fill = Command::Fill { dst: DeviceAddr(page.0 + PAGE_SIZE), len: 8, byte: 2 };
        one.execute(&[&left], &[fill]).unwrap().wait().unwrap();
        two.execute(&[&left, &right], &[copy(again, page)]).unwrap().wait().unwrap();
        assert_eq!(load(cx, mm, pages(0, 1)), 0x0202_0202_0202_0202);
        assert_eq!(device.mapped(cx), 4, "pages are mapped once for each object");
        mm.munmap(cx, pages(1, 1));
        assert_eq!((device.mapped(cx), driver.stats().invalidated), (0, 2));
        two.unbind(again).unwrap();
        assert!(matches!(two.unbind(again), Err(ObjectError::NothingBound { .. })));
        drop(left);
        assert!(matches!(one.unbind(page), Err(ObjectError::NothingBound { .. })), "closed is unbound");
    });
}

#[test]
fn another_drivers_object_is_refused() {
    each_hold(|_, mm, driver, device| {
        let other = Driver::new(Arc::clone(mm), device.clone(), Iommu::passthrough());
        let object = object(&other, pages(0, 1), READ_ONLY);
        assert!(matches!(driver.space().bind(&object, None), Err(ObjectError::OtherDevice)));
        assert!(matches!(driver.space().execute(&[&object], &[]), Err(ObjectError::OtherDevice)));
    });
}

/// Writeback takes the pages away before it cleans them; what the device has written is told with them, and written out.
#[test]
fn what_a_batch_may_have_written_is_dirty_on_release() {
    each_hold(|cx, mm, driver, device| {
        let file = device.machine().new_file(FileKind::Regular, 2);
        let at = Placement::Fixed(pages(0, 2));
        mm.mmap_file(cx, at, Prot::ReadWrite, &file, 0, MapKind::Shared).unwrap();
        let objects = [0, 1].map(|n| object(driver, pages(n, 1), Flags::default()));
        let space = driver.space();
        let [src, dst] = [0, 1].map(|n| space.bind(&objects[n], None).unwrap());
        mm.machine().cpus()[0].store(cx, mm, pages(0, 1).start(), 7).unwrap();
        space.execute(&[&objects[0], &objects[1]], &[copy(dst, src)]).unwrap().wait().unwrap();
        assert_eq!(device.released(cx), []);
        file.fsync(cx);
        assert_eq!(device.released(cx), [(pages(0, 1), false), (pages(1, 1), true)]);
        assert_eq!(file.on_disk(cx, 1).map(|words| words[0]), Some(7));
        // And when its owner gives them back.
        let fill = Command::Fill { dst, len: 8, byte: 1 };
        space.execute(&[&objects[0], &objects[1]], &[fill]).unwrap().wait().unwrap();
        objects.iter().for_each(Object::put_pages);
        assert_eq!(device.released(cx)[2..], [(pages(0, 1), false), (pages(1, 1), true)]);
        // Unmapped, the file lives on, and so does what was written.
        drop(objects);
        mm.munmap(cx, pages(0, 2));
        file.fsync(cx);
        assert_eq!(file.on_disk(cx, 1).map(|words| words[0]), Some(0x0101_0101_0101_0101));
        drop(file);
    });
}

#[test]
fn a_mapping_that_is_read_only_serves_a_read_only_object_alone() {
    each_hold(|cx, mm, driver, _| {
        map(cx, mm, pages(0, 1), 5);
        mm.mprotect(cx, pages(0, 1), Prot::Read).unwrap();
        let (ro, rw) =
            (object(driver, pages(0, 1), READ_ONLY), object(driver, pages(0, 1), Flags::default()));
        ro.get_pages().unwrap();
        let denied = rw.get_pages().unwrap_err();
        let ObjectError::Device(DeviceError::Pages(GupError::AccessDenied { access, .. })) = denied else {
            panic!("{denied}")
        };
        assert_eq!(access, Access::Write);
    });
}

#[test]
fn an_invalidation_waits_for_the_batches_of_the_objects_that_it_overlaps_and_for_no_other() {
    with_mm(Holds::Nothing, When::Told, |cx, mm, driver, device| {
        map(cx, mm, pages(0, 3), 1);
        let [busy, out, idle] = [0, 1, 2].map(|n| object(driver, pages(n, 1), Flags::default()));
        let space = driver.space();
        let (src, dst) = (space.bind(&busy, None).unwrap(), space.bind(&out, None).unwrap());
        idle.get_pages().unwrap();
        let execution = space.execute(&[&busy, &out], &[copy(dst, src)]).unwrap();
        // Would never return if it waited.
        mm.munmap(cx, pages(2, 1));
        assert!(!idle.has_pages() && !execution.is_done());
        let started = AtomicBool::new(false);
        scope(cx, |threads, cx| {
            let unmapper = threads.spawn("unmapper", |cx| {
                mm.munmap(cx, pages(0, 1));
                assert!(started.load(Ordering::SeqCst), "it did not wait for the device");
            });
            // It has moved the sequence before it waits.
            while busy.has_pages() {
                interleave::yield_now();
            }
            started.store(true, Ordering::SeqCst);
            let runner = threads.spawn("device", |cx| device.run(cx));
            unmapper.join(cx).unwrap();
            device.stop(cx);
            runner.join(cx).unwrap();
        });
        execution.wait().unwrap();
        assert_eq!(load(cx, mm, pages(1, 1)), 1);
    });
}

#[test]
fn an_object_that_is_busy_is_closed_when_the_device_is_through() {
    with_mm(Holds::Nothing, When::Told, |cx, mm, driver, device| {
        map(cx, mm, pages(0, 2), 1);
        let [from, to] = [0, 1].map(|n| object(driver, pages(n, 1), Flags::default()));
        let space = driver.space();
        let (src, dst) = (space.bind(&from, None).unwrap(), space.bind(&to, None).unwrap());
        let execution = space.execute(&[&from, &to], &[copy(DeviceAddr(dst.0 + 8), src)]).unwrap();
        let started = AtomicBool::new(false);
        scope(cx, |threads, cx| {
            let closer = threads.spawn("closer", |_| {
                drop(from);
                assert!(started.load(Ordering::SeqCst), "it did not wait for the device");
            });
            assert!(!execution.is_done());
            started.store(true, Ordering::SeqCst);
            let runner = threads.spawn("device", |cx| device.run(cx));
            closer.join(cx).unwrap();
            device.stop(cx);
            runner.join(cx).unwrap();
        });
        assert!(execution.is_done());
        assert_eq!(mm.machine().cpus()[0].load(cx, mm, pages(1, 1).start() + 8).unwrap(), 1);
    });
}

#[test]
fn a_wait_that_is_given_up_leaves_the_batch_in_flight() {
    with_mm(Holds::Nothing, When::Told, |cx, mm, driver, device| {
        map(cx, mm, pages(0, 1), 1);
        let target = object(driver, pages(0, 1), Flags::default());
        let space = driver.space();
        let dst = space.bind(&target, None).unwrap();
        let execution = space.execute(&[&target], &[Command::Fill { dst, len: 8, byte: 2 }]).unwrap();
        let soon = Duration::from_millis(5);
        for _ in 0..3 {
            assert_eq!(execution.wait_interruptible(Some(soon)), Err(WaitError::TimedOut(soon)));
        }
        assert!(!execution.is_done() && target.has_pages());
        scope(cx, |threads, cx| {
            let closer = threads.spawn("closer", |_| drop(target));
            let runner = threads.spawn("device", |cx| device.run(cx));
            closer.join(cx).unwrap();
            assert_eq!(execution.wait_interruptible(None), Ok(()));
            device.stop(cx);
            runner.join(cx).unwrap();
        });
        execution.wait().unwrap();
        assert_eq!(load(cx, mm, pages(0, 1)), 0x0202_0202_0202_0202);
    });
}
