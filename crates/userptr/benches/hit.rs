// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a hit costs: nanoseconds of CPU time, by source, registrations and threads. `cargo bench -p userptr --bench hit`
//!
//! Each thread goes through the registrations in an order of its own. The device keeps nothing, so that the number is
//! the cache's and the source's alone.
#![expect(clippy::print_stdout, reason = "a benchmark prints")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hostmm::kvm::{self, KvmSource};
use hostmm::primary::{HostMm, Source};
use hostmm::uffd::{self, UffdSource};
use interleave::{AtomicBool, MaySleep, Ordering, scope};
use mmu_notifier::Access;
use userptr::RegistrationCache;
use userptr::cache::Options;
use userptr::device::cpu::Cpu;

const SLICE: Duration = Duration::from_millis(300);
const PAGE: usize = 4096;

type Cache<S> = RegistrationCache<HostMm<S>, Cpu>;

struct Buffers(Vec<u8>);

impl Buffers {
    /// Every other page: registrations that do not touch.
    fn addr(&self, n: usize) -> usize {
        self.0.as_ptr().addr().next_multiple_of(PAGE) + 2 * n * PAGE
    }
}

#[derive(Clone, Copy)]
enum How {
    Strict,
    Ordered,
    Session,
}

fn one<S: Source + 'static>(cache: &Cache<S>, buffers: &Buffers, order: &[u32], how: How) -> f64 {
    let (start, cpu) = (Instant::now(), cpu_time());
    let mut hits = 0_u64;
    'time: loop {
        for batch in order.chunks(64) {
            let session = matches!(how, How::Session).then(|| cache.session().unwrap());
            for n in batch {
                let addr = buffers.addr(*n as usize);
                let lease = match (&session, how) {
                    (Some(session), _) => session.get(addr, PAGE, Access::Write),
                    (None, How::Strict) => cache.get(addr, PAGE, Access::Write),
                    (None, _) => cache.get_ordered(addr, PAGE, Access::Write),
                };
                black_box(lease.unwrap().rights());
            }
            hits += batch.len() as u64;
            if hits.is_multiple_of(1024) && start.elapsed() > SLICE {
                break 'time;
            }
        }
    }
    (cpu_time() - cpu).as_nanos() as f64 / hits as f64
}

/// Of the calling thread: on a shared machine the clock on the wall measures the others.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn measure<S: Source + 'static>(name: &str, cache: &Cache<S>, buffers: &Buffers, entries: usize, how: How) {
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    for threads in [1, threads] {
        let go = AtomicBool::new(false);
        let nanos: Vec<f64> = MaySleep::enter(|cx| {
            scope(cx, |scope, cx| {
                let workers: Vec<_> = (0..threads)
                    .map(|t| {
                        let go = &go;
                        scope.spawn("bench", move |_| {
                            let len = entries.max(1024);
                            let step = 7919 + 2 * t;
                            let order: Vec<u32> = (0..len).map(|n| (n * step % entries) as u32).collect();
                            while !go.load(Ordering::Acquire) {}
                            one(cache, buffers, &order, how)
                        })
                    })
                    .collect();
                go.store(true, Ordering::Release);
                workers.into_iter().map(|w| w.join(cx).unwrap()).collect()
            })
        });
        let mean = nanos.iter().sum::<f64>() / nanos.len() as f64;
        println!("{name:14} {entries:>7} registrations {threads:>3} threads {mean:8.1} ns");
    }
}

fn run<S: Source + 'static>(name: &str, source: S, hows: &[(&str, How)]) {
    let mm = Arc::new(HostMm::new(source, 1).unwrap());
    let most = 100_000;
    for entries in [1, 1000, most] {
        if name == "uffd" && entries > 10_000 {
            continue; // each registration in the middle of a mapping costs two VMAs, of 65,530
        }
        let buffers = Buffers(vec![1; (2 * entries + 1) * PAGE]);
        let options = Options { entries: entries + 64, bytes: 1 << 40, ..Options::default() };
        let cache = RegistrationCache::new(Arc::clone(&mm), Cpu::new(), options).unwrap();
        let start = Instant::now();
        for n in 0..entries {
            drop(cache.get(buffers.addr(n), PAGE, Access::Write).unwrap());
        }
        let miss = start.elapsed().as_nanos() as f64 / entries as f64;
        println!("{name:14} {entries:>7} registrations   1 threads {miss:8.1} ns a miss");
        for (label, how) in hows {
            measure(&format!("{name} {label}"), &cache, &buffers, entries, *how);
        }
        let stats = cache.stats().unwrap();
        println!("{name:14} {} hits, {} found out of date", stats.hits, stats.stale + stats.told);
    }
}

/// What the machine makes of one locked instruction and of one look into a map, on a day like this.
fn yardstick() {
    let counter = interleave::AtomicU64::new(0);
    let map: std::collections::HashMap<usize, usize> = (0..1000).map(|n| (n, n)).collect();
    let of = |f: &dyn Fn(usize)| {
        let (start, rounds) = (cpu_time(), 1_000_000);
        (0..rounds).for_each(f);
        (cpu_time() - start).as_nanos() as f64 / rounds as f64
    };
    let locked = of(&|_| {
        black_box(counter.fetch_add(1, Ordering::SeqCst));
    });
    let looked = of(&|n| {
        black_box(map.get(&(n % 1000)));
    });
    println!("yardstick: a locked add {locked:.1} ns, a look into a HashMap of 1000 {looked:.1} ns");
}

fn main() {
    yardstick();
    match KvmSource::open(&kvm::Options { ring: Some(1 << 20), ..kvm::Options::default() }) {
        Ok(source) => run("kvm", source, &[("strict", How::Strict)]),
        Err(e) => println!("skipped: kvm: {e}"),
    }
    match UffdSource::open(&uffd::Options::default()) {
        Ok(source) => run(
            "uffd",
            source,
            &[("strict", How::Strict), ("ordered", How::Ordered), ("session/64", How::Session)],
        ),
        Err(e) => println!("skipped: uffd: {e}"),
    }
}
