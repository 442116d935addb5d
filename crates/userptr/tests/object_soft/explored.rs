// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every order of a batch, a change of the memory, and the end of an object; and what is found if a check is left out.

use std::sync::Arc;
use std::time::Duration;

use interleave::explore::{Config, Report, Strategy, explore};
use interleave::{AtomicU64, MaySleep, Ordering, scope};
use softmm::told::{Fault, How};
use softmm::{Machine, MmUser};
use userptr::device::{Command, WaitError};
use userptr::object::{Driver, Execution, Flags, Iommu};

use super::device::{Holds, SoftDevice, When};
use super::modelled::{Told, map, pages, small_machine};
use super::{READ_ONLY, SoftObject, copy, load, object};

/// One thread replaces the memory, while another has the device copy it. The device must never show what was there before
/// a replacement that was complete when the batch was submitted, nor touch a page that is freed.
///
/// `got_before`: the object had its pages, and only its sequence can tell that they are old.
fn replace(cx: &mut MaySleep<'_>, holds: Holds, how: How, got_before: bool) {
    let machine = small_machine();
    let user = machine.new_mm().unwrap();
    let device = SoftDevice::new(&machine, holds, When::AtOnce);
    let told = Told::listening(cx, &user, how).unwrap();
    let driver = Driver::new(Arc::clone(&told), device.clone(), Iommu::passthrough());
    let (memory, out) = (pages(0, 1), pages(8, 1));
    map(cx, &user, memory, 1);
    map(cx, &user, out, 0);
    let (from, to) = (object(&driver, memory, READ_ONLY), object(&driver, out, Flags::default()));
    to.get_pages().unwrap();
    if got_before {
        from.get_pages().unwrap();
    }
    let space = driver.space();
    let (src, dst) = (space.bind(&from, None).unwrap(), space.bind(&to, None).unwrap());
    let complete = AtomicU64::new(1);
    scope(cx, |threads, cx| {
        told.start(threads);
        let replacer = threads.spawn("replacer", |cx| {
            told.munmap(cx, memory);
            map(cx, &user, memory, 2);
            complete.store(2, Ordering::SeqCst);
        });
        let submitter = threads.spawn("submitter", |cx| {
            let since = complete.load(Ordering::SeqCst);
            // Nothing is mapped in between.
            let Ok(execution) = space.execute(&[&from, &to], &[copy(dst, src)]) else { return };
            execution.wait().unwrap();
            let seen = load(cx, &user, out);
            // Between munmap and store the page is new, and zero.
            assert!(seen >= since || (seen == 0 && since < 2), "saw {seen}, {since} was complete");
        });
        replacer.join(cx).unwrap();
        submitter.join(cx).unwrap();
        told.stop();
    });
    drop((space, from, to, driver, told));
    finish(cx, &machine, user, &device);
}

fn replace_beside_submit(cx: &mut MaySleep<'_>, holds: Holds, how: How) {
    replace(cx, holds, how, false);
}

fn replace_beside_submit_again(cx: &mut MaySleep<'_>, holds: Holds, how: How) {
    replace(cx, holds, how, true);
}

/// A batch of some fills is in flight when its memory is unmapped; its owner waits for it as `wait` does, which may keep the
/// object or close it.
fn unmap_beside(
    cx: &mut MaySleep<'_>,
    holds: Holds,
    how: How,
    fills: usize,
    wait: fn(SoftObject<Told>, &Execution<SoftDevice>) -> Option<SoftObject<Told>>,
) {
    let machine = small_machine();
    let user = machine.new_mm().unwrap();
    let device = SoftDevice::new(&machine, holds, When::Told);
    let told = Told::listening(cx, &user, how).unwrap();
    let driver = Driver::new(Arc::clone(&told), device.clone(), Iommu::passthrough());
    let memory = pages(0, 1);
    map(cx, &user, memory, 1);
    let target = object(&driver, memory, Flags::default());
    let space = driver.space();
    let dst = space.bind(&target, None).unwrap();
    let fills = vec![Command::Fill { dst, len: 8, byte: 0 }; fills];
    let execution = space.execute(&[&target], &fills).unwrap();
    let kept = scope(cx, |threads, cx| {
        told.start(threads);
        threads.spawn("device", |cx| device.run(cx));
        let unmapper = threads.spawn("unmapper", |cx| told.munmap(cx, memory));
        let kept = wait(target, &execution);
        device.stop(cx);
        unmapper.join(cx).unwrap();
        told.stop();
        kept
    });
    drop((kept, space, driver, told));
    finish(cx, &machine, user, &device);
}

/// The object is closed meanwhile.
fn unmap_beside_close(cx: &mut MaySleep<'_>, holds: Holds, how: How) {
    unmap_beside(cx, holds, how, 2, |target, execution| {
        drop(target);
        execution.wait().unwrap();
        None
    });
}

/// The owner waits for a while, looks again, and then waits to the end.
fn unmap_beside_a_wait_that_ends_early(cx: &mut MaySleep<'_>, holds: Holds, how: How) {
    unmap_beside(cx, holds, how, 1, |target, execution| {
        match execution.wait_interruptible(Some(Duration::from_millis(1))) {
            Ok(()) => assert!(execution.is_done()),
            Err(ended) => assert!(matches!(ended, WaitError::TimedOut(_))),
        }
        execution.wait().unwrap();
        assert!(execution.is_done());
        Some(target)
    });
}

fn finish(cx: &mut MaySleep<'_>, machine: &Machine, user: MmUser, device: &SoftDevice) {
    assert_eq!(device.mapped(cx), 0, "a mapping was leaked");
    user.mmput(cx);
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "a pin was leaked");
}

type Scenario = fn(&mut MaySleep<'_>, Holds, How);

/// All orders with one preemption, and then those with two as far as time allows. With a source's thread beside them
/// there are too many: as far as time allows, the same state not twice.
fn explored(scenario: Scenario, holds: Holds, how: How) -> Report {
    let run = |strategy, seconds| {
        let config = Config::new(strategy).max_time(Duration::from_secs(seconds));
        explore(&config.minimise(50), |cx| scenario(cx, holds, how))
    };
    if how.has_monitor() {
        return run(Strategy::CachedPreemptions(2), if how.fault.is_some() { 60 } else { 2 });
    }
    let first = run(Strategy::Preemptions(1), 300);
    if first.failures.is_empty() {
        assert!(first.exhausted, "{} executions in {:?}", first.executions, first.elapsed);
        return run(Strategy::Preemptions(2), 2);
    }
    first
}

/// What holds nothing lives by callbacks that the change waits for.
const SOURCES: [(Holds, How); 6] = [
    (Holds::Nothing, How::WAITS),
    (Holds::Pins, How::WAITS),
    (Holds::Pins, How::KVM),
    (Holds::Pins, How::KVM.calling()),
    (Holds::Pins, How::UFFD),
    (Holds::Pins, How::UFFD.calling()),
];

#[test]
fn no_order_of_a_batch_and_a_replacement_uses_a_page_that_is_gone() {
    for (holds, how) in SOURCES {
        explored(replace_beside_submit, holds, how).assert_ok();
        explored(replace_beside_submit_again, holds, how).assert_ok();
    }
}

#[test]
fn no_order_of_an_unmap_and_a_close_lets_the_device_go_on() {
    for (holds, how) in SOURCES {
        explored(unmap_beside_close, holds, how).assert_ok();
    }
}

#[test]
fn no_order_of_an_unmap_and_a_wait_that_ends_early_loses_the_batch() {
    for (holds, how) in SOURCES {
        explored(unmap_beside_a_wait_that_ends_early, holds, how).assert_ok();
    }
}

fn is_found(scenario: Scenario, holds: Holds, how: How, word: &str) {
    let report = explored(scenario, holds, how);
    let failure = report.failures.first().unwrap_or_else(|| panic!("{how:?} was not found"));
    assert!(failure.message.contains(word), "{failure}");
}

#[test]
fn without_the_check_of_the_sequence_a_page_that_is_gone_is_used() {
    is_found(replace_beside_submit, Holds::Nothing, How::WAITS.with(Fault::Unasked), "freed");
}

#[test]
fn without_news_a_batch_shows_the_past() {
    is_found(replace_beside_submit_again, Holds::Pins, How::DEAF, "was complete");
}

#[test]
fn a_monitor_that_reads_before_it_says_so_is_found() {
    let how = How::UFFD.with(Fault::ReadsFirst);
    is_found(replace_beside_submit_again, Holds::Pins, how, "was complete");
}
