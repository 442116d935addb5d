// SPDX-License-Identifier: MIT OR Apache-2.0
//! Callbacks.

use crate::memory::{Memory, PAGE};
use crate::{SOON, live, live_both, open_ring};
use hostmm::kvm::{Gone, Kind, KvmSource, Notice, Options, Prefer, SubscribeError};
use interleave::{AtomicBool, MaySleep, Ordering, time};
use mmu_notifier::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// The next notice that is not about something else of this process.
fn next(rx: &Receiver<Notice>) -> Notice {
    rx.recv_timeout(SOON).expect("a notice")
}

#[test]
fn a_callback_hears_the_exact_range() {
    live_both("monitor::a_callback_hears_the_exact_range", |prefer| {
        let m = Memory::touched(16 * PAGE);
        let source = open_ring(prefer, 1 << 16, m.range());
        let (tx, rx) = channel();
        let sub = source.subscribe(m.part(4, 4), move |n| _ = tx.send(*n)).unwrap();
        let (elsewhere, inside) = (m.part(0, 4), m.part(6, 6));
        for r in [elsewhere, inside] {
            // SAFETY: a part of our own mapping.
            unsafe { libc::madvise(r.start() as *mut _, r.len() as usize, libc::MADV_DONTNEED) };
        }
        let Notice::Range(record) = next(&rx) else { panic!("lost") };
        assert_eq!((record.start, record.end), (inside.start(), inside.end()));
        assert_eq!(record.kind, Kind::Unmap);
        if prefer == Prefer::Bpf {
            assert_ne!(record.ktime_ns, 0);
            assert_ne!(record.tgid, 0);
        }
        drop(sub);
        m.advise(libc::MADV_DONTNEED);
        assert!(rx.recv_timeout(Duration::from_millis(200)).is_err(), "unsubscribing is a fence");
    });
}

#[test]
fn many_subscribers_share_one_program() {
    live("monitor::many_subscribers_share_one_program", || {
        let m = Memory::touched(64 * PAGE);
        let source = open_ring(Prefer::Bpf, 1 << 18, m.range());
        let (tx, rx) = channel();
        let subs: Vec<_> = (0..64)
            .map(|i| {
                let tx = tx.clone();
                source.subscribe(m.part(i, 1), move |n| _ = tx.send((i, *n))).unwrap()
            })
            .collect();
        let seqs: Vec<_> = subs.iter().map(|s| s.watch().snapshot().unwrap()).collect();
        m.advise(libc::MADV_DONTNEED);
        let mut heard: Vec<usize> = (0..64).map(|_| rx.recv_timeout(SOON).unwrap().0).collect();
        heard.sort_unstable();
        assert_eq!(heard, (0..64).collect::<Vec<_>>());
        assert!(subs.iter().zip(seqs).all(|(s, seq)| s.watch().changed_since(seq)));
    });
}

#[test]
fn only_the_subscribers_that_overlap_are_called() {
    const SUBSCRIBERS: usize = 5000;
    live("monitor::only_the_subscribers_that_overlap_are_called", || {
        let m = Memory::touched((SUBSCRIBERS + 1) * PAGE);
        let source = open_ring(Prefer::Bpf, 1 << 18, m.range());
        let (tx, rx) = channel();
        let mut subs: Vec<_> = (0..SUBSCRIBERS)
            .map(|i| {
                let tx = tx.clone();
                let told = move |n: &Notice| _ = tx.send((i, *n));
                Some(source.subscribe(m.part(i, 1), told).unwrap())
            })
            .collect();
        // Whoever has gone is no hit either.
        subs[1003] = None;
        let part = m.part(1000, 10);
        // SAFETY: a part of our own mapping.
        unsafe { libc::madvise(part.start() as *mut _, part.len() as usize, libc::MADV_DONTNEED) };
        // The monitor takes records in order: what it says of the last page comes after all it says of the part.
        let last = m.part(SUBSCRIBERS, 1);
        let _end = source.subscribe(last, move |n| _ = tx.send((SUBSCRIBERS, *n))).unwrap();
        // SAFETY: as above.
        unsafe { libc::madvise(last.start() as *mut _, last.len() as usize, libc::MADV_DONTNEED) };
        let mut called = Vec::new();
        loop {
            let (who, notice) = rx.recv_timeout(SOON).unwrap();
            assert!(matches!(notice, Notice::Range(_)), "{notice:?}");
            if who == SUBSCRIBERS {
                break;
            }
            called.push(who);
        }
        assert_eq!(called, [1000, 1001, 1002, 1004, 1005, 1006, 1007, 1008, 1009]);
    });
}

#[test]
fn unsubscribing_waits_for_a_callback_that_runs() {
    live("monitor::unsubscribing_waits_for_a_callback_that_runs", || {
        let m = Memory::touched(PAGE);
        let source = open_ring(Prefer::Bpf, 1 << 16, m.range());
        let running = Arc::new(AtomicBool::new(false));
        let (began, begun) = channel();
        let sub = source
            .subscribe(m.range(), {
                let running = Arc::clone(&running);
                move |_| {
                    running.store(true, Ordering::SeqCst);
                    began.send(()).unwrap();
                    MaySleep::enter(|cx| time::sleep(cx, Duration::from_millis(100)));
                    running.store(false, Ordering::SeqCst);
                }
            })
            .unwrap();
        m.advise(libc::MADV_DONTNEED);
        begun.recv_timeout(SOON).unwrap();
        drop(sub);
        assert!(!running.load(Ordering::SeqCst), "dropped while it ran");
        m.advise(libc::MADV_DONTNEED);
        assert!(begun.recv_timeout(Duration::from_millis(200)).is_err(), "called after it was dropped");
    });
}

#[test]
fn a_callback_may_unsubscribe_others() {
    live("monitor::a_callback_may_unsubscribe_others", || {
        let m = Memory::touched(2 * PAGE);
        let source = open_ring(Prefer::Bpf, 1 << 16, m.range());
        let (tx, rx) = channel();
        let other = {
            let tx = tx.clone();
            source.subscribe(m.part(1, 1), move |_| _ = tx.send("other")).unwrap()
        };
        let mut other = Some(other);
        let _sub = source
            .subscribe(m.part(0, 1), move |_| {
                drop(other.take());
                tx.send("first").unwrap();
            })
            .unwrap();
        // One record that concerns both: the first, at the lower address, ends the second before its turn.
        m.advise(libc::MADV_DONTNEED);
        assert_eq!(rx.recv_timeout(SOON), Ok("first"));
        m.advise(libc::MADV_DONTNEED);
        assert_eq!(rx.recv_timeout(SOON), Ok("first"));
        assert!(interleave::lockdep::take_reports().is_empty());
    });
}

#[test]
fn a_full_ring_tells_everybody_and_is_counted() {
    live_both("monitor::a_full_ring_tells_everybody_and_is_counted", |prefer| {
        let (m, far) = (Memory::touched(PAGE), Memory::touched(PAGE));
        let (low, high) =
            (m.range().start().min(far.range().start()), m.range().end().max(far.range().end()));
        let source = open_ring(prefer, 4096, Range::new(low, high - low).unwrap());
        let (tx, rx) = channel();
        let (release, gate) = channel::<()>();
        // This one blocks the monitor, so that the ring fills up behind it.
        let _slow = source.subscribe(m.range(), move |_| _ = gate.recv()).unwrap();
        let sub = source.subscribe(far.range(), move |n| _ = tx.send(*n)).unwrap();
        let seq = sub.watch().snapshot().unwrap();
        for _ in 0..1000 {
            m.advise(libc::MADV_DONTNEED);
        }
        drop(release);
        assert_eq!(next(&rx), Notice::Everything);
        assert!(source.health().unwrap().lost > 0);
        // The counters lost nothing: the neighbour's page did not change.
        if prefer == Prefer::Bpf {
            let near = source.watch(m.range()).unwrap();
            let seq = near.snapshot().unwrap();
            m.advise(libc::MADV_DONTNEED);
            assert!(near.changed_since(seq));
        } else {
            assert!(sub.watch().changed_since(seq), "heads cannot tell ranges apart");
        }
        // And the ring works again, as soon as the callbacks have caught up.
        let (tx, rx) = channel();
        let _sub = source.subscribe(far.range(), move |n| _ = tx.send(*n)).unwrap();
        let end = Instant::now() + SOON;
        let range = |n: Notice| matches!(n, Notice::Range(r) if r.start == far.range().start());
        loop {
            far.advise(libc::MADV_DONTNEED);
            if rx.recv_timeout(Duration::from_millis(20)).is_ok_and(range) {
                break;
            }
            assert!(Instant::now() < end, "nothing but losses");
        }
    });
}

#[test]
fn a_panicking_callback_kills_the_monitor_and_everybody_knows() {
    live("monitor::a_panicking_callback_kills_the_monitor_and_everybody_knows", || {
        let m = Memory::touched(PAGE);
        let source = open_ring(Prefer::Bpf, 1 << 16, m.range());
        let other = source.subscribe(Range::ALL, |_| ()).unwrap();
        let plain = source.watch(m.range()).unwrap();
        let seq = other.watch().snapshot().unwrap();
        let _bad = source.subscribe(m.range(), |_| panic!("on purpose")).unwrap();
        m.advise(libc::MADV_DONTNEED);
        while other.watch().snapshot().is_ok() {
            interleave::yield_now();
        }
        assert_eq!(other.watch().snapshot(), Err(Gone::MonitorDead));
        assert!(other.watch().changed_since(seq));
        assert_eq!(source.health(), Err(Gone::MonitorDead));
        let late = source.subscribe(m.range(), |_| ());
        assert_eq!(late.err(), Some(SubscribeError::Gone(Gone::MonitorDead)));
        // Who never asked for callbacks does not depend on the monitor.
        let seq = plain.snapshot().unwrap();
        assert!(!plain.changed_since(seq));
        m.advise(libc::MADV_DONTNEED);
        assert!(plain.changed_since(seq));
    });
}

#[test]
fn callbacks_may_change_memory_and_unsubscribe() {
    live("monitor::callbacks_may_change_memory_and_unsubscribe", || {
        let m = Memory::touched(PAGE);
        let source = open_ring(Prefer::Bpf, 1 << 16, m.range());
        let (tx, rx) = channel();
        let (give, take) = channel();
        let sub = source
            .subscribe(m.range(), move |_| {
                Memory::touched(PAGE).unmap();
                // Its own subscription: this call is the last.
                _ = take.recv();
                _ = tx.send(());
            })
            .unwrap();
        give.send(sub).unwrap();
        m.advise(libc::MADV_DONTNEED);
        rx.recv_timeout(SOON).unwrap();
        m.advise(libc::MADV_DONTNEED);
        assert!(rx.recv_timeout(Duration::from_millis(200)).is_err());
        source.close();
    });
}

#[test]
fn closing_silences_everything() {
    live_both("monitor::closing_silences_everything", |prefer| {
        let m = Memory::touched(PAGE);
        let source = open_ring(prefer, 1 << 16, m.range());
        let (tx, rx) = channel();
        let sub = source.subscribe(m.range(), move |n| _ = tx.send(*n)).unwrap();
        let watch = source.watch(m.range()).unwrap();
        let seq = watch.snapshot().unwrap();
        source.close();
        assert!(watch.changed_since(seq));
        assert_eq!(watch.snapshot(), Err(Gone::Closed));
        assert_eq!(sub.watch().snapshot(), Err(Gone::Closed));
        m.advise(libc::MADV_DONTNEED);
        assert!(rx.recv_timeout(Duration::from_millis(200)).is_err());
    });
}

#[test]
fn a_storm_of_signals_changes_nothing() {
    live_both("monitor::a_storm_of_signals_changes_nothing", |prefer| {
        extern "C" fn ignore(_: i32) {}
        // SAFETY: a handler that does nothing, without SA_RESTART, and a timer that fires every 50 us.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut());
            let every = libc::timeval { tv_sec: 0, tv_usec: 50 };
            let timer = libc::itimerval { it_interval: every, it_value: every };
            libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut());
        }
        for _ in 0..5 {
            let m = Memory::touched(PAGE);
            let source = open_ring(prefer, 1 << 20, m.range());
            let (tx, rx) = channel();
            let sub = source.subscribe(m.range(), move |n| _ = tx.send(*n)).unwrap();
            for _ in 0..200 {
                let seq = sub.watch().snapshot().unwrap();
                m.advise(libc::MADV_DONTNEED);
                assert!(sub.watch().changed_since(seq));
                next(&rx);
            }
        }
    });
}

#[test]
fn no_ring_no_callbacks() {
    live("monitor::no_ring_no_callbacks", || {
        let source = KvmSource::open(&Options::default()).unwrap();
        assert_eq!(source.subscribe(Range::ALL, |_| ()).err(), Some(SubscribeError::NoRing));
    });
}
