// SPDX-License-Identifier: MIT OR Apache-2.0
//! Failure modes of registration caches, by the number that docs/failure-modes.md has for them: what is limited, and
//! what is held too long.

mod common;

use std::sync::Arc;

use common::memory::{ANON, Memory};
use common::{DEADLINE, cache, eventually, get, has_uffd, kvm_source, over_both, see, uffd_source};
use hostmm::primary::{HostMm, Source};
use hostmm::testing;
use hostmm::uffd::{self, UffdSource};
use mmu_notifier::{Access, PAGE_SIZE, Range};
use userptr::CacheError;
use userptr::cache::{Options, RegistrationCache};
use userptr::device::cpu::Cpu;
use userptr::source::AnonymousUffd;

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

#[test]
fn b6_28_more_regions_than_there_may_be_mappings() {
    if !has_uffd() {
        return;
    }
    testing::in_child("b6_28_more_regions_than_there_may_be_mappings", DEADLINE, || {
        let max: usize =
            std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
        let regions = max.min(100_000);
        let memory = Memory::map(0, 2 * regions as u64, ANON, None).unwrap();
        let (before, options) = (mappings(), Options { entries: 100_000, ..Options::default() });
        let mm = Arc::new(HostMm::new(uffd_source(), 1).unwrap());
        let cache = RegistrationCache::new(mm, Cpu::new(), options).unwrap();
        let cached = |page: Range| cache.get(page.start() as usize, 1, Access::Read).unwrap().is_cached();
        assert!(
            memory.islands().map(cached).filter(|cached| !cached).count() > 0,
            "{max} mappings were enough"
        );
        let stats = cache.stats().unwrap();
        assert!(stats.registered > 1000 && stats.registered + stats.unheard == regions as u64, "{stats:?}");
        assert!(mappings() < max * 3 / 4, "{} of {max} mappings", mappings());
        assert!(cache.warning().unwrap().unwrap().contains("VMAs"));
        cache.invalidate(memory.0.start() as usize, memory.0.len() as usize).unwrap();
        eventually("the mappings are one again", || mappings() < before + 100);
        assert!(memory.islands().take(100).all(cached), "there is room again");
    });
}

#[test]
fn b6_28_what_the_budget_refuses_is_right_all_the_same() {
    if !has_uffd() {
        return;
    }
    testing::in_child("b6_28_what_the_budget_refuses_is_right_all_the_same", DEADLINE, || {
        let options = uffd::Options { vma_budget: Some(20), ..uffd::Options::default() };
        let source = AnonymousUffd::new(UffdSource::open(&options).unwrap()).unwrap();
        let cache = cache(source, Options::default());
        let memory = Memory::map(0, 60, ANON, None).unwrap();
        for round in 1..4 {
            memory.madvise(memory.0, libc::MADV_DONTNEED).unwrap();
            memory.fill(round);
            assert!(memory.islands().all(|page| see(&cache, &get(&cache, page).unwrap()) == round));
            assert!(!get(&cache, memory.page(58)).unwrap().is_cached());
            // The reaper may have it in its hands.
            eventually("what is not cached is let go", || cache.device().pinned_bytes() <= 10 * PAGE_SIZE);
        }
    });
}

#[test]
fn b6_29_a_limit_of_locked_memory() {
    if !has_uffd() {
        return;
    }
    testing::in_child("b6_29_a_limit_of_locked_memory", DEADLINE, || {
        testing::become_nobody();
        let limit = Some(64 * PAGE_SIZE);
        let limits = rustix::process::Rlimit { current: limit, maximum: limit };
        rustix::process::setrlimit(rustix::process::Resource::Memlock, limits).unwrap();
        let cache = cache(uffd_source(), Options::default());
        let memory = Memory::stamped(400, 3);
        for page in 0..40 {
            let part = Range::new(memory.0.start() + page * 10 * PAGE_SIZE, 10 * PAGE_SIZE).unwrap();
            assert_eq!(see(&cache, &get(&cache, part).unwrap()), 3);
        }
        let stats = cache.stats().unwrap();
        assert!(stats.evicted > 20 && stats.failed == 0, "{stats:?}");
        let too_much = get(&cache, memory.0).map(drop);
        assert!(matches!(too_much, Err(CacheError::Device(_))), "{too_much:?}");
    });
}

#[test]
fn b6_30_an_idle_program_does_not_keep_freed_memory_pinned() {
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options::default());
        for _ in 0..3 {
            let memory = Memory::stamped(1000, 1);
            drop(get(&cache, memory.0).unwrap());
            assert!(cache.device().pinned_bytes() >= 1000 * PAGE_SIZE);
            memory.unmap();
            // Nothing is asked of the cache.
            eventually("it is unpinned", || cache.device().pinned_bytes() == 0);
        }
    }
    over_both(
        "b6_30_an_idle_program_does_not_keep_freed_memory_pinned",
        || body(kvm_source()),
        || body(uffd_source()),
    );
}
