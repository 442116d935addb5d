// SPDX-License-Identifier: MIT OR Apache-2.0
//! A machine with a process, a driver with somebody who looks on, and a script that runs in the gap between the driver's
//! start callback and the change of the page table.

#![allow(dead_code, reason = "each test binary uses its own part")]

use drivers::{
    Binding, Device, DeviceAccess, DeviceOp, Driver, DriverBug, DriverError, Holds, Kind, Observer, Options,
};
use interleave::{Atomic, LockClass, MaySleep, Sleep, SpinLock};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, Range, Registration, WouldBlock};
use softmm::{Config, FrameFreed, FrameId, KernelProfile, Machine, Mm, MmUser, Placement, Prot};
use std::sync::Arc;

static TEST: LockClass = LockClass::new("test observer");
static SCRIPT: LockClass = LockClass::new("test script");

/// Pages 16 to 23: what tests map.
pub(crate) fn window() -> Range {
    range(16, 8)
}

pub(crate) fn range(first: u64, pages: u64) -> Range {
    Range::new(first << 12, pages << 12).expect("a test's own range")
}

/// The address of word `word` of page `page`.
pub(crate) fn addr(page: u64, word: u64) -> u64 {
    (page << 12) + word * 8
}

/// Writes down what a device does wrong.
pub(crate) struct Witness {
    /// What is asked of the device at each access.
    holds: Holds,
    seen: SpinLock<Seen>,
}

#[derive(Default, Debug)]
pub(crate) struct Seen {
    pub(crate) freed: Vec<FrameFreed>,
    pub(crate) stale: Vec<String>,
    pub(crate) bugs: Vec<DriverBug>,
}

impl Witness {
    pub(crate) fn new(holds: Holds) -> Arc<Witness> {
        Arc::new(Witness { holds, seen: SpinLock::new(&TEST, Seen::default()) })
    }

    pub(crate) fn take(&self, cx: &mut MaySleep<'_>) -> Seen {
        std::mem::take(&mut *self.seen.lock(cx))
    }
}

impl Observer for Witness {
    fn device_access(&self, cx: &mut Atomic<'_>, access: &DeviceAccess<'_>) {
        let pte = access.mm.peek_pte(access.page);
        let same = pte.is_present() && access.mm.machine().frames().id(pte.pfn()) == access.frame;
        let coherent = match self.holds {
            // Pages that are pinned may be others than those that are mapped: that is judged elsewhere.
            Holds::Pages => true,
            // A pte is cleared before change_pte tells, and no CPU sees the new page meanwhile.
            Holds::Nothing if !pte.is_present() => {
                access.mm.machine().config().profile.change_pte != KernelProfile::V6_18.change_pte
            }
            Holds::Nothing => same && (pte.is_writable() || !access.writable),
            // Its TLB may be as late as the CPUs' is: an entry that was cleared or write-protected is flushed later.
            Holds::ProcessTable => same || !pte.is_present(),
        };
        if !coherent {
            let stale = format!(
                "{:?}: device {:?} writable {}, CPU {pte:?}",
                access.page, access.frame, access.writable
            );
            self.seen.lock(cx).stale.push(stale);
        }
    }

    fn access_done(&self, cx: &mut Atomic<'_>, _: &DeviceAccess<'_>, result: Result<u64, FrameFreed>) {
        if let Err(freed) = result {
            self.seen.lock(cx).freed.push(freed);
        }
    }

    fn driver_bug(&self, _: &'static str, bug: DriverBug) {
        MaySleep::try_enter(|cx| self.seen.lock(cx).bugs.push(bug))
            .expect("bugs are told in process context");
    }
}

/// A process whose memory a driver mirrors.
pub(crate) struct World {
    pub(crate) machine: Arc<Machine>,
    pub(crate) mm: MmUser,
    pub(crate) witness: Arc<Witness>,
    pub(crate) driver: Arc<dyn Driver>,
    gap: Arc<Gap>,
    gap_registration: Registration,
}

/// Options for scripts: work items wait until they are called for.
pub(crate) fn by_hand() -> Options {
    Options { work: drivers::WorkMode::Manual, ..Options::default() }
}

impl World {
    pub(crate) fn new(cx: &mut MaySleep<'_>, kind: &'static Kind, options: Options) -> World {
        World::on(cx, Config::default(), kind, options)
    }

    /// Under another kernel.
    pub(crate) fn under(cx: &mut MaySleep<'_>, profile: KernelProfile, kind: &'static Kind) -> World {
        World::on(cx, Config { profile, ..Config::default() }, kind, by_hand())
    }

    pub(crate) fn on(cx: &mut MaySleep<'_>, config: Config, kind: &'static Kind, options: Options) -> World {
        let machine = Machine::new(config);
        let mm = machine.new_mm().expect("an empty machine");
        mm.mmap(cx, Placement::Fixed(window()), Prot::ReadWrite).expect("an empty mm");
        let witness = Witness::new(kind.holds);
        let device = Device::new(witness.clone());
        // List notifiers are called from the latest registered to the first: this one after the driver.
        let gap = Arc::new(Gap(SpinLock::new(&SCRIPT, None)));
        let gap_registration = mm.notifiers().register(cx, gap.clone()).expect("the mm is alive");
        let driver = (kind.open)(cx, &mm, &device, options).expect("the mm is alive");
        World { machine, mm, witness, driver, gap, gap_registration }
    }

    /// Runs `script` once, in the next gap.
    pub(crate) fn in_next_gap(
        &self,
        cx: &mut MaySleep<'_>,
        script: impl FnOnce(&mut MaySleep<'_>, &Arc<dyn Driver>) + Send + 'static,
    ) {
        let driver = Arc::downgrade(&self.driver);
        *self.gap.0.lock(cx) = Some(Box::new(move |cx| {
            let driver = driver.upgrade().expect("the driver lives");
            script(cx, &driver);
        }));
    }

    /// The frame that the CPU finds at `page`.
    pub(crate) fn frame(&self, page: u64) -> FrameId {
        self.machine.frames().id(self.mm.peek_pte(range(page, 1).first_page()).pfn())
    }

    pub(crate) fn store(&self, cx: &mut MaySleep<'_>, mm: &Mm, addr: u64, value: u64) {
        self.machine.cpus()[0].store(cx, mm, addr, value).expect("a mapped address");
    }

    pub(crate) fn load(&self, cx: &mut MaySleep<'_>, mm: &Mm, addr: u64) -> u64 {
        self.machine.cpus()[0].load(cx, mm, addr).expect("a mapped address")
    }

    pub(crate) fn read(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        addr: u64,
    ) -> Result<u64, DriverError> {
        self.driver.access(cx, binding, DeviceOp::Read(addr))
    }

    pub(crate) fn write(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        addr: u64,
        value: u64,
    ) -> Result<(), DriverError> {
        self.driver.access(cx, binding, DeviceOp::Write(addr, value)).map(drop)
    }

    /// Closes the driver, ends the process, and checks that nothing is left and nothing was wrong.
    pub(crate) fn end(self, cx: &mut MaySleep<'_>) {
        let kind = self.driver.kind();
        let seen = self.finish(cx);
        assert!(seen.freed.is_empty() && seen.stale.is_empty() && seen.bugs.is_empty(), "{kind:?} {seen:#?}");
    }

    /// The same for drivers that are meant to be wrong: what was seen.
    pub(crate) fn finish(self, cx: &mut MaySleep<'_>) -> Seen {
        self.driver.close(cx);
        self.gap_registration.unregister(cx).expect("in no callback");
        self.mm.mmput(cx);
        // Pages that only the swap cache still has are reclaim's to free.
        let free = self.machine.frames().free_frames() + self.machine.swap_cache(cx).len();
        assert_eq!(free, self.machine.frames().total_frames(), "frames leak");
        let seen = self.witness.take(cx);
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{reports:#?}");
        seen
    }
}

type Script = Box<dyn FnOnce(&mut MaySleep<'_>) + Send>;

/// Runs a script in its start callback.
struct Gap(SpinLock<Option<Script>>);

impl MmuNotifier for Gap {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
        let script = self.0.lock(&mut cx).take();
        if let (Some(script), Sleep::May(cx)) = (script, cx) {
            script(cx);
        }
        Ok(())
    }
}
