// SPDX-License-Identifier: MIT OR Apache-2.0
//! The modelled sources: when a sequence moves, what is counted, and that nobody is called who has ended.

mod common;

use common::range;
use interleave::explore::{Config, SiteKind, Strategy, explore};
use interleave::{AtomicBool, AtomicU64, LockClass, MaySleep, Mutex, Ordering, Sleep, scope};
use mmu_notifier::primary::{
    After, CountedBefore, Delivery, Gone, Invalidate, Pin, PrimaryMmu, SeqMoved, SetSeq, Subscription,
};
use mmu_notifier::{Access, InsideInvalidation, Invalidation, MmuNotifier, Ops, Range, WouldBlock};
use softmm::told::{Events, Fault, How, Told, ToldSubscription};
use softmm::{Machine, Mm, Placement, Prot};
use std::sync::Arc;

/// A callback.
struct Does<F>(F);

impl<F: Fn(&Invalidation) + Send + Sync> Invalidate for Does<F> {
    fn invalidate(
        &self,
        _: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        (self.0)(inv);
        Ok(seq.set())
    }
}

fn nothing() -> Arc<dyn Invalidate> {
    Arc::new(Does(|_: &Invalidation| {}))
}

/// An mm with a page at page number 1, and another at 2.
fn with_mm(cx: &mut MaySleep<'_>, f: impl FnOnce(&mut MaySleep<'_>, &Arc<Mm>)) {
    let machine = Machine::new(softmm::Config { frames: 6, tables: 8, ..softmm::Config::default() });
    let user = machine.new_mm().unwrap();
    user.mmap(cx, Placement::Fixed(range(1, 2)), Prot::ReadWrite).unwrap();
    f(cx, &user);
    user.mmput(cx);
}

#[test]
fn the_sequence_moves_when_the_source_says_so() {
    // Strict and ordered, before the page tables change; and when munmap has returned.
    let expected = [
        (How::KVM, (true, true), true),
        (How::UFFD, (true, false), true),
        (How::UFFD.with(Fault::NoProbe), (false, false), true),
        (How::DEAF, (false, false), false),
    ];
    for (how, meanwhile, after) in expected {
        MaySleep::enter(|cx| {
            with_mm(cx, |cx, mm| {
                let told = Told::listening(cx, mm, how).unwrap();
                let watch = Arc::new(told.subscribe(cx, range(1, 1), nothing()).unwrap());
                let seq = watch.read_begin(cx).unwrap();
                assert!(!watch.read_retry(seq), "{how:?}");
                let seen = Arc::new(AtomicU64::new(0));
                let probe = Does({
                    let (watch, seen) = (Arc::clone(&watch), Arc::clone(&seen));
                    move |_: &Invalidation| {
                        assert_eq!(
                            (watch.read_retry(seq), watch.read_retry_ordered(seq)),
                            meanwhile,
                            "{how:?}"
                        );
                        seen.fetch_add(1, Ordering::SeqCst);
                    }
                });
                // Begins behind the source, and is called after it.
                let probe = mm.subscribe(cx, range(1, 1), Arc::new(probe)).unwrap();
                scope(cx, |threads, cx| {
                    told.start(threads);
                    told.munmap(cx, range(1, 1));
                    told.stop();
                });
                assert_eq!(seen.load(Ordering::SeqCst), 1);
                assert_eq!((watch.read_retry(seq), watch.read_retry_ordered(seq)), (after, after), "{how:?}");
                let seq = watch.read_begin(cx).unwrap();
                assert!(!watch.read_retry(seq), "{how:?}");
                probe.unsubscribe(cx).unwrap();
            });
        });
    }
}

#[test]
fn a_source_that_is_waited_for_is_softmm_itself() {
    MaySleep::enter(|cx| {
        with_mm(cx, |cx, mm| {
            let calls = Arc::new(AtomicU64::new(0));
            let counts = Does({
                let calls = Arc::clone(&calls);
                move |_: &Invalidation| {
                    calls.fetch_add(1, Ordering::SeqCst);
                }
            });
            let counts = Arc::new(counts);
            for how in [How::WAITS, How::WAITS.with(Fault::Unasked)] {
                let told = Told::listening(cx, mm, how).unwrap();
                let watch = told.subscribe(cx, range(1, 2), counts.clone()).unwrap();
                let seq = watch.read_begin(cx).unwrap();
                let before = calls.load(Ordering::SeqCst);
                told.munmap(cx, range(if how == How::WAITS { 1 } else { 2 }, 1));
                assert_eq!(calls.load(Ordering::SeqCst), before + 1);
                assert_eq!(watch.read_retry(seq), how == How::WAITS);
                assert_eq!((told.era(), watch.count_at(seq)), (None, None));
            }
        });
    });
}

fn start(events: &Events, cx: &mut MaySleep<'_>, range: Range) -> bool {
    events.started(Sleep::May(cx), range)
}

#[test]
fn what_kvm_counts_is_given_away_and_pages_share_it() {
    MaySleep::enter(|cx| {
        with_mm(cx, |cx, mm| {
            let told = Told::<CountedBefore>::fed(mm);
            let watch = told.subscribe(cx, range(1, 1), nothing()).unwrap();
            let seq = watch.read_begin(cx).unwrap();
            let count = watch.count_at(seq).unwrap();
            let era = told.era();
            assert_eq!(told.count(count.key), Some(count.value));
            assert!(!start(told.events(), cx, range(2, 1)), "it concerns nobody");
            assert_eq!((told.count(count.key), watch.read_retry(seq)), (Some(count.value), false));
            assert_ne!(told.era(), era);
            assert!(!start(told.events(), cx, range(3, 1)), "nor does this");
            assert!(watch.read_retry(seq), "but it is counted with page 1");
            assert_ne!(told.count(count.key), Some(count.value));
            assert!(start(told.events(), cx, range(0, 9)));
            assert!(told.events().deliver(cx) && !told.events().deliver(cx));
            assert!(told.events().released(cx));
            assert_eq!(watch.read_begin(cx), Err(Gone::Released));
        });
    });
}

#[test]
fn uffd_is_in_flight_until_the_last_change_has_ended() {
    MaySleep::enter(|cx| {
        with_mm(cx, |cx, mm| {
            let told = Told::<After>::fed(mm);
            let watch = told.subscribe(cx, range(1, 1), nothing()).unwrap();
            let seq = watch.read_begin(cx).unwrap();
            let events = told.events();
            start(events, cx, range(2, 1));
            start(events, cx, range(1, 1));
            assert_eq!((watch.read_retry(seq), watch.read_retry_ordered(seq)), (true, false));
            assert!(!events.ended(Sleep::May(cx), range(2, 1)), "it concerns nobody");
            assert_eq!((watch.read_retry(seq), watch.read_retry_ordered(seq)), (true, false));
            assert!(events.ended(Sleep::May(cx), range(1, 1)));
            assert_eq!((watch.read_retry(seq), watch.read_retry_ordered(seq)), (true, true));
            let seq = watch.read_begin(cx).unwrap();
            assert!(!watch.read_retry(seq));
            assert_eq!((told.era(), watch.count_at(seq)), (None, None));
            assert!(told.era_ordered().is_some());
        });
    });
}

/// Passes on what the mm says.
struct Feed(Arc<Events>);

impl MmuNotifier for Feed {
    fn ops(&self) -> Ops {
        Ops::START | Ops::END
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        self.0.started(cx, inv.range);
        Ok(())
    }

    fn invalidate_range_end(&self, cx: Sleep<'_, '_>, inv: &Invalidation) {
        self.0.ended(cx, inv.range);
    }
}

/// One thread pins a page that another drops: what it keeps is no page of the past, or its sequence has moved.
fn a_pin_beside_dontneed<D: Delivery + 'static>(cx: &mut MaySleep<'_>) {
    with_mm(cx, |cx, mm| {
        let page = range(1, 1);
        mm.machine().cpus()[0].store(cx, mm, page.start(), 1).unwrap();
        let told = Told::<D>::fed(mm);
        let feed = mm.notifiers().register(cx, Arc::new(Feed(Arc::clone(told.events())))).unwrap();
        let watch = told.subscribe(cx, page, nothing()).unwrap();
        scope(cx, |threads, cx| {
            let changer = threads.spawn("changer", |cx| mm.madvise_dontneed(cx, page).unwrap());
            let seq = watch.read_begin(cx).unwrap();
            let pin = told.pin(cx, page, Access::Write).unwrap();
            changer.join(cx).unwrap();
            let now = told.page_identity(cx, page.first_page()).unwrap().pfn;
            assert!(watch.read_retry_ordered(seq) || now == pin.pfn(page.first_page()), "keeps what is gone");
        });
        feed.unregister(cx).unwrap();
    });
}

#[test]
fn no_order_of_a_pin_and_a_change_keeps_what_is_gone_and_without_the_wait_some_do() {
    let config = || Config::new(Strategy::Preemptions(2));
    // Late, the sequence moves once more, at the end: there the wait is for a strict check that comes meanwhile.
    for (scenario, needs_the_wait) in [
        (a_pin_beside_dontneed::<CountedBefore> as fn(&mut MaySleep<'_>), true),
        (a_pin_beside_dontneed::<After>, false),
    ] {
        let report = explore(&config().find_sites(), scenario);
        report.assert_ok();
        assert!(report.exhausted);
        for (kind, needed) in [(SiteKind::Wait, needs_the_wait), (SiteKind::Retry, true)] {
            let here = |site: &&interleave::explore::Mutant| site.kind == kind && site.site.file() == file!();
            let site = report.sites.iter().find(here).expect("it asks");
            let failures = explore(&config().without(*site), scenario).failures;
            assert_eq!(failures.iter().any(|f| f.message.contains("is gone")), needed, "{site}");
        }
    }
}

#[test]
fn no_order_calls_a_subscriber_that_has_ended() {
    let hows = [How::KVM.calling(), How::UFFD.calling()];
    for (how, dropped) in hows.into_iter().flat_map(|how| [(how, true), (how, false)]) {
        let called = std::cell::Cell::new(false);
        let scenario = |cx: &mut MaySleep<'_>| {
            with_mm(cx, |cx, mm| {
                let told = Told::listening(cx, mm, how).unwrap();
                let (over, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
                let callback = Does({
                    let (over, calls) = (Arc::clone(&over), Arc::clone(&calls));
                    move |_: &Invalidation| {
                        calls.fetch_add(1, Ordering::SeqCst);
                        assert!(!over.load(Ordering::SeqCst), "called after the end");
                    }
                });
                let watch = told.subscribe(cx, range(1, 1), Arc::new(callback)).unwrap();
                scope(cx, |threads, cx| {
                    told.start(threads);
                    told.munmap(cx, range(1, 1));
                    let kept = if dropped {
                        drop(watch);
                        None
                    } else {
                        watch.unsubscribe(cx).unwrap();
                        Some(watch)
                    };
                    over.store(true, Ordering::SeqCst);
                    told.stop();
                    drop(kept);
                });
                called.set(called.get() || calls.load(Ordering::SeqCst) > 0);
            });
        };
        let report = explore(&Config::new(Strategy::Preemptions(2)).max_executions(20_000), scenario);
        report.assert_ok();
        assert!(called.get(), "{how:?}: nobody is ever called");
    }
}

static HELD: LockClass = LockClass::new("test subscription");

#[test]
fn a_callback_can_drop_its_subscription_and_cannot_unsubscribe_it() {
    MaySleep::enter(|cx| {
        with_mm(cx, |cx, mm| {
            let told = Told::<CountedBefore>::fed(mm);
            let held: Arc<Mutex<Option<ToldSubscription>>> = Arc::new(Mutex::new(&HELD, None));
            let calls = Arc::new(AtomicU64::new(0));
            let callback = Does({
                let (held, calls) = (Arc::clone(&held), Arc::clone(&calls));
                move |_: &Invalidation| {
                    let watch = MaySleep::enter(|cx| held.lock(cx).take()).expect("called once");
                    assert_eq!(MaySleep::enter(|cx| watch.unsubscribe(cx)), Err(InsideInvalidation));
                    calls.fetch_add(1, Ordering::SeqCst);
                    drop(watch);
                }
            });
            *held.lock(cx) = Some(told.subscribe(cx, range(1, 1), Arc::new(callback)).unwrap());
            for _ in 0..2 {
                start(told.events(), cx, range(1, 1));
            }
            while told.events().deliver(cx) {}
            assert!(!start(told.events(), cx, range(1, 1)), "nobody listens any more");
            assert_eq!(calls.load(Ordering::SeqCst), 1);
        });
    });
}
