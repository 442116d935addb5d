// SPDX-License-Identifier: MIT OR Apache-2.0
//! One scenario under this explorer, shuttle and loom, in one run: `cargo bench -p interleave --bench explore
//! 2>/dev/null` (shuttle tells of each failure), with `-- NAME` for the contenders whose name begins so.
//!
//! All three run on one OS thread, so that what is compared is its CPU time, whatever else the machine does.
//! Contenders take turns. The time to the fault is a mean over 200 seeds for those who choose by chance.
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
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use interleave::explore::{Config, Strategy, explore};
use rustix::time::{ClockId, clock_gettime};

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

/// CPU time of the calling OS thread.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Found,
    Exhausted,
    /// No more schedules within its bound on preemptions.
    Bounded,
    Stopped,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    executions: u64,
    time: Duration,
    end: End,
}

impl Run {
    fn rate(&self) -> f64 {
        self.executions as f64 / self.time.as_secs_f64()
    }
}

/// What one exploration of the scenario comes to.
struct Contender {
    name: String,
    ours: bool,
    /// By seed.
    run: Box<dyn Fn(u64) -> Run + Sync>,
}

fn ours(name: &str, rounds: u64, fault: bool, config: impl Fn(u64) -> Config + Sync + 'static) -> Contender {
    let run = move |seed| {
        let config = config(seed).minimise(0);
        let start = cpu_time();
        let report = explore(&config, |cx| own::scenario(rounds, fault, cx));
        let end = match (report.failures.first(), report.exhausted, report.bound) {
            (Some(_), ..) => End::Found,
            (None, true, None) => End::Exhausted,
            (None, true, Some(_)) => End::Bounded,
            (None, false, _) => End::Stopped,
        };
        Run { executions: report.executions, time: cpu_time() - start, end }
    };
    Contender { name: name.to_owned(), ours: true, run: Box::new(run) }
}

fn with_shuttle<S: shuttle::scheduler::Scheduler + 'static>(
    name: &str,
    rounds: u64,
    fault: bool,
    scheduler: impl Fn(u64) -> S + Sync + 'static,
) -> Contender {
    let run = move |seed| {
        let runs = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&runs);
        let mut config = shuttle::Config::new();
        config.failure_persistence = shuttle::FailurePersistence::None;
        let start = cpu_time();
        let ended = catch_unwind(AssertUnwindSafe(|| {
            shuttle::Runner::new(scheduler(seed), config).run(move || {
                count.fetch_add(1, Ordering::Relaxed);
                with_shuttle::scenario(rounds, fault);
            });
        }));
        let end = if ended.is_err() { End::Found } else { End::Stopped };
        Run { executions: runs.load(Ordering::Relaxed), time: cpu_time() - start, end }
    };
    Contender { name: format!("shuttle {name}"), ours: false, run: Box::new(run) }
}

fn with_loom(name: &str, rounds: u64, fault: bool, bound: Option<usize>, most: Duration) -> Contender {
    let run = move |_| {
        let runs = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&runs);
        let mut model = loom::model::Builder::new();
        model.preemption_bound = bound;
        model.max_duration = Some(most);
        let start = cpu_time();
        let began = std::time::Instant::now();
        let ended = catch_unwind(AssertUnwindSafe(|| {
            model.check(move || {
                count.fetch_add(1, Ordering::Relaxed);
                with_loom::scenario(rounds, fault);
            });
        }));
        let end = match (ended.is_err(), began.elapsed() < most, bound) {
            (true, ..) => End::Found,
            (false, false, _) => End::Stopped,
            (false, true, None) => End::Exhausted,
            (false, true, Some(_)) => End::Bounded,
        };
        Run { executions: runs.load(Ordering::Relaxed), time: cpu_time() - start, end }
    };
    Contender { name: format!("loom{name}"), ours: false, run: Box::new(run) }
}

/// Runs on an OS thread of its own: what a failed run leaves behind in one is not the next one's.
fn alone(contender: &Contender, seed: u64) -> Run {
    std::thread::scope(|s| s.spawn(|| (contender.run)(seed)).join().expect("a contender catches its panics"))
}

/// The median by time of `turns` runs of each, which take turns.
fn medians(contenders: Vec<Contender>, turns: u64) -> Vec<(Contender, Run)> {
    let mut runs: Vec<Vec<Run>> = contenders.iter().map(|_| Vec::new()).collect();
    for turn in 0..turns {
        for (contender, runs) in contenders.iter().zip(&mut runs) {
            runs.push(alone(contender, turn));
        }
    }
    let median = |mut runs: Vec<Run>| {
        runs.sort_by_key(|run| run.time);
        runs[runs.len() / 2]
    };
    contenders.into_iter().zip(runs.into_iter().map(median)).collect()
}

/// The means over seeds; a run that finds nothing ends as such.
fn means(contenders: Vec<Contender>, seeds: u64) -> Vec<(Contender, Run)> {
    let mean = |contender: &Contender| {
        // The machine's moods fall on all alike: seeds outside, contenders inside, would start a thread for each.
        let runs: Vec<Run> = (0..seeds).map(|seed| alone(contender, seed)).collect();
        let missed = runs.iter().filter(|run| run.end != End::Found).count();
        Run {
            executions: runs.iter().map(|run| run.executions).sum::<u64>() / seeds,
            time: runs.iter().map(|run| run.time).sum::<Duration>() / seeds as u32,
            end: if missed == 0 { End::Found } else { End::Stopped },
        }
    };
    contenders
        .into_iter()
        .map(|contender| {
            let run = mean(&contender);
            (contender, run)
        })
        .collect()
}

fn wanted(name: &str) -> bool {
    let mut names = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).peekable();
    names.peek().is_none() || names.any(|wanted| name.starts_with(&wanted))
}

fn asked_for(contenders: Vec<Contender>) -> Vec<Contender> {
    contenders.into_iter().filter(|contender| wanted(&contender.name)).collect()
}

/// Prints the rows, and how many times better the best of ours is than the best of the others by `value`, among those
/// that came to `end`; what an other has not come to in its time counts as if it had just then.
fn print(what: &str, rows: &[(Contender, Run)], end: Option<End>, value: impl Fn(&Run) -> f64) {
    println!("\n{what}");
    for (contender, run) in rows {
        let ended = match run.end {
            End::Found => "found",
            End::Exhausted => "exhausted",
            End::Bounded => "exhausted within the bound",
            End::Stopped => "stopped",
        };
        let Contender { name, .. } = contender;
        let (executions, rate, time) = (run.executions, run.rate(), run.time.as_secs_f64() * 1e3);
        println!("  {name:<26} {executions:>10} {time:>11.3} ms {rate:>10.0}/s  {ended}");
    }
    let best = |ours: bool| {
        let counts = |run: &Run| end.is_none_or(|end| run.end == end || !ours && run.end == End::Stopped);
        let of = rows.iter().filter(|(contender, run)| contender.ours == ours && counts(run));
        of.map(|(contender, run)| (value(run), &contender.name, run.end)).max_by(|a, b| a.0.total_cmp(&b.0))
    };
    if let (Some((mine, name, _)), Some((theirs, other, ended))) = (best(true), best(false)) {
        let least = if end.is_some_and(|end| end != ended) { "at least " } else { "" };
        println!("  {name} beside {other}: {least}{:.1}x", mine / theirs);
    }
}

const TURNS: u64 = 5;
const SEEDS: u64 = 200;

/// Where those stop who would not end in a reasonable time.
const MOST: u64 = 100_000;
const LONGEST: Duration = Duration::from_secs(10);

fn main() {
    use shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler};
    std::panic::set_hook(Box::new(|_| {}));
    let random = |seed, executions| Config::new(Strategy::Random { seed, executions });
    let pct = |seed, executions| Config::new(Strategy::Pct { depth: 3, seed, executions });
    for rounds in [1, 2] {
        println!("\n# {rounds} round(s)");
        let rate = asked_for(vec![
            ours("random", rounds, false, move |seed| random(seed, 50_000)),
            ours("pct 3", rounds, false, move |seed| pct(seed, 50_000)),
            ours("plain", rounds, false, |_| Config::new(Strategy::Plain).max_executions(50_000)),
            with_shuttle("random", rounds, false, |seed| RandomScheduler::new_from_seed(seed, 10_000)),
            with_shuttle("pct 3", rounds, false, |seed| PctScheduler::new_from_seed(seed, 3, 10_000)),
            with_shuttle("dfs", rounds, false, |_| DfsScheduler::new(Some(10_000), false)),
            with_loom(", preemptions 2", rounds, false, Some(2), LONGEST),
        ]);
        print("executions per second", &medians(rate, TURNS), None, Run::rate);
        let exhaust = asked_for(vec![
            ours("plain", rounds, false, |_| Config::new(Strategy::Plain).max_executions(MOST)),
            ours("sleep sets", rounds, false, |_| Config::new(Strategy::Sleep)),
            ours("dpor", rounds, false, |_| Config::new(Strategy::Dpor)),
            ours("value cache, forgetting", rounds, false, |_| Config::new(Strategy::ValueCache)),
        ]);
        let endless = asked_for(vec![
            with_shuttle("dfs", rounds, false, |_| DfsScheduler::new(Some(MOST as usize), false)),
            with_loom("", rounds, false, None, LONGEST),
        ]);
        let faster = |run: &Run| 1.0 / run.time.as_secs_f64();
        let mut rows = medians(exhaust, TURNS);
        rows.extend(medians(endless, 1));
        print("to exhaustion", &rows, Some(End::Exhausted), faster);
        let bounded = asked_for(vec![
            ours("preemptions 2", rounds, false, |_| Config::new(Strategy::Preemptions(2))),
            with_loom(", preemptions 2", rounds, false, Some(2), LONGEST),
        ]);
        print("to exhaustion within two preemptions", &medians(bounded, TURNS), Some(End::Bounded), faster);

        let chance = asked_for(vec![
            ours("random", rounds, true, move |seed| random(seed, 1_000_000)),
            ours("pct 3", rounds, true, move |seed| pct(seed, 1_000_000)),
            with_shuttle("random", rounds, true, |seed| RandomScheduler::new_from_seed(seed, 200_000)),
            with_shuttle("pct 3", rounds, true, |seed| PctScheduler::new_from_seed(seed, 3, 200_000)),
        ]);
        let order = asked_for(vec![
            ours("dpor", rounds, true, |_| Config::new(Strategy::Dpor)),
            ours("preemptions 2 (default)", rounds, true, |_| Config::default()),
            with_loom(", preemptions 2", rounds, true, Some(2), LONGEST),
        ]);
        let endless = asked_for(vec![
            with_shuttle("dfs", rounds, true, |_| DfsScheduler::new(Some(MOST as usize), false)),
            with_loom("", rounds, true, None, LONGEST),
        ]);
        let mut rows = means(chance, SEEDS);
        rows.extend(medians(order, TURNS));
        rows.extend(medians(endless, 1));
        print("to the fault", &rows, Some(End::Found), faster);
    }
}
