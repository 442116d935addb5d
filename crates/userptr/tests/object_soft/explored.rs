// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every order of a batch, a change of the memory, and the end of an object; and what is found if a check is left out.

use std::sync::Arc;
use std::time::Duration;

use interleave::explore::{Config, Report, Strategy, explore};
use interleave::{AtomicU64, MaySleep, Ordering, scope};
use mmu_notifier::primary::{
    Gone, Invalidate, PageIdentity, PrimaryMmu, SubscribeError, Subscription, Unheard,
};
use mmu_notifier::{Access, Blocks, GupError, IdentityError, InsideInvalidation, PageAddr, Range, Seq};
use softmm::{Machine, Mm, MmPin, MmSubscription, MmUser};
use userptr::device::Command;
use userptr::object::{Driver, Flags, Iommu};

use super::device::{Holds, SoftDevice, When};
use super::{READ_ONLY, copy, load, map, object, pages};

/// What the consumer's question at the sequence is answered with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Retry {
    Honest,
    /// "Nothing has changed": as if nobody asked. The callback still knows.
    Never,
}

/// softmm, for a consumer that asks or does not.
struct Asked {
    mm: Arc<Mm>,
    retry: Retry,
}

struct AskedSubscription {
    inner: MmSubscription,
    retry: Retry,
}

impl PrimaryMmu for Asked {
    type Delivery = Blocks;
    type Subscription = AskedSubscription;
    type Pin = MmPin;

    fn subscribe(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<AskedSubscription, SubscribeError> {
        let inner = self.mm.subscribe(cx, range, callback)?;
        Ok(AskedSubscription { inner, retry: self.retry })
    }

    fn fault_in(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<(), GupError> {
        self.mm.fault_in(cx, range, access)
    }

    fn pin(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<MmPin, GupError> {
        self.mm.pin(cx, range, access)
    }

    fn page_identity(&self, cx: &mut MaySleep<'_>, page: PageAddr) -> Result<PageIdentity, IdentityError> {
        self.mm.page_identity(cx, page)
    }

    fn cannot_hear(&self) -> &'static [Unheard] {
        &[]
    }
}

impl Subscription for AskedSubscription {
    type Seq = Seq;

    fn range(&self) -> Range {
        self.inner.range()
    }

    fn read_begin(&self, cx: &mut MaySleep<'_>) -> Result<Seq, Gone> {
        self.inner.read_begin(cx)
    }

    fn read_retry(&self, seq: Seq) -> bool {
        self.retry == Retry::Honest && self.inner.read_retry(seq)
    }

    fn read_retry_ordered(&self, seq: Seq) -> bool {
        self.inner.read_retry(seq)
    }

    fn unsubscribe(&self, cx: &mut MaySleep<'_>) -> Result<(), InsideInvalidation> {
        self.inner.unsubscribe(cx)
    }
}

fn machine() -> Arc<Machine> {
    // What an execution makes anew is kept small.
    Machine::new(softmm::Config {
        frames: 8,
        tables: 4,
        swap_slots: 0,
        cpus: 1,
        words_per_page: 1,
        ..softmm::Config::default()
    })
}

/// One thread replaces the memory, while another has the device copy it. The device must never show what was there before
/// a replacement that was complete when the batch was submitted, nor touch a page that is freed.
fn replace_beside_submit(cx: &mut MaySleep<'_>, holds: Holds, retry: Retry) {
    let machine = machine();
    let user = machine.new_mm().unwrap();
    let device = SoftDevice::new(&machine, holds, When::AtOnce);
    let mm = Arc::new(Asked { mm: Arc::clone(&user), retry });
    let driver = Driver::new(mm, device.clone(), Iommu::passthrough());
    let (memory, out) = (pages(0, 1), pages(8, 1));
    map(cx, &user, memory, 1);
    map(cx, &user, out, 0);
    let (from, to) = (object(&driver, memory, READ_ONLY), object(&driver, out, Flags::default()));
    to.get_pages().unwrap();
    let space = driver.space();
    let (src, dst) = (space.bind(&from, None).unwrap(), space.bind(&to, None).unwrap());
    let complete = AtomicU64::new(1);
    scope(cx, |threads, cx| {
        threads.spawn("replacer", |cx| {
            user.munmap(cx, memory);
            map(cx, &user, memory, 2);
            complete.store(2, Ordering::SeqCst);
        });
        let since = complete.load(Ordering::SeqCst);
        // Nothing is mapped in between.
        let Ok(execution) = space.execute(&[&from, &to], &[copy(dst, src)]) else { return };
        execution.wait().unwrap();
        let seen = load(cx, &user, out);
        // Between munmap and store the page is new, and zero.
        assert!(seen >= since || (seen == 0 && since < 2), "saw {seen}, {since} was complete");
    });
    drop((space, from, to, driver));
    finish(cx, &machine, user, &device);
}

/// A batch is in flight when its memory is unmapped and its object closed.
fn unmap_beside_close(cx: &mut MaySleep<'_>, holds: Holds, retry: Retry) {
    let machine = machine();
    let user = machine.new_mm().unwrap();
    let device = SoftDevice::new(&machine, holds, When::Told);
    let mm = Arc::new(Asked { mm: Arc::clone(&user), retry });
    let driver = Driver::new(mm, device.clone(), Iommu::passthrough());
    let memory = pages(0, 1);
    map(cx, &user, memory, 1);
    let target = object(&driver, memory, Flags::default());
    let space = driver.space();
    let dst = space.bind(&target, None).unwrap();
    let fill = Command::Fill { dst, len: 8, byte: 0 };
    let execution = space.execute(&[&target], &[fill, fill]).unwrap();
    scope(cx, |threads, cx| {
        threads.spawn("device", |cx| device.run(cx));
        threads.spawn("unmapper", |cx| user.munmap(cx, memory));
        drop(target);
        execution.wait().unwrap();
        device.stop(cx);
    });
    drop((space, driver));
    finish(cx, &machine, user, &device);
}

fn finish(cx: &mut MaySleep<'_>, machine: &Machine, user: MmUser, device: &SoftDevice) {
    assert_eq!(device.mapped(cx), 0, "a mapping was leaked");
    user.mmput(cx);
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "a pin was leaked");
}

type Scenario = fn(&mut MaySleep<'_>, Holds, Retry);

/// All orders with one preemption, and then those with two as far as time allows.
fn explored(scenario: Scenario, holds: Holds, retry: Retry) -> Report {
    let run = |bound, seconds| {
        let config = Config::new(Strategy::Preemptions(bound)).max_time(Duration::from_secs(seconds));
        explore(&config.minimise(50), |cx| scenario(cx, holds, retry))
    };
    let first = run(1, 30);
    if first.failures.is_empty() {
        assert!(first.exhausted, "{} executions in {:?}", first.executions, first.elapsed);
        return run(2, 5);
    }
    first
}

#[test]
fn no_order_of_a_batch_and_a_replacement_uses_a_page_that_is_gone() {
    for holds in [Holds::Nothing, Holds::Pins] {
        explored(replace_beside_submit, holds, Retry::Honest).assert_ok();
    }
}

#[test]
fn no_order_of_an_unmap_and_a_close_lets_the_device_go_on() {
    for holds in [Holds::Nothing, Holds::Pins] {
        explored(unmap_beside_close, holds, Retry::Honest).assert_ok();
    }
}

#[test]
fn without_the_check_of_the_sequence_a_page_that_is_gone_is_used() {
    let report = explored(replace_beside_submit, Holds::Nothing, Retry::Never);
    let failure = report.failures.first().expect("the missing check was not found");
    assert!(failure.message.contains("freed"), "{failure}");
}
