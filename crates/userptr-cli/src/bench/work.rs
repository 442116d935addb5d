// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is measured of a cache, one turn at a time. Runs in the process of that cache alone.
//!
//! A lookup is measured in CPU time of its thread: on a shared machine the clock on the wall measures the others. What
//! waits for another thread (an unmapping system call, userfaultfd's reader) is measured on the wall, as a median.

use std::cell::Cell;
use std::time::{Duration, Instant};

use hostmm::peer::Anonymous;
use hostmm::race;
use interleave::{AtomicBool, AtomicUsize, MaySleep, Ordering, scope, yield_now};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

use super::contestant::{Contestant, How, PAGE, Raced};

/// Lookups that share a question, and after which the clock is looked at.
const BATCH: usize = 64;
/// Bytes that the churning allocator is asked for: above glibc's threshold for a mapping of its own.
const CHUNK: usize = 256 << 10;

/// One turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Turn {
    /// Forget the memory of before and register so many pages, one by one. Nanoseconds a miss.
    Fill(usize),
    /// Hits. Nanoseconds each.
    Hit { how: How, threads: usize, millis: u64 },
    /// munmap of one touched page. Nanoseconds.
    Unmap { registered: bool, rounds: usize },
    /// The race of malloc, get and free. Nanoseconds a round.
    Churn { threads: usize, rounds: u64 },
    /// As `Hit` by one thread, while another allocates and frees.
    HitUnderAllocator { how: How, millis: u64 },
    /// Map, touch and unmap so many pages at full speed; from [`WIDE`] on they are not touched. Nanoseconds a round.
    Storm { millis: u64, pages: usize },
}

/// Pages of a change that a source counts otherwise than a few: 8 MiB.
pub(super) const WIDE: usize = 2048;

/// How it went.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) nanos: f64,
    /// Lookups.
    pub(super) lookups: u64,
    /// Of these, those that registered anew.
    pub(super) missed: u64,
    /// Of these, those that found a registration of other memory.
    pub(super) stale: u64,
}

/// A contestant and the memory that it has registered.
pub(super) struct Bench<C> {
    pub(super) contestant: C,
    memory: Option<(Anonymous, usize)>,
    /// All contestants run on the same: thread `n` on the `n`th.
    cpus: CpuSet,
}

impl<C: Contestant> Bench<C> {
    pub(super) fn new(contestant: C) -> Bench<C> {
        let cpus = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
        Bench { contestant, memory: None, cpus }
    }

    pub(super) fn run(&mut self, turn: &Turn) -> Result<Measured, String> {
        if let Turn::Fill(pages) = *turn {
            self.memory = None;
            self.contestant.make_room(pages)?;
        }
        let before = Cell::new(self.contestant.registered());
        let mut measured = match *turn {
            Turn::Fill(pages) => self.fill(pages)?,
            Turn::Hit { how, threads, millis } => self.hit(how, threads, millis, false, &before)?,
            Turn::HitUnderAllocator { how, millis } => self.hit(how, 1, millis, true, &before)?,
            Turn::Unmap { registered, rounds } => self.unmap(registered, rounds)?,
            Turn::Churn { threads, rounds } => self.churn(threads, rounds)?,
            Turn::Storm { millis, pages } => storm(millis, pages)?,
        };
        measured.missed = self.contestant.registered() - before.get();
        Ok(measured)
    }

    fn fill(&mut self, pages: usize) -> Result<Measured, String> {
        let memory = Anonymous::new(pages).map_err(|e| format!("mmap: {e}"))?;
        let cpu = cpu_time();
        for n in 0..pages {
            if self.contestant.hits(memory.page(n), PAGE)? {
                return Err(format!("page {n} of new memory is registered already: stale"));
            }
        }
        let nanos = (cpu_time() - cpu).as_nanos() as f64 / pages as f64;
        self.memory = Some((memory, pages));
        Ok(Measured { nanos, lookups: pages as u64, ..Measured::default() })
    }

    /// `before`: registrations made until the clock runs.
    fn hit(
        &self,
        how: How,
        threads: usize,
        millis: u64,
        allocate: bool,
        before: &Cell<u64>,
    ) -> Result<Measured, String> {
        let Some((memory, pages)) = &self.memory else { return Err("nothing is registered".into()) };
        let (contestant, cpus, slice) = (&self.contestant, &self.cpus, Duration::from_millis(millis));
        let (go, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        let ready = AtomicUsize::new(0);
        let done: Result<Vec<(Duration, u64)>, String> = MaySleep::enter(|cx| {
            scope(cx, |scope, cx| {
                if allocate {
                    scope.spawn("bench-allocator", |_| {
                        pin_to(cpus, 1);
                        while !stop.load(Ordering::Relaxed) {
                            allocate_and_free();
                        }
                    });
                }
                let workers: Vec<_> = (0..threads)
                    .map(|t| {
                        let (go, ready) = (&go, &ready);
                        scope.spawn("bench-hit", move |_| {
                            pin_to(cpus, t);
                            let len = (*pages).max(1024).next_multiple_of(BATCH);
                            let mut order: Vec<usize> = (0..len).map(|n| memory.page(n % pages)).collect();
                            shuffle(&mut order, t);
                            // What was taken for changed since (the thread's own stack was mapped just now) is registered
                            // again before the clock runs.
                            let warm =
                                order.chunks(BATCH).try_for_each(|batch| contestant.look_up(how, batch));
                            ready.fetch_add(1, Ordering::Release);
                            warm?;
                            while !go.load(Ordering::Acquire) {
                                yield_now();
                            }
                            let (start, cpu, mut hits) = (Instant::now(), cpu_time(), 0);
                            loop {
                                for batch in order.chunks(BATCH) {
                                    contestant.look_up(how, batch)?;
                                    hits += batch.len() as u64;
                                    if hits.is_multiple_of(1024) && start.elapsed() > slice {
                                        return Ok((cpu_time() - cpu, hits));
                                    }
                                }
                            }
                        })
                    })
                    .collect();
                while ready.load(Ordering::Acquire) < threads {
                    yield_now();
                }
                before.set(contestant.registered());
                go.store(true, Ordering::Release);
                let ends: Vec<_> = workers.into_iter().map(|worker| worker.join(cx)).collect();
                stop.store(true, Ordering::Relaxed);
                ends.into_iter().map(|end| end.map_err(|e| e.to_string())?).collect()
            })
        });
        let done = done?;
        let each = done.iter().map(|(cpu, hits)| cpu.as_nanos() as f64 / *hits as f64);
        Ok(Measured {
            nanos: each.sum::<f64>() / done.len() as f64,
            lookups: done.iter().map(|(_, hits)| hits).sum(),
            ..Measured::default()
        })
    }

    fn unmap(&self, registered: bool, rounds: usize) -> Result<Measured, String> {
        pin_to(&self.cpus, 0);
        let mut nanos = Vec::with_capacity(rounds);
        let mut stale = 0;
        for _ in 0..rounds {
            let memory = Anonymous::new(1).map_err(|e| format!("mmap: {e}"))?;
            memory.touch();
            if registered {
                stale += u64::from(self.contestant.hits(memory.page(0), PAGE)?);
            }
            let start = Instant::now();
            drop(memory);
            nanos.push(start.elapsed().as_nanos() as f64);
        }
        let _ = sched_setaffinity(None, &self.cpus);
        Ok(Measured { nanos: super::report::median(&mut nanos), lookups: rounds as u64, stale, missed: 0 })
    }

    fn churn(&self, threads: usize, rounds: u64) -> Result<Measured, String> {
        let outcome = race::churn(&Raced(&self.contestant), threads, rounds).map_err(|e| e.to_string())?;
        Ok(Measured {
            nanos: outcome.elapsed.as_nanos() as f64 / outcome.rounds.max(1) as f64,
            lookups: outcome.lookups,
            stale: outcome.stale,
            missed: 0,
        })
    }
}

/// An order of its own for each thread, which no prefetcher guesses.
fn shuffle(order: &mut [usize], thread: usize) {
    let mut state = 0x9e37_79b9_7f4a_7c15 + thread as u64;
    for last in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state % (last as u64 + 1)) as usize);
    }
}

/// What a program does that has nothing to do with the cache.
fn allocate_and_free() {
    let mut chunk: Vec<u8> = Vec::with_capacity(CHUNK);
    chunk.push(1);
    std::hint::black_box(chunk.as_ptr());
}

fn storm(millis: u64, pages: usize) -> Result<Measured, String> {
    let (start, mut rounds) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(millis) {
        let memory = Anonymous::new(pages).map_err(|e| format!("mmap: {e}"))?;
        if pages < WIDE {
            memory.touch();
        }
        rounds += 1;
    }
    let nanos = start.elapsed().as_nanos() as f64 / rounds as f64;
    Ok(Measured { nanos, ..Measured::default() })
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The `n`th of the CPUs, counted around, for the calling thread. Where it is not allowed the numbers are a little worse.
fn pin_to(cpus: &CpuSet, n: usize) {
    let mine: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| cpus.is_set(*cpu)).collect();
    let mut one = CpuSet::new();
    if let Some(cpu) = mine.get(n % mine.len().max(1)) {
        one.set(*cpu);
        let _ = sched_setaffinity(None, &one);
    }
}
