// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples, run; the store also beside threads that change memory all the time.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::memory::{ANON, Memory, in_fork, memfd};
use common::{DEADLINE, NoNotifier, has_uffd, uffd_source};
use hostmm::capability::Capability;
use hostmm::primary::{HostMm, Source};
use hostmm::testing;
use interleave::{AtomicBool, AtomicU64, MaySleep, Ordering, scope};
use mmu_notifier::PAGE_SIZE;
use userptr::source;

#[allow(dead_code, reason = "its main is for `cargo run`")]
#[path = "../examples/copy.rs"]
mod copy;
#[allow(dead_code, reason = "its main is for `cargo run`")]
#[path = "../examples/kv.rs"]
mod kv;

#[test]
fn a_file_is_copied() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    testing::in_child("a_file_is_copied", DEADLINE, || {
        let dir = testing::scratch(env!("CARGO_TARGET_TMPDIR"));
        let paths = ["from", "to"].map(|end| dir.join(format!("userptr-copy-{end}-{}", std::process::id())));
        for len in [0, 1, 256 << 10, 1_000_003] {
            let data: Vec<u8> = (0..len).map(|n: u32| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
            std::fs::write(&paths[0], &data).unwrap();
            assert_eq!(copy::copy(&paths[0], &paths[1]).unwrap(), u64::from(len));
            assert!(std::fs::read(&paths[1]).unwrap() == data, "{len} bytes differ");
        }
        paths.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    });
}

/// Bytes that tell the key, the version and the place.
fn value(key: u64, version: u64, len: usize) -> Vec<u8> {
    let seed = interleave::mix(key, version);
    (0..len as u64).map(|n| (seed.rotate_left((n % 64) as u32) ^ n) as u8).collect()
}

/// What a soak has seen.
#[derive(Debug, Default)]
struct Seen {
    /// Values read.
    gets: AtomicU64,
    /// Values that were not what was put.
    wrong: AtomicU64,
    /// Changes of memory that the device was asked about afterwards.
    changes: AtomicU64,
    /// Of these, those after which the device saw the past.
    stale: AtomicU64,
}

fn count(counter: &AtomicU64, is: bool) {
    counter.fetch_add(u64::from(is), Ordering::Relaxed);
}

/// Changes memory that the device knows, in one way after another, as programs do to their own: unmapped, paged out,
/// truncated, copied by fork. The next lease must show what is there then.
fn disturb<S: Source + 'static>(cache: &kv::Cache<S>, seen: &Seen, stop: &AtomicBool) {
    let file = memfd();
    let sees = |memory: &Memory, stamp| {
        count(&seen.changes, true);
        let found = common::get(cache, memory.0).map(|lease| common::see(cache, &lease));
        count(&seen.stale, found.unwrap() != stamp);
    };
    let mut stamp = 1;
    while !stop.load(Ordering::Relaxed) {
        file.set_len(2 * PAGE_SIZE).unwrap();
        let private = Memory::map(0, 16, ANON, None).unwrap();
        let shared = Memory::map(0, 2, libc::MAP_SHARED, Some(&file)).unwrap();
        for memory in [&private, &shared] {
            memory.fill(stamp);
            sees(memory, stamp);
        }
        private.madvise(private.0, libc::MADV_PAGEOUT).unwrap();
        sees(&private, stamp);
        assert!(in_fork(|| true));
        private.fill(stamp + 1);
        sees(&private, stamp + 1);
        file.set_len(0).unwrap();
        file.set_len(2 * PAGE_SIZE).unwrap();
        shared.fill(stamp + 2);
        sees(&shared, stamp + 2);
        stamp += 3;
    }
}

/// Allocates and frees what is of no interest, so that addresses are used again.
fn churn(mut seed: u64, stop: &AtomicBool) {
    let mut kept = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        seed = interleave::mix(seed, 1);
        kept.push(vec![seed as u8; 1 << (8 + seed % 13)]);
        if kept.len() > 64 {
            kept.swap_remove(seed as usize % 64);
        }
    }
}

/// A store is used while other threads allocate and free, and change memory in other ways.
fn serve<S: Source + 'static>(cache: &Arc<kv::Cache<S>>, time: Duration) -> Seen {
    // Values from this size on are mapped and unmapped for each use; by itself glibc would soon keep them.
    // SAFETY: it may be called at any time.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10) };
    let (seen, stop) = (Seen::default(), AtomicBool::new(false));
    MaySleep::enter(|cx| {
        scope(cx, |threads, cx| {
            for n in 0..2_u64 {
                let stop = &stop;
                threads.spawn("churn", move |_| churn(n, stop));
            }
            threads.spawn("disturb", |_| disturb(cache, &seen, &stop));
            let servers: Vec<_> = (0..2_u64)
                .map(|n| {
                    let (cache, seen) = (Arc::clone(cache), &seen);
                    threads.spawn("server", move |_| {
                        let (mut store, start) = (kv::Store::new(memfd(), cache), Instant::now());
                        let (mut model, mut seed) = (BTreeMap::new(), n);
                        while start.elapsed() < time {
                            seed = interleave::mix(seed, 2);
                            let (key, len) = (seed % 50, 1 + (seed >> 8) as usize % (200 << 10));
                            if seed >> 60 < 4 {
                                store.put(&key.to_string(), &value(key, seed, len)).unwrap();
                                model.insert(key, value(key, seed, len));
                            } else {
                                let got = store.get(&key.to_string()).unwrap();
                                count(&seen.wrong, got.as_ref() != model.get(&key));
                                count(&seen.gets, got.is_some());
                            }
                        }
                    })
                })
                .collect();
            servers.into_iter().for_each(|server| server.join(cx).unwrap());
            stop.store(true, Ordering::Relaxed);
        });
    });
    seen
}

/// Pages of this process that are pinned, in kB.
fn vm_pin() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn soak<S: Source + 'static>(open: impl FnOnce() -> Arc<HostMm<S>>, time: Duration) {
    let pinned = vm_pin();
    let cache = kv::cache_of(open()).unwrap();
    let seen = serve(&cache, time);
    let stats = cache.stats().unwrap();
    println!("{time:?}: {seen:?}, {stats:?}");
    assert!(seen.gets.into_inner() > 0 && seen.changes.into_inner() > 0);
    assert_eq!((seen.wrong.into_inner(), seen.stale.into_inner()), (0, 0));
    assert!(stats.registered > 0 && stats.hits > 0 && stats.stale + stats.told > 0, "{stats:?}");
    let Some(cache) = Arc::into_inner(cache) else { panic!("the stores are gone") };
    assert!(cache.device().pinned_bytes() <= stats.bytes);
    drop(cache);
    assert_eq!(vm_pin(), pinned, "a pin was leaked");
}

/// Over the best source, and over userfaultfd: half of the time each.
fn soak_over_each(test: &str, time: Duration) {
    let half = time / 2;
    testing::in_child(test, half + DEADLINE, || soak(|| source::open_mm(1).unwrap(), half));
    if has_uffd() {
        let mm = || Arc::new(HostMm::new(uffd_source(), 1).unwrap());
        testing::in_child(&format!("{test}#uffd"), half + DEADLINE, || soak(mm, half));
    }
}

#[test]
fn a_store_serves_beside_threads_that_churn() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    let test = "a_store_serves_beside_threads_that_churn";
    soak_over_each(test, Duration::from_secs(6));
    testing::in_child(&format!("{test}#control"), DEADLINE, || {
        let mm = Arc::new(HostMm::new(NoNotifier, 1).unwrap());
        let seen = serve(&kv::cache_of(mm).unwrap(), Duration::from_secs(2));
        println!("{seen:?}");
        assert!(seen.wrong.into_inner() > 0 && seen.stale.into_inner() > 0, "the control");
    });
}

/// For CI: `cargo test -p userptr --test examples -- --ignored`; `USERPTR_SOAK_SECONDS=600` for longer.
#[test]
#[ignore = "a minute"]
fn a_store_serves_for_a_minute() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    let seconds = std::env::var("USERPTR_SOAK_SECONDS").map_or(60, |s| s.parse().unwrap());
    soak_over_each("a_store_serves_for_a_minute", Duration::from_secs(seconds));
}
