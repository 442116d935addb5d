// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sequence protocol of interval notifiers: each rule by name, then real threads.

use std::sync::Arc;
use std::time::Duration;

use interleave::{AtomicBool, AtomicU64, LockClass, MaySleep, Mutex, Ordering, SpinLock, scope};
use mmu_notifier::*;

static DRIVER: LockClass = LockClass::new("test driver");
static PAGES: LockClass = LockClass::new("test page table lock");

fn pages(at: u64, n: u64) -> Range {
    Range::new(at * PAGE_SIZE, n * PAGE_SIZE).unwrap()
}

fn clear(range: Range) -> Invalidation {
    Invalidation::new(range, Event::Clear)
}

/// Moves the sequence under its lock, and remembers what it heard.
struct Driver {
    heard: Mutex<Vec<Invalidation>>,
    refuses: AtomicBool,
}

impl Driver {
    fn new() -> Arc<Driver> {
        Arc::new(Driver { heard: Mutex::new(&DRIVER, Vec::new()), refuses: AtomicBool::new(false) })
    }

    fn heard(&self, cx: &mut MaySleep<'_>) -> Vec<Invalidation> {
        std::mem::take(&mut self.heard.lock(cx))
    }
}

impl Invalidate for Driver {
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let mut heard = match cx {
            Sleep::May(cx) => self.heard.lock(cx),
            Sleep::TryOnly(_) if self.refuses.load(Ordering::Relaxed) => return Err(WouldBlock),
            Sleep::TryOnly(cx) => self.heard.try_lock(cx).ok_or(WouldBlock)?,
        };
        heard.push(*inv);
        Ok(seq.set())
    }
}

struct World {
    mm: Arc<NotifierSubscriptions>,
    driver: Arc<Driver>,
}

impl World {
    fn new() -> World {
        World { mm: NotifierSubscriptions::new(Rules::default()), driver: Driver::new() }
    }

    fn insert(&self, cx: &mut MaySleep<'_>, range: Range) -> IntervalNotifier {
        self.mm.insert_interval(cx, range, self.driver.clone()).unwrap()
    }
}

#[test]
fn hears_what_overlaps_and_the_sequence_moves() {
    MaySleep::enter(|cx| {
        let w = World::new();
        let notifier = w.insert(cx, pages(10, 4));
        let seq = notifier.read_begin(cx).unwrap();
        assert_eq!(seq.get(), 1, "the mm begins at 2, a fresh notifier at the odd value before");
        for beside in [pages(9, 1), pages(14, 1)] {
            w.mm.invalidate_range_start(cx, clear(beside)).invalidate_range_end(cx);
        }
        assert!(!notifier.read_retry(seq) && w.driver.heard(cx).is_empty());

        let section = w.mm.invalidate_range_start(cx, clear(pages(13, 9)));
        assert!(notifier.read_retry(seq));
        section.invalidate_range_end(cx);
        assert_eq!(w.driver.heard(cx), [clear(pages(13, 9))]);
        let next = notifier.read_begin(cx).unwrap();
        assert_eq!(next.get(), 3);
        assert!(notifier.read_retry(seq) && !notifier.read_retry(next));
    });
}

#[test]
fn concurrent_ranges_share_one_odd_value_and_only_the_last_end_makes_it_even() {
    let w = World::new();
    let ended = AtomicBool::new(false);
    MaySleep::enter(|cx| {
        let (a, b) = (w.insert(cx, pages(10, 1)), w.insert(cx, pages(20, 1)));
        let (sa, sb) = (a.read_begin(cx).unwrap(), b.read_begin(cx).unwrap());
        scope(cx, |s, cx| {
            let first = w.mm.invalidate_range_start(cx, clear(pages(10, 1)));
            let second = w.mm.invalidate_range_start(cx, clear(pages(20, 1)));
            first.invalidate_range_end(cx);
            let reader = s.spawn("reader", |cx| {
                let seq = a.read_begin(cx).unwrap();
                assert!(ended.load(Ordering::Acquire), "a's own range has ended, the shared value has not");
                seq
            });
            interleave::time::sleep(cx, Duration::from_millis(20));
            ended.store(true, Ordering::Release);
            second.invalidate_range_end(cx);
            assert_eq!(reader.join(cx).unwrap(), b.read_begin(cx).unwrap(), "one value for both");
        });
        assert!(a.read_retry(sa) && b.read_retry(sb));
    });
}

#[test]
fn a_range_without_a_match_makes_nobody_wait() {
    MaySleep::enter(|cx| {
        let w = World::new();
        let notifier = w.insert(cx, pages(10, 1));
        scope(cx, |s, cx| {
            let section = w.mm.invalidate_range_start(cx, clear(pages(50, 1)));
            s.spawn("reader", |cx| notifier.read_begin(cx).unwrap()).join(cx).unwrap();
            section.invalidate_range_end(cx);
        });
    });
}

#[test]
fn a_notifier_inserted_while_any_range_is_active_collides_until_the_end() {
    for somebody_matches in [false, true] {
        let w = World::new();
        let ended = AtomicBool::new(false);
        MaySleep::enter(|cx| {
            let _other = w.insert(cx, pages(10, 1));
            scope(cx, |s, cx| {
                let at = if somebody_matches { 10 } else { 50 };
                let section = w.mm.invalidate_range_start(cx, clear(pages(at, 1)));
                let late = w.insert(cx, pages(at, 1));
                let reader = s.spawn("reader", |cx| {
                    let seq = late.read_begin(cx).unwrap();
                    assert!(ended.load(Ordering::Acquire), "it has not heard this start");
                    (seq, late)
                });
                interleave::time::sleep(cx, Duration::from_millis(20));
                ended.store(true, Ordering::Release);
                section.invalidate_range_end(cx);
                let (seq, late) = reader.join(cx).unwrap();
                w.driver.heard(cx);
                w.mm.invalidate_range_start(cx, clear(pages(at, 1))).invalidate_range_end(cx);
                assert!(late.read_retry(seq), "it is in the index now");
            });
        });
    }
}

#[test]
fn remove_waits_for_the_end_of_active_ranges_and_is_a_fence() {
    let w = World::new();
    let ended = AtomicBool::new(false);
    MaySleep::enter(|cx| {
        let notifier = w.insert(cx, pages(10, 1));
        scope(cx, |s, cx| {
            let section = w.mm.invalidate_range_start(cx, clear(pages(10, 1)));
            let remover = s.spawn("remover", |cx| {
                notifier.remove(cx).unwrap();
                assert!(ended.load(Ordering::Acquire), "removed while a matching range was active");
            });
            interleave::time::sleep(cx, Duration::from_millis(20));
            ended.store(true, Ordering::Release);
            section.invalidate_range_end(cx);
            remover.join(cx).unwrap();
        });
        w.driver.heard(cx);
        w.mm.invalidate_range_start(cx, clear(pages(10, 1))).invalidate_range_end(cx);
        notifier.remove(cx).unwrap();
        assert!(w.driver.heard(cx).is_empty());
    });
}

#[test]
fn inserted_and_removed_within_a_section_was_never_there() {
    MaySleep::enter(|cx| {
        let w = World::new();
        let _other = w.insert(cx, pages(10, 1));
        let section = w.mm.invalidate_range_start(cx, clear(pages(10, 1)));
        drop(w.insert(cx, pages(10, 1)));
        section.invalidate_range_end(cx);
        w.driver.heard(cx);
        w.mm.invalidate_range_start(cx, clear(pages(10, 1))).invalidate_range_end(cx);
        assert_eq!(w.driver.heard(cx).len(), 1, "the other alone");
    });
}

#[test]
fn dropping_the_handle_ends_the_callbacks_without_a_wait() {
    MaySleep::enter(|cx| {
        let w = World::new();
        let notifier = w.insert(cx, pages(10, 1));
        let section = w.mm.invalidate_range_start(cx, clear(pages(10, 1)));
        drop(notifier);
        let again = w.mm.invalidate_range_start(cx, clear(pages(10, 1)));
        section.invalidate_range_end(cx);
        again.invalidate_range_end(cx);
        assert_eq!(w.driver.heard(cx).len(), 1);
        assert_eq!(Arc::strong_count(&w.driver), 1, "the callback is gone");
    });
}

#[test]
fn waiting_from_a_section_of_ones_own_is_an_error_not_a_hang() {
    MaySleep::enter(|cx| {
        let w = World::new();
        let notifier = w.insert(cx, pages(10, 1));
        let section = w.mm.invalidate_range_start(cx, clear(pages(10, 1)));
        assert_eq!(notifier.read_begin(cx), Err(InsideInvalidation));
        assert_eq!(notifier.remove(cx), Err(InsideInvalidation));
        section.invalidate_range_end(cx);
        notifier.read_begin(cx).unwrap();
    });
}

/// Calls what it must not from its callback.
struct Impatient(Mutex<Option<Arc<IntervalNotifier>>>);

impl Invalidate for Impatient {
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        _: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        let own = self.0.lock(cx).take().expect("called once");
        assert_eq!(own.read_begin(cx), Err(InsideInvalidation));
        assert_eq!(own.remove(cx), Err(InsideInvalidation));
        Ok(seq.set())
    }
}

#[test]
fn waiting_from_a_callback_is_an_error_not_a_hang() {
    MaySleep::enter(|cx| {
        let mm = NotifierSubscriptions::new(Rules::default());
        let impatient = Arc::new(Impatient(Mutex::new(&DRIVER, None)));
        let own = Arc::new(mm.insert_interval(cx, pages(10, 1), impatient.clone()).unwrap());
        *impatient.0.lock(cx) = Some(Arc::clone(&own));
        mm.invalidate_range_start(cx, clear(pages(10, 1))).invalidate_range_end(cx);
        assert!(impatient.0.lock(cx).is_none());
    });
}

#[test]
fn a_failing_nonblock_callback_ends_the_interval_side_itself() {
    MaySleep::enter(|cx| {
        let w = World::new();
        let notifier = w.insert(cx, pages(10, 1));
        w.driver.refuses.store(true, Ordering::Relaxed);
        let failed = w.mm.invalidate_range_start_nonblock(cx, clear(pages(10, 1)));
        assert_eq!(failed.err(), Some(WouldBlock));
        // Would wait for ever, had the range stayed active.
        let seq = notifier.read_begin(cx).unwrap();
        assert!(!notifier.read_retry(seq));
        w.driver.refuses.store(false, Ordering::Relaxed);
        let section = w.mm.invalidate_range_start_nonblock(cx, clear(pages(10, 1))).unwrap();
        section.invalidate_range_end(cx);
        assert!(notifier.read_retry(seq));
    });
}

struct Refuses;

impl MmuNotifier for Refuses {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, _: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        if inv.blockable { Ok(()) } else { Err(WouldBlock) }
    }
}

/// Linux (read up to 6.13) returns from the failed list start without ending the range that interval notifiers
/// were told of.
#[test]
fn a_failing_list_notifier_leaks_the_interval_range_in_linux_and_not_here() {
    for rules in [Rules::LINUX_6_6, Rules::MENDED] {
        MaySleep::enter(|cx| {
            let w = World { mm: NotifierSubscriptions::new(rules), driver: Driver::new() };
            let _refuses = w.mm.register(cx, Arc::new(Refuses)).unwrap();
            let notifier = w.insert(cx, pages(10, 1));
            w.mm.invalidate_range_start_nonblock(cx, clear(pages(10, 1))).unwrap_err();
            assert_eq!(w.driver.heard(cx).len(), 1, "interval notifiers come first");
            // The next range gets a value of its own iff the failed one has ended.
            w.mm.invalidate_range_start(cx, clear(pages(10, 1))).invalidate_range_end(cx);
            let value = if rules == Rules::MENDED { 5 } else { 3 };
            assert!(!notifier.read_retry(Seq::new(value)), "{rules:?}: {notifier:?}");
        });
    }
}

#[test]
fn exit_sends_release_to_all_intervals_and_they_stay_for_the_teardown() {
    MaySleep::enter(|cx| {
        let w = World::new();
        let notifier = w.insert(cx, pages(10, 1));
        let seq = notifier.read_begin(cx).unwrap();
        w.mm.release(cx);
        assert!(notifier.read_retry(seq));
        let teardown = Invalidation::new(Range::ALL, Event::Unmap);
        w.mm.invalidate_range_start(cx, teardown).invalidate_range_end(cx);
        assert_eq!(w.driver.heard(cx), [Invalidation::new(Range::ALL, Event::Release), teardown]);
        let late = w.mm.insert_interval(cx, pages(1, 1), w.driver.clone());
        assert_eq!(late.unwrap_err(), RegisterError::Exited);
    });
}

#[test]
fn more_notifiers_than_one_batch_all_hear_it_once() {
    MaySleep::enter(|cx| {
        let w = World::new();
        for n in [1, 7, 8, 9, 16, 17, 100] {
            let all: Vec<_> = (0..n).map(|i| w.insert(cx, pages(10 + i % 3, 5))).collect();
            let seqs: Vec<_> = all.iter().map(|i| i.read_begin(cx).unwrap()).collect();
            w.mm.invalidate_range_start(cx, clear(pages(12, 1))).invalidate_range_end(cx);
            assert_eq!(w.driver.heard(cx).len() as u64, n);
            assert!(all.iter().zip(seqs).all(|(i, seq)| i.read_retry(seq)));
        }
    });
}

/// A page table of one page, its frame, and a driver that mirrors it: readers must never install a frame that
/// the page table has let go, not even for the time of an overlap.
struct Mirror {
    device: Mutex<Option<u64>>,
}

impl Invalidate for Mirror {
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        _: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let mut device = match cx {
            Sleep::May(cx) => self.device.lock(cx),
            Sleep::TryOnly(cx) => self.device.try_lock(cx).ok_or(WouldBlock)?,
        };
        let moved = seq.set();
        *device = None;
        Ok(moved)
    }
}

#[test]
fn no_reader_installs_during_an_overlap() {
    const ROUNDS: u64 = 5_000;
    let mm = NotifierSubscriptions::new(Rules::default());
    let mirror = Arc::new(Mirror { device: Mutex::new(&DRIVER, None) });
    let pte = SpinLock::new(&PAGES, 0u64);
    let writers = AtomicU64::new(2);
    let installed = AtomicU64::new(0);
    MaySleep::enter(|cx| {
        let notifier = mm.insert_interval(cx, pages(10, 2), mirror.clone()).unwrap();
        scope(cx, |s, cx| {
            let (mm, pte, mirror, writers) = (&mm, &pte, &mirror, &writers);
            let (notifier, installed) = (&notifier, &installed);
            let mut threads = Vec::new();
            for writer in 0..2 {
                threads.push(s.spawn("writer", move |cx| {
                    for round in 0..ROUNDS {
                        let inv = clear(pages(10 + writer, 1 + round % 2));
                        let section = if round % 7 == 0 {
                            match mm.invalidate_range_start_nonblock(cx, inv) {
                                Ok(section) => section,
                                Err(WouldBlock) => continue,
                            }
                        } else {
                            mm.invalidate_range_start(cx, inv)
                        };
                        assert_eq!(*mirror.device.lock(cx), None, "installed between start and end");
                        *pte.lock(cx) += 1;
                        if round % 16 == 0 {
                            interleave::yield_now();
                        }
                        assert_eq!(*mirror.device.lock(cx), None, "installed between start and end");
                        section.invalidate_range_end(cx);
                    }
                    writers.fetch_sub(1, Ordering::AcqRel);
                }));
            }
            for _ in 0..2 {
                threads.push(s.spawn("reader", move |cx| {
                    // A last turn after the writers, lest a busy machine give them none.
                    let mut last = false;
                    while !std::mem::replace(&mut last, writers.load(Ordering::Acquire) == 0) {
                        let seq = notifier.read_begin(cx).unwrap();
                        let frame = *pte.lock(cx);
                        let mut device = mirror.device.lock(cx);
                        if !notifier.read_retry(seq) {
                            *device = Some(frame);
                            installed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }));
            }
            threads.push(s.spawn("inserter", move |cx| {
                while writers.load(Ordering::Acquire) > 0 {
                    let other = mm.insert_interval(cx, pages(11, 1), Driver::new()).unwrap();
                    other.read_begin(cx).unwrap();
                    other.remove(cx).unwrap();
                }
            }));
            for thread in threads {
                thread.join(cx).unwrap();
            }
        });
    });
    assert!(installed.load(Ordering::Relaxed) > 0, "the readers never got a turn");
}
