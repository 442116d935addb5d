// SPDX-License-Identifier: MIT OR Apache-2.0
//! Failure modes of registration caches, by the number that docs/failure-modes.md has for them: allocators.

mod common;

use std::path::Path;
use std::process::Command;

use common::memory::Memory;
use common::{Cache, DEADLINE, NoNotifier, cache, get, has_kvm, has_uffd, kvm_source, see, uffd_source};
use hostmm::primary::Source;
use hostmm::testing::{self, Guarded};
use hostmm::uffd::{self, UffdSource};
use interleave::{AtomicU64, MaySleep, Ordering, scope};
use mmu_notifier::Access;
use userptr::cache::Options;
use userptr::source::AnonymousUffd;

#[global_allocator]
static ALLOCATOR: Guarded = Guarded;

/// The thread that reads userfaultfd's events holds up whoever changes memory, with whatever lock of the allocator's.
#[test]
fn b6_17_the_monitor_allocates_nothing_for_a_cache() {
    if !has_uffd() {
        return;
    }
    testing::in_child("b6_17_the_monitor_allocates_nothing_for_a_cache", DEADLINE, || {
        let source = UffdSource::open(&uffd::Options::default()).unwrap();
        let monitor = source.monitor_tid().cast_unsigned();
        let cache = cache(AnonymousUffd::new(source).unwrap(), Options { entries: 8, ..Options::default() });
        Guarded::forbid(monitor);
        MaySleep::enter(|cx| {
            scope(cx, |threads, _| {
                for thread in 1..4 {
                    let cache = &cache;
                    threads.spawn("churn", move |_| {
                        for round in 0..200 {
                            let memory = Memory::stamped(2, thread << 32 | round);
                            let lease = get(cache, memory.0).unwrap();
                            assert_eq!(see(cache, &lease), thread << 32 | round);
                            if round % 2 == 0 {
                                memory.unmap();
                            } else {
                                memory.madvise(memory.page(0), libc::MADV_DONTNEED).unwrap();
                            }
                        }
                    });
                }
            });
        });
        Guarded::allow();
        let stats = cache.stats().unwrap();
        assert!(stats.told + stats.stale > 0, "{stats:?}");
    });
}

/// Buffers of all sizes are allocated, looked up and freed by threads. How many the device saw as they once were.
fn stale<S: Source + 'static>(cache: &Cache<S>, rounds: u64) -> u64 {
    let stale = AtomicU64::new(0);
    MaySleep::enter(|cx| {
        scope(cx, |threads, _| {
            for thread in 1..5_u64 {
                let stale = &stale;
                threads.spawn("churn", move |_| {
                    let mut kept: Vec<Vec<u64>> = Vec::new();
                    for round in 0..rounds {
                        let random = interleave::mix(thread, round);
                        let stamp = random | 1;
                        kept.push(vec![stamp; 1 + (random >> 8) as usize % (40 << 10)]);
                        let words = kept.last().unwrap();
                        let addr = words.as_ptr().expose_provenance();
                        let lease = cache.get(addr, 8 * words.len(), Access::Write).unwrap();
                        stale.fetch_add(u64::from(see(cache, &lease) != stamp), Ordering::Relaxed);
                        drop(lease);
                        if kept.len() > 4 {
                            kept.swap_remove(random as usize % 4);
                        }
                    }
                });
            }
        });
    });
    stale.into_inner()
}

/// Runs `test` once more, in a process with this allocator's malloc, which gives back at once what is freed. `true` in
/// that process.
fn under(allocator: &str, test: &str) -> bool {
    if std::env::var("LD_PRELOAD").is_ok_and(|preloaded| preloaded.contains(allocator)) {
        return true;
    }
    let dirs = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"];
    let library = dirs.iter().flat_map(|dir| {
        [".so.2", ".so.2.0", ".so"].map(|suffix| Path::new(dir).join(format!("lib{allocator}{suffix}")))
    });
    let Some(library) = library.into_iter().find(|path| path.exists()) else {
        testing::skip_for(allocator, "its library is not installed");
        return false;
    };
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("LD_PRELOAD", &library)
        .env("MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0")
        .env("MIMALLOC_PURGE_DELAY", "0")
        .status();
    assert!(status.unwrap().success(), "under {}", library.display());
    false
}

fn other_malloc(allocator: &str, test: &str) {
    if !has_kvm() || !has_uffd() || !under(allocator, test) {
        return;
    }
    let few = || Options { entries: 48, ..Options::default() };
    testing::in_child(&format!("{test}#control"), DEADLINE, || {
        assert!(stale(&cache(NoNotifier, few()), 300) > 0, "the control");
    });
    testing::in_child(&format!("{test}#kvm"), DEADLINE, || {
        assert_eq!(stale(&cache(kvm_source(), few()), 500), 0);
    });
    testing::in_child(&format!("{test}#uffd"), DEADLINE, || {
        assert_eq!(stale(&cache(uffd_source(), few()), 500), 0);
    });
}

#[test]
fn b6_03_malloc_get_free_with_jemalloc() {
    other_malloc("jemalloc", "b6_03_malloc_get_free_with_jemalloc");
}

#[test]
fn b6_03_malloc_get_free_with_mimalloc() {
    other_malloc("mimalloc", "b6_03_malloc_get_free_with_mimalloc");
}
