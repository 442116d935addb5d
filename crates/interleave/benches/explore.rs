// SPDX-License-Identifier: MIT OR Apache-2.0
//! One scenario under this explorer, shuttle and loom, in one run: `cargo bench -p interleave --bench explore`, with
//! `-- NAME` for the rows whose name begins so.
//!
//! An mm thread unmaps (sequence, notifier callback under the driver's lock, page table, free) and faults again; a
//! binder reads the sequence, gets the page, checks the sequence and installs the page; a device uses what is
//! installed and asserts that it is live. The fault: the sequence is checked before the driver's lock is taken.
#![expect(
    clippy::disallowed_types,
    clippy::print_stdout,
    reason = "the other checkers' types; the table is the output"
)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use interleave::explore::{Config, Strategy, explore};

mod own {
    use interleave::{AtomicU64, Digest, LockClass, MaySleep, Mutex, Ordering, RwLock, SpinLock, explore};

    static MMAP_LOCK: LockClass = LockClass::new("mmap_lock");
    static PTL: LockClass = LockClass::new("ptl");
    static DRIVER: LockClass = LockClass::new("driver_lock");
    static FRAMES: LockClass = LockClass::new("frames");

    struct World {
        mmap_lock: RwLock<()>,
        pte: SpinLock<Option<u64>>,
        mapping: Mutex<Option<u64>>,
        live: SpinLock<u64>,
        seq: AtomicU64,
    }

    fn mm(w: &World, rounds: u64, cx: &mut MaySleep<'_>) {
        for round in 0..rounds {
            {
                let _write = w.mmap_lock.write(cx);
                w.seq.fetch_add(1, Ordering::SeqCst);
                *w.mapping.lock(cx) = None;
                let old = w.pte.lock(cx).take();
                if let Some(frame) = old {
                    *w.live.lock(cx) &= !(1 << frame);
                }
                w.seq.fetch_add(1, Ordering::SeqCst);
            }
            let _read = w.mmap_lock.read(cx);
            *w.live.lock(cx) |= 2 << round;
            *w.pte.lock(cx) = Some(round + 1);
            drop(_read);
            explore::forget();
        }
    }

    fn binder(w: &World, rounds: u64, fault: bool, cx: &mut MaySleep<'_>) {
        for _ in 0..rounds {
            let seq = w.seq.load(Ordering::SeqCst);
            let page = {
                let _read = w.mmap_lock.read(cx);
                *w.pte.lock(cx)
            };
            let valid = |w: &World| seq & 1 == 0 && w.seq.load(Ordering::SeqCst) == seq;
            if fault {
                if valid(w) {
                    *w.mapping.lock(cx) = page;
                }
            } else {
                let mut mapping = w.mapping.lock(cx);
                if valid(w) {
                    *mapping = page;
                }
            }
            explore::forget();
        }
    }

    fn device(w: &World, rounds: u64, cx: &mut MaySleep<'_>) {
        for _ in 0..rounds {
            let mapping = w.mapping.lock(cx);
            if let Some(frame) = *mapping {
                assert!(*w.live.lock(cx) & (1 << frame) != 0, "the device uses a frame that is free");
            }
            drop(mapping);
            explore::forget();
        }
    }

    pub(crate) fn scenario(rounds: u64, fault: bool, cx: &mut MaySleep<'_>) {
        let digest = |v: &Option<u64>| v.digest();
        let w = World {
            mmap_lock: RwLock::with_digest(&MMAP_LOCK, (), Digest::digest),
            pte: SpinLock::with_digest(&PTL, Some(0), digest),
            mapping: Mutex::with_digest(&DRIVER, None, digest),
            live: SpinLock::with_digest(&FRAMES, 1, Digest::digest),
            seq: AtomicU64::new(0),
        };
        interleave::scope(cx, |s, _| {
            s.spawn("mm", |cx| mm(&w, rounds, cx));
            s.spawn("binder", |cx| binder(&w, rounds, fault, cx));
            s.spawn("device", |cx| device(&w, rounds, cx));
        });
    }
}

/// The same text with the types of another checker.
macro_rules! other {
    ($module:ident, $name:ident) => {
        mod $module {
            use $name::sync::atomic::{AtomicU64, Ordering};
            use $name::sync::{Arc, Mutex, RwLock};
            use $name::thread;

            struct World {
                mmap_lock: RwLock<()>,
                pte: Mutex<Option<u64>>,
                mapping: Mutex<Option<u64>>,
                live: Mutex<u64>,
                seq: AtomicU64,
            }

            fn mm(w: &World, rounds: u64) {
                for round in 0..rounds {
                    {
                        let _write = w.mmap_lock.write().unwrap();
                        w.seq.fetch_add(1, Ordering::SeqCst);
                        *w.mapping.lock().unwrap() = None;
                        let old = w.pte.lock().unwrap().take();
                        if let Some(frame) = old {
                            *w.live.lock().unwrap() &= !(1 << frame);
                        }
                        w.seq.fetch_add(1, Ordering::SeqCst);
                    }
                    let _read = w.mmap_lock.read().unwrap();
                    *w.live.lock().unwrap() |= 2 << round;
                    *w.pte.lock().unwrap() = Some(round + 1);
                }
            }

            fn binder(w: &World, rounds: u64, fault: bool) {
                for _ in 0..rounds {
                    let seq = w.seq.load(Ordering::SeqCst);
                    let page = {
                        let _read = w.mmap_lock.read().unwrap();
                        *w.pte.lock().unwrap()
                    };
                    let valid = |w: &World| seq & 1 == 0 && w.seq.load(Ordering::SeqCst) == seq;
                    if fault {
                        if valid(w) {
                            *w.mapping.lock().unwrap() = page;
                        }
                    } else {
                        let mut mapping = w.mapping.lock().unwrap();
                        if valid(w) {
                            *mapping = page;
                        }
                    }
                }
            }

            fn device(w: &World, rounds: u64) {
                for _ in 0..rounds {
                    let mapping = w.mapping.lock().unwrap();
                    if let Some(frame) = *mapping {
                        let live = *w.live.lock().unwrap();
                        assert!(live & (1 << frame) != 0, "the device uses a frame that is free");
                    }
                }
            }

            pub(crate) fn scenario(rounds: u64, fault: bool) {
                let w = Arc::new(World {
                    mmap_lock: RwLock::new(()),
                    pte: Mutex::new(Some(0)),
                    mapping: Mutex::new(None),
                    live: Mutex::new(1),
                    seq: AtomicU64::new(0),
                });
                let (a, b, c) = (Arc::clone(&w), Arc::clone(&w), w);
                let threads = [
                    thread::spawn(move || mm(&a, rounds)),
                    thread::spawn(move || binder(&b, rounds, fault)),
                    thread::spawn(move || device(&c, rounds)),
                ];
                for thread in threads {
                    thread.join().unwrap();
                }
            }
        }
    };
}

other!(with_shuttle, shuttle);
other!(with_loom, loom);

fn row(name: &str, executions: u64, time: Duration, end: &str) {
    let rate = executions as f64 / time.as_secs_f64();
    println!("{name:<34} {executions:>12} {:>10.2} ms {rate:>12.0}/s  {end}", time.as_secs_f64() * 1e3);
}

/// Whether the row is asked for.
fn wanted(name: &str) -> bool {
    let mut names = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).peekable();
    names.peek().is_none() || names.any(|wanted| name.starts_with(&wanted))
}

fn ours(name: &str, config: Config, rounds: u64, fault: bool) {
    if !wanted(name) {
        return;
    }
    let report = explore(&config.minimise(0), |cx| own::scenario(rounds, fault, cx));
    let end = match (&report.failures.first(), report.exhausted, report.bound) {
        (Some(_), ..) => "found",
        (None, true, None) => "exhausted",
        (None, true, Some(_)) => "exhausted within the bound",
        (None, false, _) => "stopped",
    };
    row(name, report.executions, report.elapsed, end);
}

fn shuttle_run(
    name: &str,
    scheduler: impl shuttle::scheduler::Scheduler + 'static,
    rounds: u64,
    fault: bool,
) {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    if !wanted(name) {
        return;
    }
    let runs = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&runs);
    let mut config = shuttle::Config::new();
    config.failure_persistence = shuttle::FailurePersistence::None;
    let start = Instant::now();
    let ended = catch_unwind(AssertUnwindSafe(|| {
        shuttle::Runner::new(scheduler, config).run(move || {
            count.fetch_add(1, Ordering::Relaxed);
            with_shuttle::scenario(rounds, fault);
        });
    }));
    row(
        name,
        runs.load(Ordering::Relaxed),
        start.elapsed(),
        if ended.is_err() { "found" } else { "stopped" },
    );
}

fn loom_run(name: &str, bound: Option<usize>, most: Duration, rounds: u64, fault: bool) {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    if !wanted(name) {
        return;
    }
    let runs = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&runs);
    let mut model = loom::model::Builder::new();
    model.preemption_bound = bound;
    model.max_duration = Some(most);
    let start = Instant::now();
    let ended = catch_unwind(AssertUnwindSafe(|| {
        model.check(move || {
            count.fetch_add(1, Ordering::Relaxed);
            with_loom::scenario(rounds, fault);
        });
    }));
    let time = start.elapsed();
    let end = if ended.is_err() {
        "found"
    } else if time < most {
        "exhausted"
    } else {
        "stopped"
    };
    row(name, runs.load(Ordering::Relaxed), time, end);
}

fn main() {
    std::panic::set_hook(Box::new(|_| {}));
    const N: u64 = 200_000;
    let random = |seed| Strategy::Random { seed, executions: N };
    let pct = |seed| Strategy::Pct { depth: 3, seed, executions: N };
    for rounds in [1, 2] {
        println!("\n{rounds} round(s), no fault: executions, time, rate");
        ours("random", Config::new(random(1)), rounds, false);
        ours("pct 3", Config::new(pct(1)), rounds, false);
        shuttle_run(
            "shuttle random",
            shuttle::scheduler::RandomScheduler::new_from_seed(1, 50_000),
            rounds,
            false,
        );
        shuttle_run(
            "shuttle pct 3",
            shuttle::scheduler::PctScheduler::new_from_seed(1, 3, 50_000),
            rounds,
            false,
        );
        ours("plain", Config::new(Strategy::Plain).max_executions(5_000_000), rounds, false);
        ours("sleep sets", Config::new(Strategy::Sleep), rounds, false);
        ours("dpor", Config::new(Strategy::Dpor), rounds, false);
        ours("value cache, forgetting", Config::new(Strategy::ValueCache), rounds, false);
        ours("preemptions 2", Config::new(Strategy::Preemptions(2)), rounds, false);
        shuttle_run(
            "shuttle dfs",
            shuttle::scheduler::DfsScheduler::new(Some(500_000), false),
            rounds,
            false,
        );
        loom_run("loom", None, Duration::from_secs(10), rounds, false);
        loom_run("loom, preemptions 2", Some(2), Duration::from_secs(10), rounds, false);
        println!("{rounds} round(s), with the fault: executions and time to find it");
        ours("random", Config::new(random(1)), rounds, true);
        ours("pct 3", Config::new(pct(1)), rounds, true);
        ours("dpor", Config::new(Strategy::Dpor), rounds, true);
        ours("preemptions 2", Config::new(Strategy::Preemptions(2)), rounds, true);
        shuttle_run(
            "shuttle random",
            shuttle::scheduler::RandomScheduler::new_from_seed(1, 200_000),
            rounds,
            true,
        );
        shuttle_run(
            "shuttle pct 3",
            shuttle::scheduler::PctScheduler::new_from_seed(1, 3, 200_000),
            rounds,
            true,
        );
        loom_run("loom", None, Duration::from_secs(20), rounds, true);
    }
}
