// SPDX-License-Identifier: MIT OR Apache-2.0
//! Audits on live memory: they speak where the source was silent, and are silent beside everything that it hears.

mod common;

use std::num::NonZeroU32;

use common::memory::{ANON, Memory};
use common::{Cache, DEADLINE, NoNotifier, cache, get, has, has_kvm, has_uffd, kvm_source, see, uffd_source};
use hostmm::capability::Capability;
use hostmm::primary::Source;
use hostmm::testing;
use interleave::{AtomicBool, MaySleep, Ordering, scope};
use mmu_notifier::{Access, PAGE_SIZE};
use userptr::CacheError;
use userptr::cache::Options;

fn audited<S: Source + 'static>(source: S) -> Cache<S> {
    cache(source, Options { audit: NonZeroU32::new(1), ..Options::default() })
}

fn is_stale<T>(result: Result<T, CacheError>, memory: &Memory, page: u64) -> bool {
    let start = memory.page(page).start();
    let page = start..start + PAGE_SIZE;
    matches!(result, Err(CacheError::Stale { range, at }) if range == memory.0 && page.contains(&at))
}

#[test]
fn a_hit_of_memory_that_changed_in_silence_is_refused() {
    if !has(&[Capability::IoUring]) {
        return;
    }
    testing::in_child("a_hit_of_memory_that_changed_in_silence_is_refused", DEADLINE, || {
        let cache = audited(NoNotifier);
        let memory = Memory::stamped(4, 1);
        drop(get(&cache, memory.0).unwrap());
        drop(get(&cache, memory.0).unwrap());
        memory.madvise(memory.page(2), libc::MADV_DONTNEED).unwrap();
        assert!(get(&cache, memory.page(1)).is_ok(), "only what was asked for is looked at");
        assert!(is_stale(get(&cache, memory.0), &memory, 2));
        memory.fill(2);
        assert_eq!(see(&cache, &get(&cache, memory.0).unwrap()), 2, "registered anew");

        memory.madvise(memory.0, libc::MADV_DONTNEED).unwrap();
        let (addr, len) = (memory.0.start() as usize, memory.0.len() as usize);
        assert!(cache.lookup(addr, len, Access::Read).is_none(), "no hit for who cannot be told");
        drop(get(&cache, memory.0).unwrap());
        let range = memory.0;
        memory.unmap();
        let gone = get(&cache, range).map(drop);
        assert!(matches!(gone, Err(CacheError::Stale { at, .. }) if at == range.start()), "{gone:?}");
        let stats = cache.stats().unwrap();
        assert_eq!((stats.audited, stats.audited_stale, stats.unaudited), (5, 3, 0));
        assert_eq!(stats.hits, 2, "what is refused is no hit");
    });
}

/// A page of zeros in the place of a page of zeros.
#[test]
fn old_pages_that_hold_the_same_bytes_are_found_where_the_bytes_are_borrowed() {
    if !has(&[Capability::IoUring]) {
        return;
    }
    let test = "old_pages_that_hold_the_same_bytes_are_found_where_the_bytes_are_borrowed";
    testing::in_child(test, DEADLINE, || {
        let cache = audited(NoNotifier);
        let memory = Memory::map(0, 3, ANON, None).unwrap();
        // SAFETY: the test's own memory, to which there is no other reference while the slice is used.
        let bytes = || unsafe {
            std::slice::from_raw_parts_mut(memory.0.start() as *mut u8, memory.0.len() as usize)
        };
        drop(cache.lease_mut(bytes()).unwrap());
        memory.madvise(memory.page(1), libc::MADV_DONTNEED).unwrap();
        assert!(get(&cache, memory.0).is_ok(), "alike");
        assert!(is_stale(cache.lease_mut(bytes()), &memory, 1));
        drop(cache.lease_mut(bytes()).unwrap());
        drop(cache.lease_mut(bytes()).unwrap());
        assert!(memory.bytes().iter().all(|byte| *byte == 0), "as it was");
        assert_eq!(cache.stats().unwrap().audited_stale, 1);
    });
}

/// Threads write what is audited, and pages come and go.
fn is_silent<S: Source + 'static>(source: S) {
    let cache = audited(source);
    let memory = Memory::stamped(4, 0);
    let stop = AtomicBool::new(false);
    MaySleep::enter(|cx| {
        scope(cx, |threads, _| {
            threads.spawn("writer", |_| {
                let mut n = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    memory.fill(n);
                }
            });
            for round in 0..100 {
                for _ in 0..4 {
                    drop(get(&cache, memory.0).unwrap());
                }
                memory.madvise(memory.page(round % 4), libc::MADV_DONTNEED).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
    let stats = cache.stats().unwrap();
    assert!(stats.audited - stats.unaudited >= 100, "{stats:?}");
    assert_eq!(stats.audited_stale, 0, "{stats:?}");
}

#[test]
fn what_the_source_hears_an_audit_has_no_word_about() {
    let test = "what_the_source_hears_an_audit_has_no_word_about";
    if has_kvm() {
        testing::in_child(&format!("{test}#kvm"), DEADLINE, || is_silent(kvm_source()));
    }
    if has_uffd() {
        testing::in_child(&format!("{test}#uffd"), DEADLINE, || is_silent(uffd_source()));
    }
}

#[test]
fn what_the_program_must_tell_and_does_not_an_audit_finds() {
    if !has_uffd() {
        return;
    }
    testing::in_child("what_the_program_must_tell_and_does_not_an_audit_finds", DEADLINE, || {
        let cache = audited(uffd_source());
        let memory = Memory::stamped(2, 1);
        drop(get(&cache, memory.0).unwrap());
        memory.protect(libc::PROT_NONE);
        assert!(is_stale(get(&cache, memory.0), &memory, 0), "userfaultfd does not tell of mprotect");
    });
}
