// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples, run; the store also beside threads that change memory all the time.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hostmm::capability::Capability;
use hostmm::testing;
use interleave::{AtomicBool, MaySleep, Ordering, scope};

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

/// A store is used while other threads allocate, free, and map and unmap whatever the allocator does by it.
fn serve(time: Duration) {
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
}

#[test]
fn a_store_serves_beside_threads_that_churn() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    testing::in_child("a_store_serves_beside_threads_that_churn", DEADLINE, || serve(Duration::from_secs(3)));
}

/// For CI: `cargo test -p userptr --test examples -- --ignored`
#[test]
#[ignore = "a minute"]
fn a_store_serves_for_a_minute() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    testing::in_child("a_store_serves_for_a_minute", DEADLINE, || serve(Duration::from_secs(60)));
}
