// SPDX-License-Identifier: MIT OR Apache-2.0
//! The framework's rules for list notifiers, one test each, named by the rule.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::Duration;

use interleave::{
    AtomicBool, AtomicU32, LockClass, MaySleep, Mutex, Ordering, WaitQueue, preempt_disable, scope, spawn,
};
use mmu_notifier::*;

static LOG: LockClass = LockClass::new("test log");
static GATE: LockClass = LockClass::new("test gate");

type Log = Arc<Mutex<Vec<String>>>;

fn log() -> Log {
    Arc::new(Mutex::new(&LOG, Vec::new()))
}

fn take(cx: &mut MaySleep<'_>, log: &Log) -> Vec<String> {
    std::mem::take(&mut log.lock(cx))
}

fn range() -> Range {
    Range::new(0x10_0000, 0x4000).unwrap()
}

fn unmap() -> Invalidation {
    Invalidation::new(range(), Event::Unmap)
}

/// Writes down what it hears.
struct Recorder {
    name: &'static str,
    ops: Ops,
    /// Fails non-blockable starts; `always` also blockable ones.
    refuses: bool,
    always: bool,
    log: Log,
}

impl Recorder {
    fn new(name: &'static str, ops: Ops, log: &Log) -> Recorder {
        Recorder { name, ops, refuses: false, always: false, log: Arc::clone(log) }
    }

    fn note(&self, what: &str) {
        // Young callbacks and change_pte are atomic: the log is free then, as nobody sleeps with it.
        MaySleep::try_enter(|cx| self.log.lock(cx).push(format!("{} {what}", self.name))).unwrap_or_else(
            |_| {
                panic!("{what} is atomic: use Counter");
            },
        );
    }
}

impl MmuNotifier for Recorder {
    fn ops(&self) -> Ops {
        self.ops
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        assert_eq!(inv.blockable, matches!(cx, Sleep::May(_)), "the context says what the range says");
        let fails = self.always || self.refuses && !inv.blockable;
        let what = format!("{} {}", self.name, if fails { "start fails" } else { "start" });
        match cx {
            Sleep::May(cx) => self.log.lock(cx).push(what),
            Sleep::TryOnly(cx) => self.log.try_lock(cx).expect("nobody holds the log").push(what),
        }
        if fails { Err(WouldBlock) } else { Ok(()) }
    }

    fn invalidate_range_end(&self, cx: Sleep<'_, '_>, _: &Invalidation) {
        let what = format!("{} end", self.name);
        match cx {
            Sleep::May(cx) => self.log.lock(cx).push(what),
            Sleep::TryOnly(cx) => self.log.try_lock(cx).expect("nobody holds the log").push(what),
        }
    }

    fn release(&self, _: &mut MaySleep<'_>) {
        self.note("release");
    }

    fn invalidate_page(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        let what = format!("{} page {page:?} {}", self.name, matches!(cx, PageContext::Atomic(_)));
        self.log.try_lock(&mut cx).expect("nobody holds the log").push(what);
    }

    fn arch_invalidate_secondary_tlbs(&self, cx: &mut Atomic<'_>, _: Range) {
        self.log.try_lock(cx).expect("nobody holds the log").push(format!("{} tlbs", self.name));
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, pte: Pte) {
        let what = format!("{} change_pte {page:?} {:?}", self.name, pte.pfn);
        self.log.try_lock(cx).expect("nobody holds the log").push(what);
    }

    fn test_young(&self, cx: &mut Atomic<'_>, _: Range) -> bool {
        self.log.try_lock(cx).expect("nobody holds the log").push(format!("{} test_young", self.name));
        self.refuses
    }

    fn clear_young(&self, cx: &mut Atomic<'_>, _: Range) -> bool {
        self.log.try_lock(cx).expect("nobody holds the log").push(format!("{} clear_young", self.name));
        self.refuses
    }

    fn clear_flush_young(&self, cx: &mut Atomic<'_>, _: Range) -> bool {
        self.log.try_lock(cx).expect("nobody holds the log").push(format!("{} clear_flush_young", self.name));
        self.refuses
    }
}

const PAIR: Ops = Ops::START.and(Ops::END);

#[test]
fn every_start_has_its_end_and_only_present_callbacks_are_called() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
        let _a = mm.register(cx, Arc::new(Recorder::new("a", PAIR, &log))).unwrap();
        let _b = mm.register(cx, Arc::new(Recorder::new("b", Ops::START, &log))).unwrap();
        let _c = mm.register(cx, Arc::new(Recorder::new("c", Ops::END, &log))).unwrap();
        let section = mm.invalidate_range_start(cx, unmap());
        assert_eq!(take(cx, &log), ["b start", "a start"], "the latest first");
        section.invalidate_range_end(cx);
        assert_eq!(take(cx, &log), ["c end", "a end"]);
    });
}

#[test]
fn sections_nest_and_overlap() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
        let _a = mm.register(cx, Arc::new(Recorder::new("a", PAIR, &log))).unwrap();
        let first = mm.invalidate_range_start(cx, unmap());
        let second = mm.invalidate_range_start(cx, unmap());
        first.invalidate_range_end(cx);
        second.invalidate_range_end(cx);
        assert_eq!(take(cx, &log), ["a start", "a start", "a end", "a end"]);
    });
}

#[test]
fn failing_nonblock_start_calls_all_and_ends_those_that_succeeded() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::LINUX_5_12), log());
        let _a = mm.register(cx, Arc::new(Recorder::new("a", PAIR, &log))).unwrap();
        let b = Recorder { refuses: true, ..Recorder::new("b", Ops::START, &log) };
        let _b = mm.register(cx, Arc::new(b)).unwrap();
        let _c = mm.register(cx, Arc::new(Recorder::new("c", PAIR, &log))).unwrap();
        assert_eq!(mm.invalidate_range_start_nonblock(cx, unmap()).err(), Some(WouldBlock));
        assert_eq!(take(cx, &log), ["c start", "b start fails", "a start", "c end", "a end"]);
        assert!(mm.take_breaches(cx).is_empty());

        mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        assert_eq!(take(cx, &log), ["c start", "b start", "a start", "c end", "a end"]);
    });
}

#[test]
fn failing_nonblock_start_before_5_12_ends_nobody() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::LINUX_3_19), log());
        let _a = mm.register(cx, Arc::new(Recorder::new("a", PAIR, &log))).unwrap();
        let b = Recorder { refuses: true, ..Recorder::new("b", Ops::START, &log) };
        let _b = mm.register(cx, Arc::new(b)).unwrap();
        mm.invalidate_range_start_nonblock(cx, unmap()).unwrap_err();
        assert_eq!(take(cx, &log), ["b start fails", "a start"]);
    });
}

#[test]
fn a_notifier_that_can_fail_its_start_must_not_have_an_end() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
        let a = Recorder { refuses: true, ..Recorder::new("a", PAIR, &log) };
        let _a = mm.register(cx, Arc::new(a)).unwrap();
        mm.invalidate_range_start_nonblock(cx, unmap()).unwrap_err();
        assert_eq!(mm.take_breaches(cx), [Breach::FailedStartWithEnd(unmap().nonblock())]);
        assert_eq!(take(cx, &log), ["a start fails"], "the failing one gets no end");
    });
}

#[test]
fn failing_a_blockable_start_is_a_breach_and_is_ignored() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
        let a = Recorder { always: true, ..Recorder::new("a", PAIR, &log) };
        let _a = mm.register(cx, Arc::new(a)).unwrap();
        mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        assert_eq!(mm.take_breaches(cx), [Breach::FailedBlockable(unmap())]);
        assert!(mm.take_breaches(cx).is_empty());
        assert_eq!(take(cx, &log), ["a start fails", "a end"]);
    });
}

/// Bug 28: the oom reaper goes on to the next VMA after a failure, and must leave nothing behind.
#[test]
fn early_continue_after_a_failed_start_leaves_the_pairs_balanced() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
        let _a = mm.register(cx, Arc::new(Recorder::new("a", PAIR, &log))).unwrap();
        let b = Recorder { refuses: true, ..Recorder::new("b", Ops::START, &log) };
        let b = mm.register(cx, Arc::new(b)).unwrap();
        let vmas = [0x1000, 0x8000, 0xf000].map(|at| Range::new(at, 0x2000).unwrap());
        for round in 0..2 {
            for vma in vmas {
                match mm.invalidate_range_start_nonblock(cx, Invalidation::new(vma, Event::Unmap)) {
                    Err(WouldBlock) => continue,
                    Ok(section) => section.invalidate_range_end(cx),
                }
            }
            if round == 0 {
                b.unregister(cx).unwrap();
            }
        }
        let heard = take(cx, &log);
        let count = |what| heard.iter().filter(|l| *l == what).count();
        assert_eq!((count("a start"), count("a end"), count("b start fails")), (6, 6, 3));
        // A section that had stayed open would keep this waiting.
        let _c = mm.register(cx, Arc::new(Recorder::new("c", PAIR, &log))).unwrap();
    });
}

#[test]
#[should_panic(expected = "was started and never ended")]
fn dropping_a_section_is_loud() {
    MaySleep::enter(|cx| {
        let mm = NotifierSubscriptions::new(Rules::default());
        drop(mm.invalidate_range_start(cx, unmap()));
    });
}

#[test]
fn secondary_tlbs_beside_start_end_are_refused_since_6_6() {
    MaySleep::enter(|cx| {
        let log = log();
        let new = NotifierSubscriptions::new(Rules::LINUX_6_6);
        for ops in [Ops::START, Ops::END, PAIR] {
            let both = Arc::new(Recorder::new("a", ops | Ops::SECONDARY_TLBS, &log));
            let refused = new.register(cx, both).unwrap_err();
            assert_eq!(refused, RegisterError::SecondaryTlbsBesideStartEnd(ops | Ops::SECONDARY_TLBS));
        }
        let old = NotifierSubscriptions::new(Rules::LINUX_5_12);
        let _a = old.register(cx, Arc::new(Recorder::new("a", PAIR | Ops::SECONDARY_TLBS, &log))).unwrap();
        old.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        assert_eq!(take(cx, &log), ["a start", "a tlbs", "a end"], "3.19 to 6.5: the end flushes too");
        old.invalidate_range_start(cx, unmap()).invalidate_range_only_end(cx);
        assert_eq!(take(cx, &log), ["a start", "a end"]);
    });
}

#[test]
fn test_young_stops_at_the_first_yes_the_others_ask_all() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
        let ops = Ops::TEST_YOUNG | Ops::CLEAR_YOUNG | Ops::CLEAR_FLUSH_YOUNG;
        let _a = mm.register(cx, Arc::new(Recorder::new("a", ops, &log))).unwrap();
        let yes = Recorder { refuses: true, ..Recorder::new("b", ops, &log) };
        let _b = mm.register(cx, Arc::new(yes)).unwrap();
        preempt_disable(cx, |cx| {
            assert!(mm.test_young(cx, range()));
            assert!(mm.clear_young(cx, range()));
            assert!(mm.clear_flush_young(cx, range()));
        });
        let want =
            ["b test_young", "b clear_young", "a clear_young", "b clear_flush_young", "a clear_flush_young"];
        assert_eq!(take(cx, &log), want);
    });
}

#[test]
fn page_callbacks_get_the_context_of_their_kernel() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::LINUX_3_16), log());
        let _a = mm.register(cx, Arc::new(Recorder::new("a", Ops::PAGE | Ops::CHANGE_PTE, &log))).unwrap();
        let page = PageAddr::new(0x1000).unwrap();
        mm.invalidate_page(PageContext::May(cx), page);
        preempt_disable(cx, |cx| {
            mm.invalidate_page(PageContext::Atomic(cx), page);
            mm.change_pte(cx, page, Pte { pfn: Pfn(7), writable: false });
        });
        let want = ["a page 0x1000 false", "a page 0x1000 true", "a change_pte 0x1000 pfn 0x7"];
        assert_eq!(take(cx, &log), want);
    });
}

#[test]
fn release_then_unregister_and_unregister_then_release_call_release_once() {
    for exit_first in [true, false] {
        MaySleep::enter(|cx| {
            let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
            let a = mm.register(cx, Arc::new(Recorder::new("a", PAIR | Ops::RELEASE, &log))).unwrap();
            if exit_first {
                mm.release(cx);
            }
            a.unregister(cx).unwrap();
            a.unregister(cx).unwrap();
            mm.release(cx);
            assert_eq!(take(cx, &log), ["a release"]);
        });
    }
}

#[test]
fn after_exit_nobody_hears_the_teardown_not_even_those_without_release() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
        let _a = mm.register(cx, Arc::new(Recorder::new("a", PAIR, &log))).unwrap();
        mm.release(cx);
        mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        assert!(take(cx, &log).is_empty());
        let late = mm.register(cx, Arc::new(Recorder::new("late", PAIR, &log)));
        assert_eq!(late.unwrap_err(), RegisterError::Exited);
    });
}

/// Truncates a file of the mm while it is being released.
struct Truncates(Weak<NotifierSubscriptions>);

impl MmuNotifier for Truncates {
    fn ops(&self) -> Ops {
        Ops::RELEASE
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        let mm = self.0.upgrade().expect("the mm outlives its callbacks");
        let truncate =
            spawn("truncate", move |cx| mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx));
        truncate.join(cx).unwrap();
    }
}

#[test]
fn until_its_release_has_run_a_notifier_hears_what_others_change() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
        let _a = mm.register(cx, Arc::new(Recorder::new("a", PAIR | Ops::RELEASE, &log))).unwrap();
        let _first = mm.register(cx, Arc::new(Truncates(Arc::downgrade(&mm)))).unwrap();
        mm.release(cx);
        assert_eq!(take(cx, &log), ["a start", "a end", "a release"]);
    });
}

#[test]
fn dropping_the_registration_calls_no_release() {
    MaySleep::enter(|cx| {
        let (mm, log) = (NotifierSubscriptions::new(Rules::default()), log());
        drop(mm.register(cx, Arc::new(Recorder::new("a", PAIR | Ops::RELEASE, &log))).unwrap());
        mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        mm.release(cx);
        assert!(take(cx, &log).is_empty());
    });
}

/// Stays in its callback until told to go on.
struct Slow {
    entered: AtomicBool,
    go_on: AtomicBool,
    left: AtomicBool,
    wait: WaitQueue,
    release: bool,
}

impl Slow {
    fn new(release: bool) -> Arc<Slow> {
        let flag = || AtomicBool::new(false);
        Arc::new(Slow { entered: flag(), go_on: flag(), left: flag(), wait: WaitQueue::new(&GATE), release })
    }

    fn stay(&self, cx: &mut MaySleep<'_>) {
        self.entered.store(true, Ordering::Release);
        self.wait.wake_all();
        self.wait.wait_event(cx, || self.go_on.load(Ordering::Acquire));
        self.left.store(true, Ordering::Release);
    }

    fn wait_entered(&self, cx: &mut MaySleep<'_>) {
        self.wait.wait_event(cx, || self.entered.load(Ordering::Acquire));
    }

    fn let_go(&self) {
        self.go_on.store(true, Ordering::Release);
        self.wait.wake_all();
    }
}

impl MmuNotifier for Slow {
    fn ops(&self) -> Ops {
        if self.release { Ops::RELEASE } else { Ops::START }
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        self.stay(cx);
        Ok(())
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.stay(cx);
    }
}

/// `waits` must not return before the callback of `slow`, which `calls` runs, has.
fn outlasts(
    slow: &Arc<Slow>,
    calls: impl FnOnce(&mut MaySleep<'_>) + Send,
    waits: impl FnOnce(&mut MaySleep<'_>) + Send,
) {
    MaySleep::enter(|cx| {
        scope(cx, |s, cx| {
            let caller = s.spawn("caller", calls);
            slow.wait_entered(cx);
            let waiter = s.spawn("waiter", |cx| {
                waits(cx);
                assert!(slow.left.load(Ordering::Acquire), "returned while the callback ran");
            });
            // Long enough for a waiter that does not wait to fail; one that waits passes however short it is.
            interleave::time::sleep(cx, Duration::from_millis(20));
            slow.let_go();
            caller.join(cx).unwrap();
            waiter.join(cx).unwrap();
        });
    });
}

#[test]
fn unregister_is_a_fence() {
    let mm = NotifierSubscriptions::new(Rules::default());
    let slow = Slow::new(false);
    let registration = MaySleep::enter(|cx| mm.register(cx, slow.clone()).unwrap());
    outlasts(
        &slow,
        |cx| mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx),
        |cx| registration.unregister(cx).unwrap(),
    );
}

#[test]
fn unregister_waits_for_the_release_of_exit() {
    let mm = NotifierSubscriptions::new(Rules::default());
    let slow = Slow::new(true);
    let registration = MaySleep::enter(|cx| mm.register(cx, slow.clone()).unwrap());
    outlasts(&slow, |cx| mm.release(cx), |cx| registration.unregister(cx).unwrap());
}

#[test]
fn exit_waits_for_the_release_of_unregister() {
    let mm = NotifierSubscriptions::new(Rules::default());
    let slow = Slow::new(true);
    let registration = MaySleep::enter(|cx| mm.register(cx, slow.clone()).unwrap());
    outlasts(&slow, |cx| registration.unregister(cx).unwrap(), |cx| mm.release(cx));
}

#[test]
fn register_waits_for_open_sections() {
    let mm = NotifierSubscriptions::new(Rules::default());
    let (log, ended) = (log(), AtomicBool::new(false));
    MaySleep::enter(|cx| {
        scope(cx, |s, cx| {
            let section = mm.invalidate_range_start(cx, unmap());
            let registered = s.spawn("register", |cx| {
                let registration = mm.register(cx, Arc::new(Recorder::new("a", PAIR, &log))).unwrap();
                assert!(ended.load(Ordering::Acquire), "registered in the middle of a section");
                registration
            });
            interleave::time::sleep(cx, Duration::from_millis(20));
            ended.store(true, Ordering::Release);
            section.invalidate_range_end(cx);
            let _registration = registered.join(cx).unwrap();
            assert!(take(cx, &log).is_empty(), "no end without a start");
        });
    });
}

#[test]
fn overlapping_sections_do_not_starve_register() {
    let mm = NotifierSubscriptions::new(Rules::default());
    let (log, done) = (log(), AtomicBool::new(false));
    MaySleep::enter(|cx| {
        scope(cx, |s, cx| {
            let mut section = mm.invalidate_range_start(cx, unmap());
            let registered = s.spawn("register", |cx| {
                let registration = mm.register(cx, Arc::new(Recorder::new("a", Ops::PAGE, &log))).unwrap();
                done.store(true, Ordering::Release);
                registration
            });
            while !done.load(Ordering::Acquire) {
                let next = mm.invalidate_range_start(cx, unmap());
                section.invalidate_range_end(cx);
                section = next;
            }
            section.invalidate_range_end(cx);
            drop(registered.join(cx).unwrap());
        });
    });
}

/// Runs `act` in each start.
struct Acts<F> {
    mm: Weak<NotifierSubscriptions>,
    act: F,
}

impl<F: Fn(&mut MaySleep<'_>, &Arc<NotifierSubscriptions>) + Send + Sync> MmuNotifier for Acts<F> {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        (self.act)(cx, &self.mm.upgrade().expect("the mm outlives its callbacks"));
        Ok(())
    }
}

type Held = Arc<Mutex<Vec<Registration>>>;

fn held() -> Held {
    Arc::new(Mutex::new(&GATE, Vec::new()))
}

#[test]
fn a_callback_registers_another_that_hears_what_starts_later() {
    MaySleep::enter(|cx| {
        let (mm, log, held) = (NotifierSubscriptions::new(Rules::default()), log(), held());
        let act = {
            let (log, held) = (Arc::clone(&log), Arc::clone(&held));
            move |cx: &mut MaySleep<'_>, mm: &Arc<NotifierSubscriptions>| {
                if held.lock(cx).is_empty() {
                    let registration = mm.register(cx, Arc::new(Recorder::new("new", PAIR, &log))).unwrap();
                    held.lock(cx).push(registration);
                }
            }
        };
        let _acts = mm.register(cx, Arc::new(Acts { mm: Arc::downgrade(&mm), act })).unwrap();
        mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        assert!(take(cx, &log).is_empty(), "no end without a start");
        mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        assert_eq!(take(cx, &log), ["new start", "new end"]);
    });
}

#[test]
fn a_callback_unregisters_another_which_hears_no_more() {
    MaySleep::enter(|cx| {
        let (mm, log, held) = (NotifierSubscriptions::new(Rules::default()), log(), held());
        let victim = mm.register(cx, Arc::new(Recorder::new("victim", PAIR | Ops::RELEASE, &log))).unwrap();
        held.lock(cx).push(victim);
        let act = {
            let held = Arc::clone(&held);
            move |cx: &mut MaySleep<'_>, _: &Arc<NotifierSubscriptions>| {
                let victim = held.lock(cx).pop();
                if let Some(victim) = victim {
                    victim.unregister(cx).unwrap();
                }
            }
        };
        let _acts = mm.register(cx, Arc::new(Acts { mm: Arc::downgrade(&mm), act })).unwrap();
        mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        assert_eq!(take(cx, &log), ["victim release"]);
    });
}

#[test]
fn unregister_from_inside_its_own_callback_is_an_error_and_dropping_is_the_way() {
    MaySleep::enter(|cx| {
        let (mm, held) = (NotifierSubscriptions::new(Rules::default()), held());
        let calls = Arc::new(AtomicU32::new(0));
        let act = {
            let (held, calls) = (Arc::clone(&held), Arc::clone(&calls));
            move |cx: &mut MaySleep<'_>, _: &Arc<NotifierSubscriptions>| {
                calls.fetch_add(1, Ordering::Relaxed);
                let own = held.lock(cx).pop().expect("called once");
                assert_eq!(own.unregister(cx), Err(UnregisterError::InsideOwnCallback));
                drop(own);
            }
        };
        let own = mm.register(cx, Arc::new(Acts { mm: Arc::downgrade(&mm), act })).unwrap();
        held.lock(cx).push(own);
        for _ in 0..2 {
            mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        }
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn a_release_that_panics_in_a_callback_gives_the_fence_back() {
    struct Panics;
    impl MmuNotifier for Panics {
        fn ops(&self) -> Ops {
            Ops::RELEASE
        }
        fn release(&self, _: &mut MaySleep<'_>) {
            panic!("on purpose");
        }
    }
    MaySleep::enter(|cx| {
        let (mm, log, held) = (NotifierSubscriptions::new(Rules::default()), log(), held());
        let victim = mm.register(cx, Arc::new(Recorder::new("victim", Ops::RELEASE, &log))).unwrap();
        let panics = mm.register(cx, Arc::new(Panics)).unwrap();
        held.lock(cx).extend([victim, panics]);
        let act = {
            let held = Arc::clone(&held);
            move |cx: &mut MaySleep<'_>, _: &Arc<NotifierSubscriptions>| {
                let Some(panics) = held.lock(cx).pop() else { return };
                let Some(victim) = held.lock(cx).pop() else { return };
                let unwound = catch_unwind(AssertUnwindSafe(|| panics.unregister(cx)));
                assert!(unwound.is_err());
                victim.unregister(cx).unwrap();
            }
        };
        let _acts = mm.register(cx, Arc::new(Acts { mm: Arc::downgrade(&mm), act })).unwrap();
        mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
        assert_eq!(take(cx, &log), ["victim release"]);
    });
}

#[test]
fn two_callbacks_that_unregister_each_other_do_not_hang() {
    MaySleep::enter(|cx| {
        let (mm, slots) = (NotifierSubscriptions::new(Rules::default()), [held(), held()]);
        let arrived = Arc::new(AtomicU32::new(0));
        let refused = Arc::new(AtomicU32::new(0));
        // Each unregisters the other, once both are inside; `which` says whose turn the thread is.
        for me in 0..2 {
            let (other, arrived, refused) =
                (Arc::clone(&slots[1 - me]), Arc::clone(&arrived), Arc::clone(&refused));
            let act = move |cx: &mut MaySleep<'_>, _: &Arc<NotifierSubscriptions>| {
                let Some(other) = other.lock(cx).pop() else { return };
                arrived.fetch_add(1, Ordering::AcqRel);
                while arrived.load(Ordering::Acquire) < 2 {
                    interleave::yield_now();
                }
                match other.unregister(cx) {
                    Ok(()) => {}
                    Err(UnregisterError::CallbacksWaitForEachOther) => {
                        refused.fetch_add(1, Ordering::AcqRel);
                    }
                    Err(e) => panic!("{e}"),
                }
            };
            let registration = mm.register(cx, Arc::new(Acts { mm: Arc::downgrade(&mm), act })).unwrap();
            slots[me].lock(cx).push(registration);
        }
        let threads = [(); 2].map(|()| {
            let mm = Arc::clone(&mm);
            spawn("unmap", move |cx| mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx))
        });
        for thread in threads {
            thread.join(cx).unwrap();
        }
        assert_eq!(refused.load(Ordering::Acquire), 1);
    });
}

/// Counts, and notices a callback after the fence.
#[derive(Default)]
struct Fenced {
    releases: AtomicU32,
    over: AtomicBool,
    late: AtomicBool,
}

impl Fenced {
    fn call(&self) {
        if self.over.load(Ordering::Acquire) {
            self.late.store(true, Ordering::Release);
        }
    }
}

impl MmuNotifier for Fenced {
    fn ops(&self) -> Ops {
        PAIR | Ops::RELEASE
    }

    fn invalidate_range_start(&self, _: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
        self.call();
        Ok(())
    }

    fn invalidate_range_end(&self, _: Sleep<'_, '_>, _: &Invalidation) {
        self.call();
    }

    fn release(&self, _: &mut MaySleep<'_>) {
        self.call();
        self.releases.fetch_add(1, Ordering::AcqRel);
    }
}

/// Bug 25: exit, unregister and a truncate meet in every order.
#[test]
fn release_races_unregister_and_invalidation() {
    for round in 0..2_000 {
        MaySleep::enter(|cx| {
            let mm = NotifierSubscriptions::new(Rules::default());
            let fenced = Arc::new(Fenced::default());
            let registration = mm.register(cx, fenced.clone()).unwrap();
            scope(cx, |s, cx| {
                let (mm, fenced) = (&mm, &fenced);
                let exit = s.spawn("exit", move |cx| {
                    if round % 3 == 0 {
                        interleave::yield_now();
                    }
                    mm.release(cx);
                    assert_eq!(fenced.releases.load(Ordering::Acquire), 1, "exit returned before release");
                });
                let truncate = s.spawn("truncate", move |cx| {
                    for _ in 0..4 {
                        mm.invalidate_range_start(cx, unmap()).invalidate_range_end(cx);
                    }
                });
                registration.unregister(cx).unwrap();
                fenced.over.store(true, Ordering::Release);
                exit.join(cx).unwrap();
                truncate.join(cx).unwrap();
            });
            assert_eq!(fenced.releases.load(Ordering::Acquire), 1);
            assert!(!fenced.late.load(Ordering::Acquire), "a callback ran after unregister");
        });
    }
}
