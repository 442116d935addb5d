// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each path's notifier sequence, exactly, and what else each file's head promises.

mod common;

use common::{Heard, Recorder, range, register};
use interleave::{LockClass, MaySleep, Sleep, SpinLock};
use mmu_notifier::{
    Access, Event, Invalidate, Invalidation, MmuNotifier, Ops, PAGE_SIZE, PageAddr, Pfn, PrimaryMmu, Range,
    SeqMoved, SetSeq, TASK_SIZE, WouldBlock,
};
use softmm::{
    AccessError, Config, FaultError, Foll, ForkError, FrameId, Machine, Mm, MmUser, MmapError, OutOfMemory,
    Placement, Prot, Reap, UserPages, ZERO_PAGE,
};
use std::sync::Arc;

static TEST: LockClass = LockClass::new("test state");

/// A machine, one process with pages 16 to 23 mapped, and a recorder on it.
struct Setup {
    machine: Arc<Machine>,
    user: MmUser,
    recorder: Arc<Recorder>,
}

fn setup(cx: &mut MaySleep<'_>) -> Setup {
    setup_on(cx, Config::default())
}

fn setup_on(cx: &mut MaySleep<'_>, config: Config) -> Setup {
    let machine = Machine::new(config);
    let user = machine.new_mm().unwrap();
    let recorder = Recorder::new(&user, range(16, 8));
    register(cx, &user, recorder.clone());
    user.mmap(cx, Placement::FixedNoReplace(range(16, 8)), Prot::ReadWrite).unwrap();
    Setup { machine, user, recorder }
}

impl Setup {
    fn store(&self, cx: &mut MaySleep<'_>, mm: &Mm, page: u64, value: u64) {
        self.machine.cpus()[0].store(cx, mm, page << 12, value).unwrap();
    }

    fn load(&self, cx: &mut MaySleep<'_>, mm: &Mm, page: u64) -> u64 {
        self.machine.cpus()[0].load(cx, mm, page << 12).unwrap()
    }

    fn pfn(&self, mm: &Mm, page: u64) -> Pfn {
        mm.peek_pte(PageAddr::new(page << 12).unwrap()).pfn()
    }

    fn heard(&self, cx: &mut MaySleep<'_>) -> Vec<Heard> {
        self.recorder.check_quiet(cx);
        self.recorder.take(cx)
    }

    fn device_reads(&self, pages: &UserPages) -> u64 {
        self.machine.frames().read(pages.frames().next().unwrap(), 0).unwrap()
    }

    fn finish(self, cx: &mut MaySleep<'_>) {
        self.user.mmput(cx);
        assert_eq!(self.machine.frames().free_frames(), self.machine.frames().total_frames());
        assert_eq!(self.machine.tables_in_use(), 0);
    }
}

fn pair(event: Event, range: Range) -> [Heard; 2] {
    [Heard::S(Some(event), range), Heard::E(Some(event), range)]
}

#[test]
fn only_the_zero_page_makes_a_first_touch_heard() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        t.store(cx, &t.user, 16, 1);
        assert_eq!(t.load(cx, &t.user, 17), 0);
        assert_eq!(t.pfn(&t.user, 17), ZERO_PAGE);
        assert_eq!(t.heard(cx), [], "non-present to present");
        t.store(cx, &t.user, 17, 1);
        assert_eq!(t.heard(cx), pair(Event::Clear, range(17, 1)));
        t.finish(cx);
    });
}

#[test]
fn munmap_notifies_the_whole_span_once_and_nothing_if_nothing_is_mapped() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        t.user.munmap(cx, range(30, 4));
        assert_eq!(t.heard(cx), []);
        t.user.munmap(cx, range(18, 2));
        assert_eq!(t.heard(cx), pair(Event::Unmap, range(18, 2)), "no page was present, the vma was");
        t.user.munmap(cx, range(10, 12));
        assert_eq!(t.heard(cx), pair(Event::Unmap, range(10, 12)), "holes included");
        t.user.mmap(cx, Placement::Fixed(range(20, 4)), Prot::Read).unwrap();
        assert_eq!(t.heard(cx), pair(Event::Unmap, range(20, 4)));
        assert_eq!(t.user.vma_ranges(cx), [range(20, 4)]);
        t.finish(cx);
    });
}

#[test]
fn fork_notifies_each_vma_that_has_pages_of_its_own() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        t.user.mmap(cx, Placement::Fixed(range(20, 1)), Prot::Read).unwrap();
        t.heard(cx);
        t.store(cx, &t.user, 16, 1);
        t.load(cx, &t.user, 22);
        let child = t.user.fork(cx).unwrap();
        assert_eq!(t.heard(cx), pair(Event::ProtectionPage, range(16, 4)), "20 and 21.. have no anon_vma");
        let shared = t.pfn(&t.user, 16);
        assert_eq!(t.pfn(&child, 16), shared);

        t.store(cx, &t.user, 16, 2);
        assert_eq!(t.heard(cx), pair(Event::Clear, range(16, 1)));
        assert_eq!((t.load(cx, &t.user, 16), t.load(cx, &child, 16)), (2, 1));
        let of_child = Recorder::new(&child, range(16, 8));
        register(cx, &child, of_child.clone());
        t.store(cx, &child, 16, 3);
        assert_eq!(
            (t.pfn(&child, 16), of_child.take(cx)),
            (shared, vec![]),
            "the last owner reuses the page"
        );
        child.mmput(cx);
        t.finish(cx);
    });
}

#[test]
fn copy_on_write_reaches_the_tlb_of_every_cpu() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        let other = &t.machine.cpus()[1];
        for before in 0..2 {
            // First off the zero page, then off a page shared with a child.
            let child = t.user.fork(cx).unwrap();
            assert_eq!(other.load(cx, &t.user, 16 << 12), Ok(before));
            t.store(cx, &t.user, 16, before + 1);
            assert_eq!(other.load(cx, &t.user, 16 << 12), Ok(before + 1));
            child.mmput(cx);
        }
        t.finish(cx);
    });
}

/// Counts what CPUs cache and whether a frame lives, at each E.
struct AtEnd {
    machine: Arc<Machine>,
    frame: FrameId,
    seen: SpinLock<Vec<(usize, bool)>>,
}

impl MmuNotifier for AtEnd {
    fn ops(&self) -> Ops {
        Ops::END
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) {
        let cached = self.machine.cpus()[0].cached(&mut cx);
        let live = self.machine.frames().is_live(self.frame);
        self.seen.lock(&mut cx).push((cached, live));
    }
}

#[test]
fn flush_and_free_come_after_the_end() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        t.store(cx, &t.user, 16, 1);
        let frame = t.machine.frames().id(t.pfn(&t.user, 16));
        let seen = SpinLock::new(&TEST, Vec::new());
        let at_end = Arc::new(AtEnd { machine: t.machine.clone(), frame, seen });
        register(cx, &t.user, at_end.clone());
        let child = t.user.fork(cx).unwrap();
        assert_eq!(*at_end.seen.lock(cx), [(1, true)], "fork flushes the parent after E");
        assert_eq!(t.machine.cpus()[0].cached(cx), 0);
        child.mmput(cx);
        t.load(cx, &t.user, 16);
        t.user.munmap(cx, range(16, 8));
        assert_eq!(at_end.seen.lock(cx)[1..], [(1, true)], "munmap flushes and frees after E");
        assert!(!t.machine.frames().is_live(frame));
        assert_eq!(t.machine.cpus()[0].cached(cx), 0);
        t.finish(cx);
    });
}

/// Shares the page table, so it flushes when the CPU does: what it is told, and what it finds then.
struct SharesTable {
    machine: Arc<Machine>,
    mm: std::sync::Weak<Mm>,
    seen: SpinLock<Vec<(Range, bool, usize)>>,
}

impl MmuNotifier for SharesTable {
    fn ops(&self) -> Ops {
        Ops::SECONDARY_TLBS
    }

    fn arch_invalidate_secondary_tlbs(&self, cx: &mut interleave::Atomic<'_>, range: Range) {
        let Some(mm) = self.mm.upgrade() else { return };
        let mapped = mm.peek_pte(PageAddr::new(16 << 12).unwrap()).is_present();
        let cached = self.machine.cpus()[0].cached(cx);
        self.seen.lock(cx).push((range, mapped, cached));
    }
}

#[test]
fn secondary_tlbs_are_flushed_after_the_cpus_and_before_the_new_pte() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        let (machine, mm) = (t.machine.clone(), Arc::downgrade(&t.user));
        let shares = Arc::new(SharesTable { machine, mm, seen: SpinLock::new(&TEST, Vec::new()) });
        register(cx, &t.user, shares.clone());
        t.load(cx, &t.user, 16);
        t.store(cx, &t.user, 16, 1);
        assert_eq!(*shares.seen.lock(cx), [(range(16, 1), false, 0)], "copy-on-write: clr, A, set");
        t.user.munmap(cx, range(16, 8));
        assert_eq!(shares.seen.lock(cx)[1..], [(range(16, 1), false, 0)], "munmap: what was really cleared");
        t.finish(cx);
    });
}

#[test]
fn a_full_batch_is_flushed_and_freed_inside() {
    MaySleep::enter(|cx| {
        let t = setup_on(cx, Config { gather_batch: 3, ..Config::default() });
        for page in 16..24 {
            t.store(cx, &t.user, page, 1);
        }
        let frame = t.machine.frames().id(t.pfn(&t.user, 16));
        let seen = SpinLock::new(&TEST, Vec::new());
        let at_end = Arc::new(AtEnd { machine: t.machine.clone(), frame, seen });
        register(cx, &t.user, at_end.clone());
        t.user.munmap(cx, range(16, 8));
        assert_eq!(*at_end.seen.lock(cx), [(2, false)], "six of eight pages were flushed and freed");
        t.user.mmput(cx);
        assert_eq!(t.machine.frames().free_frames(), t.machine.frames().total_frames());
    });
}

#[test]
fn fork_leaves_a_pinned_page_to_the_parent() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        t.store(cx, &t.user, 16, 1);
        let pin = t.user.get_user_pages(cx, range(16, 1), Foll::PIN.write()).unwrap();
        let child = t.user.fork(cx).unwrap();
        t.heard(cx);
        t.store(cx, &t.user, 16, 2);
        assert_eq!(t.heard(cx), [], "still writable, no copy");
        assert_eq!((t.device_reads(&pin), t.load(cx, &child, 16)), (2, 1));
        drop(pin);

        // The same with FOLL_GET: the device stays behind on the page that is the child's by now.
        let get = t.user.get_user_pages(cx, range(16, 1), Foll::GET.write()).unwrap();
        let second = t.user.fork(cx).unwrap();
        t.store(cx, &t.user, 16, 3);
        assert_eq!((t.device_reads(&get), t.load(cx, &t.user, 16)), (2, 3));
        drop(get);
        child.mmput(cx);
        second.mmput(cx);
        t.finish(cx);
    });
}

#[test]
fn a_read_pin_unshares_and_stays_coherent() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        t.store(cx, &t.user, 16, 1);
        let child = t.user.fork(cx).unwrap();
        t.heard(cx);
        let get = t.user.get_user_pages(cx, range(16, 1), Foll::GET).unwrap();
        assert_eq!(t.heard(cx), [], "FOLL_GET takes the shared page as it is");
        let pin = t.user.get_user_pages(cx, range(16, 1), Foll::PIN).unwrap();
        assert_eq!(t.heard(cx), pair(Event::Clear, range(16, 1)));
        assert!(
            !t.user.peek_pte(PageAddr::new(16 << 12).unwrap()).is_writable(),
            "the copy is mapped read-only"
        );
        t.store(cx, &t.user, 16, 2);
        assert_eq!(t.heard(cx), [], "exclusive: written in place");
        assert_eq!((t.device_reads(&pin), t.device_reads(&get)), (2, 1));
        drop((pin, get));

        t.load(cx, &t.user, 17);
        let zero = t.user.get_user_pages(cx, range(17, 1), Foll::PIN).unwrap();
        assert_eq!((t.heard(cx), zero.frames().next().unwrap().pfn), (vec![], ZERO_PAGE));
        let long = t.user.get_user_pages(cx, range(17, 1), Foll::PIN.longterm()).unwrap();
        assert_eq!(t.heard(cx), pair(Event::Clear, range(17, 1)));
        t.store(cx, &t.user, 17, 5);
        assert_eq!((t.device_reads(&long), t.device_reads(&zero)), (5, 0));
        drop((zero, long));
        child.mmput(cx);
        t.finish(cx);
    });
}

/// Pins from inside the first S: mmap_lock is held for writing, and gup_fast does not want it.
struct PinAtStart {
    machine: Arc<Machine>,
    mm: std::sync::Weak<Mm>,
    foll: Foll,
    got: SpinLock<Option<UserPages>>,
}

impl MmuNotifier for PinAtStart {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        if let (Sleep::May(cx), Some(mm), Some(Event::ProtectionPage)) = (cx, self.mm.upgrade(), inv.event) {
            let cpu = &self.machine.cpus()[1];
            let pages =
                mm.get_user_pages_fast(cx, cpu, range(16, 1), self.foll).expect("present and writable");
            *self.got.lock(cx) = Some(pages);
        }
        Ok(())
    }
}

#[test]
fn a_pin_in_the_start_gap_of_fork_is_honoured_and_a_get_is_not() {
    for (foll, device_sees) in [(Foll::PIN.write(), 2), (Foll::GET.write(), 1)] {
        MaySleep::enter(|cx| {
            let t = setup(cx);
            t.store(cx, &t.user, 16, 1);
            let got = SpinLock::new(&TEST, None);
            let mm = Arc::downgrade(&t.user);
            let pinner = Arc::new(PinAtStart { machine: t.machine.clone(), mm, foll, got });
            register(cx, &t.user, pinner.clone());
            let child = t.user.fork(cx).unwrap();
            t.store(cx, &t.user, 16, 2);
            let pages = pinner.got.lock(cx).take().expect("fork notified");
            assert_eq!(t.device_reads(&pages), device_sees);
            assert_eq!(t.load(cx, &child, 16), 1);
            drop(pages);
            child.mmput(cx);
            t.finish(cx);
        });
    }
}

/// An interval notifier that may be told to refuse what must not block.
struct Interval {
    refuse: SpinLock<bool>,
    heard: SpinLock<Vec<Invalidation>>,
}

impl Interval {
    fn new(refuse: bool) -> Arc<Interval> {
        Arc::new(Interval { refuse: SpinLock::new(&TEST, refuse), heard: SpinLock::new(&TEST, Vec::new()) })
    }
}

impl Invalidate for Interval {
    fn invalidate(
        &self,
        mut cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        assert_eq!(inv.blockable, matches!(cx, Sleep::May(_)));
        if !inv.blockable && *self.refuse.lock(&mut cx) {
            return Err(WouldBlock);
        }
        self.heard.lock(&mut cx).push(*inv);
        Ok(seq.set())
    }
}

#[test]
fn the_oom_reaper_leaves_what_would_block() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        t.user.mmap(cx, Placement::Fixed(range(40, 2)), Prot::ReadWrite).unwrap();
        t.store(cx, &t.user, 16, 1);
        t.store(cx, &t.user, 40, 1);
        let interval = Interval::new(true);
        let subscription = t.user.subscribe(cx, range(40, 1), interval.clone()).unwrap();
        assert_eq!(t.user.oom_reap(cx), Reap::Left(vec![range(40, 2)]));
        assert_eq!(t.heard(cx)[..2], pair(Event::Unmap, range(16, 8)), "the vma that nobody objected to");
        assert!(t.user.peek_pte(PageAddr::new(16 << 12).unwrap()).is_none());
        assert!(t.user.peek_pte(PageAddr::new(40 << 12).unwrap()).is_present(), "no zap after a refusal");
        let page = PageAddr::new(17 << 12).unwrap();
        assert_eq!(t.user.page_fault(cx, page, Access::Write), Err(FaultError::Reaped(page)));
        assert_eq!(interval.heard.lock(cx).len(), 0);

        *interval.refuse.lock(cx) = false;
        assert_eq!(t.user.oom_reap(cx), Reap::Left(vec![]));
        assert_eq!(interval.heard.lock(cx).len(), 1);
        assert!(t.user.peek_pte(PageAddr::new(40 << 12).unwrap()).is_none());
        drop(subscription);
        t.finish(cx);
    });
}

#[test]
fn exit_releases_then_unmaps_for_interval_notifiers_alone() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        t.store(cx, &t.user, 16, 1);
        let interval = Interval::new(false);
        let subscription = t.user.subscribe(cx, range(16, 1), interval.clone()).unwrap();
        let (mm, recorder) = (t.user.clone(), t.recorder.clone());
        let second = mm.mmget().unwrap();
        t.user.mmput(cx);
        assert_eq!(recorder.take(cx), [], "another user is left");
        second.mmput(cx);
        assert_eq!(recorder.take(cx), [Heard::X]);
        let heard: Vec<_> = interval.heard.lock(cx).iter().map(|inv| (inv.event, inv.range)).collect();
        assert_eq!(heard, [(Some(Event::Release), Range::ALL), (Some(Event::Unmap), Range::ALL)]);

        assert!(mm.mmget().is_none());
        assert!(mm.subscribe(cx, range(16, 1), interval).is_err());
        assert_eq!(mm.mmap(cx, Placement::Anywhere { len: PAGE_SIZE }, Prot::Read), Err(MmapError::Exited));
        assert_eq!(mm.fork(cx).err(), Some(ForkError::Exited));
        assert!(mm.fault_in(cx, range(16, 1), Access::Read).is_err());
        assert!(mm.page_identity(cx, PageAddr::new(16 << 12).unwrap()).is_err());
        drop((subscription, mm));
        assert_eq!(t.machine.tables_in_use(), 0);
    });
}

#[test]
fn bad_input_is_refused_by_name() {
    MaySleep::enter(|cx| {
        let t = setup(cx);
        let anywhere = |len| Placement::Anywhere { len };
        assert_eq!(t.user.mmap(cx, anywhere(0), Prot::Read), Err(MmapError::Length(0)));
        assert_eq!(t.user.mmap(cx, anywhere(5), Prot::Read), Err(MmapError::Length(5)));
        assert_eq!(t.user.mmap(cx, anywhere(1 << 60), Prot::Read), Err(MmapError::NoSpace(1 << 60)));
        let cpu = &t.machine.cpus()[0];
        assert_eq!(cpu.load(cx, &t.user, (16 << 12) + 4), Err(AccessError::Unaligned((16 << 12) + 4)));
        assert_eq!(cpu.load(cx, &t.user, (16 << 12) + 64), Err(AccessError::NotStored((16 << 12) + 64)));
        assert_eq!(cpu.load(cx, &t.user, TASK_SIZE), Err(AccessError::NotUser(TASK_SIZE)));
        let found = t.user.mmap(cx, anywhere(2 * PAGE_SIZE), Prot::ReadWrite).unwrap();
        cpu.store(cx, &t.user, found.start(), 1).unwrap();
        t.finish(cx);
    });
}

/// Runs out of one resource after the other at every count that is too small: a clean error each time, no leak.
#[test]
fn out_of_memory_anywhere_leaks_nothing() {
    fn script(cx: &mut MaySleep<'_>, machine: &Arc<Machine>) -> Result<(), OutOfMemory> {
        fn run(cx: &mut MaySleep<'_>, user: &MmUser, child: &mut Option<MmUser>) -> Result<(), OutOfMemory> {
            let fault = |error: AccessError| match error {
                AccessError::Fault(FaultError::OutOfMemory(error)) => error,
                error => panic!("{error}"),
            };
            let cpu = &user.machine().cpus()[0];
            user.mmap(cx, Placement::Fixed(range(510, 4)), Prot::ReadWrite).unwrap();
            cpu.store(cx, user, 510 << 12, 1).map_err(fault)?;
            cpu.store(cx, user, 512 << 12, 1).map_err(fault)?;
            cpu.load(cx, user, 513 << 12).map_err(fault)?;
            let pin = user.get_user_pages(cx, range(510, 1), Foll::PIN.write());
            let _pin = pin.map_err(|error| fault(AccessError::Fault(error)))?;
            let forked = user.fork(cx).map_err(|error| match error {
                ForkError::OutOfMemory(error) => error,
                ForkError::Exited => panic!("{error}"),
            })?;
            let child = child.insert(forked);
            cpu.store(cx, child, 512 << 12, 2).map_err(fault)?;
            cpu.store(cx, child, 513 << 12, 2).map_err(fault)
        }
        let user = machine.new_mm()?;
        let mut child = None;
        let result = run(cx, &user, &mut child);
        child.into_iter().for_each(|child| child.mmput(cx));
        user.mmput(cx);
        result
    }
    let mut failures = 0;
    MaySleep::enter(|cx| {
        for (frames, tables) in (0..6).map(|n| (n, 16)).chain((0..11).map(|n| (16, n))) {
            let machine = Machine::new(Config { frames, tables, ..Config::default() });
            let enough = frames >= 5 && tables >= 10;
            assert_eq!(script(cx, &machine).is_ok(), enough, "{frames} frames, {tables} tables");
            failures += u32::from(!enough);
            assert_eq!(machine.frames().free_frames(), frames as usize);
            assert_eq!(machine.tables_in_use(), 0);
        }
    });
    assert_eq!(failures, 15);
}

#[test]
fn a_consumer_that_knows_only_the_trait_works() {
    fn coherent_read<P: PrimaryMmu>(cx: &mut MaySleep<'_>, primary: &P, range: Range) -> Option<Pfn> {
        use mmu_notifier::{Pin, Subscription};
        let subscription = primary.subscribe(cx, range, Interval::new(false)).ok()?;
        let seq = subscription.read_begin(cx).ok()?;
        let pin = primary.pin(cx, range, Access::Write).ok()?;
        let page = range.iter_pages().next_back()?;
        let identity = primary.page_identity(cx, page).ok()?;
        let pfn = pin.pfn(page);
        assert_eq!((identity.pfn, identity.present, identity.exclusive), (pfn, true, Some(true)));
        let retry = subscription.read_retry(seq);
        pin.unpin(cx, true);
        subscription.unsubscribe(cx).ok()?;
        (!retry).then_some(pfn)?
    }
    MaySleep::enter(|cx| {
        let t = setup(cx);
        let pfn = coherent_read(cx, &**t.user, range(16, 2)).expect("quiet memory");
        assert!(t.machine.frames().dirty(pfn));
        let denied = t.user.pin(cx, range(23, 2), Access::Write).err().map(|error| error.to_string());
        assert!(denied.is_some_and(|text| text.contains("nothing is mapped at 0x18000")));
        t.finish(cx);
    });
}
