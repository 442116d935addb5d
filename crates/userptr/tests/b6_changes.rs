// SPDX-License-Identifier: MIT OR Apache-2.0
//! Failure modes of registration caches, by the number that docs/failure-modes.md has for them: memory that is changed
//! in every way, with what the device then sees as the oracle. The control is the same cache over a source that never
//! reports: it must be stale where the event is declared to be so.

mod common;

use common::memory::{ANON, Memory, memfd};
use common::{
    Cache, DEADLINE, NoNotifier, Raced, cache, eventually, get, has, has_kvm, has_uffd, kvm_source, see,
    uffd_source,
};
use hostmm::capability::Capability;
use hostmm::disturb::{After, Arena, Change, DisturbError, Event, Outcome, catalogue};
use hostmm::primary::Source;
use hostmm::{race, testing};
use mmu_notifier::PAGE_SIZE;
use userptr::cache::Options;

/// How a device fares at its next use of the page.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Right,
    Stale,
    Refused,
}

/// `told`: the program says by itself that it changed its memory.
fn after<S: Source + 'static>(
    cache: &Cache<S>,
    event: &Event,
    arena: &mut Arena,
    told: bool,
) -> Option<Found> {
    if let Some(why) = event.needs.iter().find_map(|need| need.missing(arena)) {
        testing::skip_for("event", &format!("{}: {why}", event.name));
        return None;
    }
    let mut scene = match event.setup(arena) {
        // The allocator has grown the heap meanwhile.
        Err(DisturbError::BreakMoved { .. }) => return None,
        scene => scene.unwrap(),
    };
    let watched = scene.watched();
    let lease = match get(cache, watched) {
        Ok(lease) => lease,
        Err(e) => {
            assert_eq!(event.expect.pinned, Outcome::NotMappable, "{}: {e}", event.name);
            return None;
        }
    };
    assert_eq!(see(cache, &lease), scene.before(), "{}", event.name);
    drop(lease);
    match scene.disturb(&mut || ()) {
        Ok(Change::Happened) => {}
        Ok(Change::Refused) | Err(DisturbError::Timeout { .. } | DisturbError::BreakMoved { .. }) => {
            return None;
        }
        Err(e) => panic!("{}: {e}", event.name),
    }
    if told {
        cache.invalidate(watched.start() as usize, watched.len() as usize).unwrap();
    }
    Some(match (get(cache, watched), scene.after()) {
        (Err(_), After::Faults) => Found::Refused,
        (Ok(lease), After::Stamp(stamp)) if see(cache, &lease) == stamp => Found::Right,
        (Ok(_), _) => Found::Stale,
        (Err(e), After::Stamp(_)) => panic!("{}: {e}", event.name),
    })
}

/// The events whose names begin so.
fn events(names: &'static [&'static str]) -> impl Iterator<Item = &'static Event> {
    catalogue().into_iter().filter(|e| names.iter().any(|name| e.name.starts_with(name)))
}

/// One cache that lives through all the events, as a program's does. How many happened.
fn stays_right<S: Source + 'static>(source: S, names: &'static [&'static str], told: bool) -> u32 {
    let mut arena = Arena::new(testing::scratch(env!("CARGO_TARGET_TMPDIR")));
    let cache = cache(source, Options::default());
    let mut happened = 0;
    for event in events(names) {
        let Some(found) = after(&cache, event, &mut arena, told) else { continue };
        assert_ne!(found, Found::Stale, "{}", event.name);
        happened += 1;
    }
    happened
}

/// Without a notifier each event is stale that is declared to be so. Whether any was.
fn control(names: &'static [&'static str]) -> bool {
    let mut arena = Arena::new(testing::scratch(env!("CARGO_TARGET_TMPDIR")));
    let mut stale = false;
    for event in events(names) {
        let cache = cache(NoNotifier, Options::default());
        let Some(found) = after(&cache, event, &mut arena, false) else { continue };
        assert_eq!(found == Found::Stale, event.expect.pinned.is_stale(), "{}: {found:?}", event.name);
        stale |= found == Found::Stale;
    }
    stale
}

/// How userfaultfd comes by the news.
#[derive(PartialEq)]
enum Uffd {
    Hears,
    /// It is right because such memory is never cached.
    NeverCached,
    /// The program must say so.
    IsTold,
}

fn changes(test: &str, names: &'static [&'static str], uffd: Uffd) {
    if !has_kvm() || !has_uffd() {
        return;
    }
    testing::in_child(test, DEADLINE, || {
        assert!(control(names), "the control never was stale, so these events show nothing");
        assert!(stays_right(kvm_source(), names, false) > 0);
        assert!(stays_right(uffd_source(), names, uffd == Uffd::IsTold) > 0);
    });
}

#[test]
fn b6_04_raw_system_calls() {
    changes(
        "b6_04_raw_system_calls",
        &["munmap/raw", "munmap_mmap/raw", "munmap_mmap_other_thread/raw"],
        Uffd::Hears,
    );
}

#[test]
fn b6_05_free_and_brk() {
    changes("b6_05_free_and_brk", &["free_large", "brk"], Uffd::Hears);
}

#[test]
fn b6_06_mapped_over() {
    changes("b6_06_mapped_over", &["map_fixed"], Uffd::Hears);
}

#[test]
fn b6_07_mremap() {
    changes("b6_07_mremap", &["mremap"], Uffd::Hears);
}

#[test]
fn b6_08_madvise() {
    let names = &["madv_dontneed", "process_madvise", "madv_free", "madv_remove", "thp_split_dontneed"];
    changes("b6_08_madvise", names, Uffd::Hears);
}

#[test]
fn b6_10_what_userfaultfd_does_not_tell_of_private_memory_the_program_must() {
    let test = "b6_10_what_userfaultfd_does_not_tell_of_private_memory_the_program_must";
    changes(test, &["madv_guard_install", "mprotect_none"], Uffd::IsTold);
}

#[test]
fn b6_10_system_v_and_nonlinear_mappings() {
    let names = &["shmdt_shmat", "shm_remap", "remap_file_pages"];
    changes("b6_10_system_v_and_nonlinear_mappings", names, Uffd::NeverCached);
}

#[test]
fn b6_11_truncated_and_punched_also_by_another_process() {
    let test = "b6_11_truncated_and_punched_also_by_another_process";
    changes(test, &["truncate", "punch_hole"], Uffd::NeverCached);
}

#[test]
fn b6_10_over_userfaultfd_what_is_shared_or_of_a_file_is_never_cached() {
    if !has_uffd() {
        return;
    }
    testing::in_child("b6_10_over_userfaultfd_what_is_shared_or_of_a_file_is_never_cached", DEADLINE, || {
        let cache = cache(uffd_source(), Options::default());
        let file = memfd();
        file.set_len(PAGE_SIZE).unwrap();
        let kinds = [
            (ANON, None, true),
            (libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, false),
            (libc::MAP_SHARED, Some(&file), false),
            (libc::MAP_PRIVATE, Some(&file), false),
        ];
        let mut memories = Vec::new();
        for (flags, file, cached) in kinds {
            let memory = Memory::map(0, 1, flags, file).unwrap();
            memory.fill(3);
            let lease = get(&cache, memory.0).unwrap();
            assert_eq!((lease.is_cached(), see(&cache, &lease)), (cached, 3), "{flags:#x}");
            drop(lease);
            memories.push(memory);
        }
        assert_eq!(cache.stats().unwrap().unheard, 3);
        assert!(cache.warning().unwrap().unwrap().contains("is of a file"));
        // The reaper may have it in its hands.
        eventually("what is not cached is let go", || cache.device().pinned_bytes() == PAGE_SIZE);
    });
}

/// Rounds of unmapping memory and mapping it again by one thread, with a look at what the device sees. How many were
/// stale.
fn rounds<S: Source + 'static>(source: S, rounds: u64) -> u64 {
    let cache = cache(source, Options::default());
    // Far from where the kernel maps what others ask for, so that nobody takes the hole.
    let mut memory = Memory::map(0x2000_0000_0000, 2, ANON, None).unwrap();
    memory.fill(1);
    let mut stale = 0;
    for round in 2..rounds + 2 {
        drop(get(&cache, memory.0).unwrap());
        let at = memory.0.start();
        memory.unmap();
        memory = Memory::map(at, 2, ANON, None).unwrap();
        memory.fill(round);
        let lease = get(&cache, memory.page(0)).unwrap();
        stale += u64::from(see(&cache, &lease) != round);
    }
    stale
}

#[test]
fn b6_01_unmapped_and_mapped_again_by_one_thread() {
    if has_kvm() && has_uffd() {
        testing::in_child("b6_01_unmapped_and_mapped_again_by_one_thread", DEADLINE, || {
            assert_eq!(rounds(NoNotifier, 50), 50, "the control");
            assert_eq!(rounds(kvm_source(), 2000), 0);
            assert_eq!(rounds(uffd_source(), 2000), 0);
        });
    }
}

fn races<S: Source + 'static>(open: impl Fn() -> S, hogs: usize) -> u64 {
    let race = |way| race::reuse(&Raced(cache(open(), Options::default())), way, 300, hogs).unwrap().stale;
    race(race::Way::Munmap) + race(race::Way::Mremap)
}

#[test]
fn b6_02_mapped_while_another_thread_unmaps_it() {
    if has_kvm() && has_uffd() {
        testing::in_child("b6_02_mapped_while_another_thread_unmaps_it", DEADLINE, || {
            assert!(races(|| NoNotifier, 0) > 500, "the control");
            for hogs in [0, 3] {
                assert_eq!(races(kvm_source, hogs), 0);
                assert_eq!(races(uffd_source, hogs), 0);
            }
        });
    }
}

#[test]
fn b6_03_malloc_get_free_by_many_threads() {
    if has_kvm() && has_uffd() {
        testing::in_child("b6_03_malloc_get_free_by_many_threads", DEADLINE, || {
            let churn =
                |threads| race::churn(&Raced(cache(NoNotifier, Options::default())), threads, 400).unwrap();
            assert!(churn(4).stale > 0, "the control");
            for threads in [2, 8] {
                let kvm =
                    race::churn(&Raced(cache(kvm_source(), Options::default())), threads, 2000).unwrap();
                let uffd =
                    race::churn(&Raced(cache(uffd_source(), Options::default())), threads, 2000).unwrap();
                assert_eq!((kvm.stale, uffd.stale), (0, 0));
                assert!(kvm.lookups > 0 && uffd.lookups > 0);
            }
        });
    }
}

#[test]
fn b6_25_a_hole_in_what_is_listened_to_does_not_hang_who_reads_it() {
    if has(&[Capability::Userfaultfd, Capability::IoUring]) {
        let test = "b6_25_a_hole_in_what_is_listened_to_does_not_hang_who_reads_it";
        testing::in_child(test, DEADLINE, || {
            let cache = cache(uffd_source(), Options::default());
            let memory = Memory::stamped(4, 5);
            drop(get(&cache, memory.0).unwrap());
            memory.madvise(memory.0, libc::MADV_DONTNEED).unwrap();
            assert_eq!(memory.load(), 0);
            let fresh = Memory::map(0, 4, ANON, None).unwrap();
            drop(get(&cache, fresh.0).unwrap());
            assert_eq!(fresh.load(), 0);
        });
    }
}
