// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples, run; the store also beside threads that change memory all the time.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::memory::{ANON, Memory, in_fork};
use hostmm::capability::Capability;
use hostmm::testing;
use interleave::{AtomicBool, MaySleep, Ordering, scope};
use mmu_notifier::{Access, PAGE_SIZE};

#[allow(dead_code, reason = "its main is for `cargo run`")]
#[path = "../examples/copy.rs"]
mod copy;
#[allow(dead_code, reason = "its main is for `cargo run`")]
#[path = "../examples/kv.rs"]
mod kv;

const DEADLINE: Duration = Duration::from_secs(120);

fn memfd() -> File {
    File::from(rustix::fs::memfd_create("values", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

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

/// Changes memory that the device knows, in one way after another, as programs do to their own: unmapped, paged out,
/// truncated, copied by fork. The next lease must show what is there then.
fn disturb(cache: &kv::Cache, stop: &AtomicBool) {
    let file = memfd();
    let get = |memory: &Memory| {
        let (addr, len) = (memory.0.start() as usize, memory.0.len() as usize);
        cache.get(addr, len, Access::Write).unwrap()
    };
    let sees = |memory: &Memory, stamp| {
        let seen = memfd();
        cache.device().write_at(&seen, 0, &get(memory)).unwrap();
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&seen, &mut bytes, 0).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), stamp, "a stale page");
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

/// Pages of this process that are pinned, in kB.
fn vm_pin() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A store is used while other threads allocate and free, and change memory in other ways.
fn serve(time: Duration) {
    let pinned = vm_pin();
    let cache = kv::open_cache().unwrap();
    let stop = AtomicBool::new(false);
    MaySleep::enter(|cx| {
        scope(cx, |threads, cx| {
            for n in 0..2_u64 {
                let stop = &stop;
                threads.spawn("churn", move |_| {
                    let (mut kept, mut seed) = (Vec::new(), n);
                    while !stop.load(Ordering::Relaxed) {
                        seed = interleave::mix(seed, 1);
                        kept.push(vec![seed as u8; 1 << (8 + seed % 13)]);
                        if kept.len() > 64 {
                            kept.swap_remove(seed as usize % 64);
                        }
                    }
                });
            }
            threads.spawn("disturb", |_| disturb(&cache, &stop));
            let servers: Vec<_> = (0..2_u64)
                .map(|n| {
                    let cache = Arc::clone(&cache);
                    threads.spawn("server", move |_| {
                        let (mut store, start) = (kv::Store::new(memfd(), cache), Instant::now());
                        let (mut model, mut seed, mut gets) = (BTreeMap::new(), n, 0);
                        while start.elapsed() < time {
                            seed = interleave::mix(seed, 2);
                            let (key, len) = (seed % 50, 1 + (seed >> 8) as usize % (200 << 10));
                            if seed >> 60 < 4 {
                                store.put(&key.to_string(), &value(key, seed, len)).unwrap();
                                model.insert(key, value(key, seed, len));
                            } else {
                                let got = store.get(&key.to_string()).unwrap();
                                assert!(got.as_ref() == model.get(&key), "key {key} is not what was put");
                                gets += u32::from(got.is_some());
                            }
                        }
                        gets
                    })
                })
                .collect();
            let gets: u32 = servers.into_iter().map(|server| server.join(cx).unwrap()).sum();
            stop.store(true, Ordering::Relaxed);
            assert!(gets > 0);
        });
    });
    let stats = cache.stats().unwrap();
    assert!(stats.registered > 0 && stats.hits > 0 && stats.stale + stats.told > 0, "{stats:?}");
    let Some(cache) = Arc::into_inner(cache) else { panic!("the stores are gone") };
    assert!(cache.device().pinned_bytes() <= stats.bytes);
    drop(cache);
    assert_eq!(vm_pin(), pinned, "a pin was leaked");
}

#[test]
fn a_store_serves_beside_threads_that_churn() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    testing::in_child("a_store_serves_beside_threads_that_churn", DEADLINE, || serve(Duration::from_secs(3)));
}

/// For CI: `cargo test -p userptr --test examples -- --ignored`; `USERPTR_SOAK_SECONDS=600` for longer.
#[test]
#[ignore = "a minute"]
fn a_store_serves_for_a_minute() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    let seconds = std::env::var("USERPTR_SOAK_SECONDS").map_or(60, |s| s.parse().unwrap());
    let deadline = Duration::from_secs(seconds) + DEADLINE;
    testing::in_child("a_store_serves_for_a_minute", deadline, || serve(Duration::from_secs(seconds)));
}
