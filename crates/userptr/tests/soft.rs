// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cache over softmm: the code that runs live, with an mm that can be stopped anywhere.

mod modelled;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use interleave::explore::{Config, Report, Strategy, explore};
use interleave::{AtomicU64, MaySleep, Ordering, scope};
use mmu_notifier::primary::Pin;
use mmu_notifier::{Access, PAGE_SIZE, PageAddr, Range};
use modelled::{Told, map, pages, small_machine};
use softmm::told::{Fault, How};
use softmm::{Machine, Mm, MmPin, Placement, Prot};
use userptr::cache::{Admit, Options, Reaper, RegistrationCache, Verdict};
use userptr::device::pinned::Pinned;
use userptr::{CacheError, Lease};

type Cache = RegistrationCache<Mm, Pinned>;

fn options(entries: usize) -> Options {
    Options { entries, reaper: Reaper::Manual, threads: 4, ..Options::default() }
}

fn get(cache: &Cache, range: Range, access: Access) -> Result<Lease<'_, Mm, Pinned>, CacheError> {
    cache.get(range.start() as usize, range.len() as usize, access)
}

/// What the device sees in the first word of `page`.
fn see(machine: &Machine, pin: &MmPin, page: PageAddr) -> u64 {
    let frame = machine.frames().id(pin.pfn(page).expect("softmm knows its frames"));
    machine.frames().read(frame, 0).expect("a pin keeps the frame")
}

fn device_sees(cache: &Cache, range: Range) -> u64 {
    let lease = get(cache, range, Access::Write).unwrap();
    see(cache.mm().machine(), lease.mapping(), range.first_page())
}

/// An mm of its own; afterwards no frame may be missing.
fn with_mm(f: impl FnOnce(&mut MaySleep<'_>, &Arc<Mm>)) {
    let machine = Machine::new(softmm::Config::default());
    MaySleep::enter(|cx| {
        let user = machine.new_mm().unwrap();
        f(cx, &user);
        user.mmput(cx);
    });
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "a pin was leaked");
}

#[test]
fn any_part_of_a_registration_hits() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 64), 7);
        drop(get(&cache, pages(3, 20), Access::Write).unwrap());
        for (first, len) in [(3, 20), (3, 1), (22, 1), (9, 7), (5, 17)] {
            assert_eq!(device_sees(&cache, pages(first, len)), 7);
        }
        assert_eq!((cache.stats().unwrap().hits, cache.stats().unwrap().registered), (5, 1));
        drop(get(&cache, pages(2, 20), Access::Write).unwrap());
        assert_eq!(cache.stats().unwrap().registered, 2, "one page outside");
    });
}

#[test]
fn bytes_are_rounded_to_their_pages_and_the_lease_knows_both() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 4), 7);
        let addr = pages(1, 1).end() as usize - 3;
        let lease = cache.get(addr, 6, Access::Read).unwrap();
        assert_eq!((lease.addr(), lease.len(), lease.registered()), (addr, 6, pages(1, 2)));
        assert_eq!(lease.device_addr().0, addr as u64);
        assert!(matches!(cache.get(addr, 0, Access::Read), Err(CacheError::Range(_))));
        assert!(matches!(cache.get(usize::MAX - 3, 9, Access::Read), Err(CacheError::Range(_))));
    });
}

#[test]
fn rights_are_kept_apart_and_the_stronger_replace_the_weaker() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 4), 7);
        let reader = get(&cache, pages(0, 4), Access::Read).unwrap();
        assert_eq!(reader.rights(), Access::Read);
        let verdict = |access| cache.explain(pages(0, 1).start() as usize, 1, access).unwrap().verdict;
        assert_eq!((verdict(Access::Read), verdict(Access::Write)), (Verdict::Hit, Verdict::ReadOnly));
        let writer = get(&cache, pages(0, 4), Access::Write).unwrap();
        assert_eq!(writer.rights(), Access::Write);
        assert_eq!(get(&cache, pages(1, 1), Access::Read).unwrap().rights(), Access::Write);
        assert_eq!(cache.stats().unwrap().merged, 1);
        assert_eq!(cache.stats().unwrap().entries, 2, "the reader still has its own");
        drop(reader);
        cache.reap().unwrap();
        assert_eq!(cache.stats().unwrap().entries, 1);
    });
}

#[test]
fn replaced_memory_is_registered_anew_and_a_lease_outlives_it() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 2), 1);
        let old = get(&cache, pages(0, 2), Access::Write).unwrap();
        assert!(old.is_current());
        mm.munmap(cx, pages(0, 2));
        assert!(!old.is_current());
        assert!(matches!(get(&cache, pages(0, 2), Access::Write), Err(CacheError::Device(_))));
        map(cx, mm, pages(0, 2), 2);
        assert_eq!(device_sees(&cache, pages(0, 2)), 2);
        assert_eq!(
            see(mm.machine(), old.mapping(), pages(0, 1).first_page()),
            1,
            "the pages of the lease stay"
        );
        let before = cache.stats().unwrap();
        assert_eq!((before.leased_dead_bytes, before.entries), (2 * PAGE_SIZE, 2));
        drop(old);
        assert_eq!(cache.reap().unwrap(), 1);
        assert_eq!(cache.stats().unwrap().leased_dead_bytes, 0);
    });
}

#[test]
fn bounds_hold_and_what_is_used_stays() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(4)).unwrap();
        map(cx, mm, pages(0, 64), 7);
        for first in 0..64 {
            drop(get(&cache, pages(first, 1), Access::Write).unwrap());
            drop(get(&cache, pages(0, 1), Access::Write).unwrap());
            assert!(cache.stats().unwrap().entries <= 4);
        }
        let stats = cache.stats().unwrap();
        assert!(stats.evicted >= 60 && stats.registered < 64 + 40, "{stats:?}");
        let leases: Vec<_> = (0..4).map(|n| get(&cache, pages(n, 1), Access::Write).unwrap()).collect();
        let full = get(&cache, pages(9, 1), Access::Write);
        assert!(matches!(full, Err(CacheError::Full { entries: 4, max: 4, .. })));
        drop(leases);
        drop(get(&cache, pages(9, 1), Access::Write).unwrap());

        let mut options = options(64);
        options.bytes = 10 * PAGE_SIZE;
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options).unwrap();
        for first in 0..20 {
            drop(get(&cache, pages(3 * first, 3), Access::Write).unwrap());
            assert!(cache.stats().unwrap().bytes <= 10 * PAGE_SIZE);
        }
        assert!(matches!(get(&cache, pages(0, 11), Access::Write), Err(CacheError::Full { .. })));
    });
}

/// Neighbours lie in places that a lookup guesses: 64 entries or more.
#[test]
fn what_is_for_one_lease_is_found_by_nobody_else() {
    with_mm(|cx, mm| {
        let mut options = options(128);
        options.admit = Admit::SecondUse { or_bytes: 4 * PAGE_SIZE };
        let cache = Cache::new(mm.clone(), Pinned { mappings: 128 }, options).unwrap();
        map(cx, mm, pages(0, 16), 7);
        (0..2).for_each(|_| drop(get(&cache, pages(5, 1), Access::Write).unwrap()));
        cache.reap().unwrap();
        let once = get(&cache, pages(3, 1), Access::Write).unwrap();
        assert!(!once.is_cached());
        let addr = pages(3, 1).start() as usize;
        assert!(cache.lookup(addr, 1, Access::Read).is_none());
        assert!(cache.batch().unwrap().lookup(addr, 1, Access::Read).is_none());
        let stats = cache.stats().unwrap();
        assert_eq!((stats.entries, stats.stale, stats.hits), (2, 0, 0), "it is left alone");
        let cached = get(&cache, pages(3, 1), Access::Write).unwrap();
        assert!(cached.is_cached());
        drop(once);
        assert_eq!(cache.stats().unwrap().entries, 2);
        assert!(cache.lookup(addr, 1, Access::Read).is_some(), "its place was taken");
    });
}

#[test]
fn a_batch_over_many_registrations_finds_all_of_them() {
    // More than a CPU has in its nearest caches, of one page and of four.
    const MANY: u64 = 9000;
    let config = softmm::Config { frames: MANY as u32 + 64, ..softmm::Config::default() };
    let machine = Machine::new(config);
    MaySleep::enter(|cx| {
        let mm = machine.new_mm().unwrap();
        let cache =
            Cache::new(mm.clone(), Pinned { mappings: u32::MAX }, options(2 * MANY as usize)).unwrap();
        map(cx, &mm, pages(0, MANY + 4), 7);
        (0..MANY).for_each(|n| drop(get(&cache, pages(n, 1), Access::Write).unwrap()));
        drop(get(&cache, pages(MANY, 4), Access::Write).unwrap());
        let all = (0..MANY + 6).map(|n| (pages(n, 1).start() as usize, 8));
        let batch = cache.batch().unwrap();
        let mut found = Vec::new();
        batch.lookup_all(all, Access::Read, |n, it| found.push((n as u64, it.map(|it| it.registered()))));
        for (n, registered) in found {
            let expected = match n {
                0..MANY => Some(pages(n, 1)),
                _ if n < MANY + 4 => Some(pages(MANY, 4)),
                _ => None,
            };
            assert_eq!(registered, expected, "page {n}");
        }
        drop(batch);
        assert_eq!(cache.stats().unwrap().hits, MANY + 4);
        drop(cache);
        mm.mmput(cx);
    });
}

#[test]
fn what_is_used_once_is_not_admitted() {
    with_mm(|cx, mm| {
        let mut options = options(8);
        options.admit = Admit::SecondUse { or_bytes: 4 * PAGE_SIZE };
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options).unwrap();
        map(cx, mm, pages(0, 8), 7);
        let cached: Vec<bool> =
            (0..3).map(|_| get(&cache, pages(1, 1), Access::Write).unwrap().is_cached()).collect();
        assert_eq!(cached, [false, true, true]);
        assert!(get(&cache, pages(4, 4), Access::Write).unwrap().is_cached());
        let stats = cache.stats().unwrap();
        assert_eq!((stats.one_shot, stats.unheard, stats.entries, stats.hits), (1, 0, 2, 1));
    });
}

#[test]
fn more_leases_than_slots_are_counted_in_the_entry() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 1), 7);
        let leases: Vec<_> = (0..40).map(|_| get(&cache, pages(0, 1), Access::Write).unwrap()).collect();
        assert_eq!(cache.stats().unwrap().hits, 39);
        mm.munmap(cx, pages(0, 1));
        for lease in leases {
            assert_eq!(cache.reap().unwrap(), 0);
            drop(lease);
        }
        assert_eq!(cache.reap().unwrap(), 1);
    });
}

#[test]
fn a_batch_finds_what_is_there_in_the_order_asked_for_and_keeps_it() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(128)).unwrap();
        map(cx, mm, pages(0, 100), 7);
        // Every third page, the first of them for reading only.
        for first in (0..99).step_by(3) {
            let access = if first == 0 { Access::Read } else { Access::Write };
            drop(get(&cache, pages(first, 1), access).unwrap());
        }
        let before = cache.stats().unwrap().hits;
        let batch = cache.batch().unwrap();
        let asked = |n: u64| (pages(n, 1).start() as usize + 8, 16);
        let mut found = Vec::new();
        batch.lookup_all((0..99).map(asked).chain([(usize::MAX - 3, 9)]), Access::Write, |n, registered| {
            assert_eq!(n, found.len());
            found.push(registered);
        });
        assert_eq!(found.len(), 100);
        for (n, registered) in (0_u64..).zip(&found) {
            let expected = n % 3 == 0 && n > 0 && n < 99;
            assert_eq!(registered.is_some(), expected, "page {n}");
            let Some(registered) = registered else { continue };
            assert_eq!((registered.addr(), registered.registered()), (asked(n).0, pages(n, 1)));
            assert_eq!((registered.device_addr().0, registered.rights()), (asked(n).0 as u64, Access::Write));
        }
        // All of them die, and one is asked for again.
        mm.munmap(cx, pages(0, 100));
        assert!(batch.lookup(asked(3).0, 16, Access::Write).is_none());
        cache.invalidate(asked(0).0, 100 * PAGE_SIZE as usize).unwrap();
        let stats = cache.stats().unwrap();
        assert_eq!((stats.entries, stats.released, stats.hits), (33, 0, before));
        let last = found[96].as_ref().unwrap();
        assert!(!last.is_current());
        assert_eq!(see(mm.machine(), last.mapping(), pages(96, 1).first_page()), 7, "its pages stay");
        drop(found);
        drop(batch);
        cache.reap().unwrap();
        let stats = cache.stats().unwrap();
        assert_eq!((stats.entries, stats.released, stats.hits), (0, 33, before + 32));
    });
}

#[test]
fn who_registers_in_a_full_cache_waits_for_the_batches_of_others() {
    let scenario = |cx: &mut MaySleep<'_>| {
        let machine = small_machine();
        let user = machine.new_mm().unwrap();
        let cache = Cache::new(user.clone(), Pinned { mappings: 4 }, options(1)).unwrap();
        map(cx, &user, pages(0, 2), 1);
        drop(get(&cache, pages(0, 1), Access::Write).unwrap());
        let batch = cache.batch().unwrap();
        // There is no end to wait for but the caller's.
        assert!(matches!(get(&cache, pages(1, 1), Access::Write), Err(CacheError::Full { .. })));
        drop(batch);
        scope(cx, |threads, cx| {
            let reader = threads.spawn("reader", |_| drop(cache.batch().unwrap()));
            assert!(get(&cache, pages(1, 1), Access::Write).is_ok());
            reader.join(cx).unwrap();
        });
        drop(cache);
        user.mmput(cx);
        assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "a pin was leaked");
    };
    MaySleep::enter(scenario);
}

#[test]
fn b6_34_a_registration_that_fails_half_way_leaves_nothing() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(1)).unwrap();
        map(cx, mm, pages(0, 1), 7);
        for _ in 0..3 {
            assert!(matches!(get(&cache, pages(0, 2), Access::Write), Err(CacheError::Device(_))));
        }
        let stats = cache.stats().unwrap();
        assert_eq!((stats.entries, stats.bytes, stats.failed), (0, 0, 3));
        assert_eq!(device_sees(&cache, pages(0, 1)), 7);
    });
}

#[test]
fn an_audit_finds_what_nobody_told_of_and_nothing_else() {
    for (how, stale) in [(How::WAITS, false), (How::KVM, false), (How::DEAF, true)] {
        with_mm(|cx, mm| {
            let told = Told::listening(cx, mm, how).unwrap();
            let options = Options { audit: NonZeroU32::new(3), ..options(8) };
            let cache = RegistrationCache::new(told, Pinned { mappings: 8 }, options).unwrap();
            map(cx, mm, pages(0, 2), 1);
            let get = || cache.get(pages(0, 2).start() as usize, 2 * PAGE_SIZE as usize, Access::Write);
            for _ in 0..6 {
                drop(get().unwrap());
            }
            mm.munmap(cx, pages(1, 1));
            map(cx, mm, pages(1, 1), 1);
            let found: Vec<_> = (0..4).map(|_| get().map(drop)).collect();
            let refused = |r: &Result<(), _>| matches!(r, Err(CacheError::Stale { at, .. }) if *at == pages(1, 1).start());
            // The sixth hit is the second to be looked at.
            assert_eq!(found.iter().position(refused), stale.then_some(0), "{found:?}");
            let stats = cache.stats().unwrap();
            assert_eq!((stats.audited, stats.audited_stale, stats.unaudited), (2, u64::from(stale), 0));
        });
    }
}

#[test]
fn a_batch_is_audited_too() {
    for (how, stale) in [(How::KVM, 0), (How::DEAF, 1)] {
        with_mm(|cx, mm| {
            let options = Options { audit: NonZeroU32::new(1), ..options(8) };
            let told = Told::listening(cx, mm, how).unwrap();
            let cache = RegistrationCache::new(told, Pinned { mappings: 8 }, options).unwrap();
            map(cx, mm, pages(0, 1), 1);
            let (addr, len) = (pages(0, 1).start() as usize, PAGE_SIZE as usize);
            drop(cache.get(addr, len, Access::Write).unwrap());
            assert!(cache.batch().unwrap().lookup(addr, len, Access::Write).is_some());
            mm.munmap(cx, pages(0, 1));
            map(cx, mm, pages(0, 1), 2);
            assert!(cache.batch().unwrap().lookup(addr, len, Access::Write).is_none(), "{how:?}");
            assert_eq!(cache.stats().unwrap().audited_stale, stale, "{how:?}");
        });
    }
}

type ToldCache = RegistrationCache<Told, Pinned>;

/// A lookup of page 0, and what the device sees there.
type Look = fn(&ToldCache, &Machine) -> Option<u64>;

fn see_first(machine: &Machine, pin: &MmPin) -> u64 {
    see(machine, pin, pages(0, 1).first_page())
}

fn strict(cache: &ToldCache, machine: &Machine) -> Option<u64> {
    let lease = cache.get(pages(0, 1).start() as usize, PAGE_SIZE as usize, Access::Write).ok()?;
    Some(see_first(machine, lease.mapping()))
}

fn ordered(cache: &ToldCache, machine: &Machine) -> Option<u64> {
    let lease = cache.get_ordered(pages(0, 1).start() as usize, PAGE_SIZE as usize, Access::Write).ok()?;
    Some(see_first(machine, lease.mapping()))
}

fn batched(cache: &ToldCache, machine: &Machine) -> Option<u64> {
    let batch = cache.batch().ok()?;
    let found = batch.lookup(pages(0, 1).start() as usize, PAGE_SIZE as usize, Access::Write);
    if let Some(found) = found {
        return Some(see_first(machine, found.mapping()));
    }
    drop(batch);
    strict(cache, machine)
}

/// A cache over a mm whose page 0 holds 1; afterwards the device must see 2 there, and nothing may be leaked.
fn with_cache(
    cx: &mut MaySleep<'_>,
    how: How,
    f: impl FnOnce(&mut MaySleep<'_>, &Arc<Mm>, &Arc<Told>, &(dyn Fn(Look) -> Option<u64> + Sync)),
) {
    let machine = small_machine();
    let user = machine.new_mm().unwrap();
    let told = Told::listening(cx, &user, how).unwrap();
    let cache = RegistrationCache::new(Arc::clone(&told), Pinned { mappings: 4 }, options(2)).unwrap();
    let look = |look: Look| look(&cache, &machine);
    map(cx, &user, pages(0, 1), 1);
    f(cx, &user, &told, &look);
    assert_eq!(look(strict), Some(2), "sees the past, and 2 was complete");
    drop((cache, told));
    user.mmput(cx);
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "a pin was leaked");
}

/// One thread looks up and lets the device read, while another replaces the memory. The device must never show what was
/// there before a replacement that was complete when the lookup began.
fn lookups_beside_a_replacement(cx: &mut MaySleep<'_>, how: How, registered_before: bool, by: Look) {
    with_cache(cx, how, |cx, user, told, look| {
        if registered_before {
            // The second has the era that goes with the registration.
            assert_eq!((look(by), look(by)), (Some(1), Some(1)));
        }
        let complete = AtomicU64::new(1);
        scope(cx, |threads, cx| {
            told.start(threads);
            let replacer = threads.spawn("replacer", |cx| {
                told.munmap(cx, pages(0, 1));
                map(cx, user, pages(0, 1), 2);
                complete.store(2, Ordering::SeqCst);
            });
            let reader = threads.spawn("reader", |_| {
                for _ in 0..2 {
                    let since = complete.load(Ordering::SeqCst);
                    // Nothing is mapped in between, and between munmap and store the page is new, and zero.
                    let Some(seen) = look(by) else { continue };
                    assert!(seen >= since || (seen == 0 && since < 2), "sees {seen}, {since} was complete");
                }
            });
            replacer.join(cx).unwrap();
            reader.join(cx).unwrap();
            told.stop();
        });
    });
}

/// One thread is in munmap, which does not return before its news are read, while another maps the very address and looks
/// it up. Only a strict lookup is promised to be right.
fn a_lookup_of_memory_that_another_thread_is_giving_back(cx: &mut MaySleep<'_>, how: How, by: Look) {
    with_cache(cx, how, |cx, user, told, look| {
        assert_eq!(look(strict), Some(1));
        let mut mapped = false;
        scope(cx, |threads, cx| {
            told.start(threads);
            let unmapper = threads.spawn("unmapper", |cx| told.munmap(cx, pages(0, 1)));
            mapped = user.mmap(cx, Placement::FixedNoReplace(pages(0, 1)), Prot::ReadWrite).is_ok();
            if mapped {
                user.machine().cpus()[0].store(cx, user, pages(0, 1).start(), 2).unwrap();
                assert_eq!(look(by), Some(2), "sees what another thread has given back");
            }
            unmapper.join(cx).unwrap();
            told.stop();
        });
        if !mapped {
            map(cx, user, pages(0, 1), 2);
        }
    });
}

fn explored(seconds: u64, scenario: impl Fn(&mut MaySleep<'_>)) -> Report {
    let config = Config::new(Strategy::CachedPreemptions(2)).max_time(Duration::from_secs(seconds));
    explore(&config, scenario)
}

/// Silent, and every order was tried, or as many as there was time for: more where others take the time.
fn holds(seconds: u64, scenario: impl Fn(&mut MaySleep<'_>)) {
    let enough = [seconds, 10 * seconds].into_iter().any(|seconds| {
        let report = explored(seconds, &scenario);
        report.assert_ok();
        report.exhausted || report.executions > 100
    });
    assert!(enough, "not even a hundred");
}

#[test]
fn no_order_of_lookup_and_replacement_shows_the_past() {
    for how in [How::WAITS, How::KVM, How::KVM.uncounted(), How::UFFD] {
        for (before, by) in [(true, strict as Look), (true, ordered), (true, batched), (false, strict)] {
            holds(2, |cx| lookups_beside_a_replacement(cx, how, before, by));
        }
    }
}

#[test]
fn no_order_of_late_callbacks_shows_the_past() {
    for how in [How::KVM.calling(), How::UFFD.calling()] {
        for before in [true, false] {
            holds(2, |cx| lookups_beside_a_replacement(cx, how, before, strict));
        }
    }
}

#[test]
fn no_order_of_unmapping_and_mapping_by_two_threads_shows_the_past() {
    for how in [How::WAITS, How::KVM, How::KVM.uncounted(), How::UFFD] {
        for by in [strict as Look, batched] {
            holds(2, |cx| a_lookup_of_memory_that_another_thread_is_giving_back(cx, how, by));
        }
    }
}

/// Does some order of a lookup and a replacement show the past?
fn replacement_fails(how: How, registered_before: bool, by: Look) {
    let report = explored(60, |cx| lookups_beside_a_replacement(cx, how, registered_before, by));
    let failure = report.failures.first().unwrap_or_else(|| panic!("{how:?} was not found"));
    assert!(failure.message.contains("was complete"), "{failure}");
}

#[test]
fn without_a_notifier_an_order_shows_the_past() {
    for before in [true, false] {
        replacement_fails(How::DEAF, before, strict);
    }
}

#[test]
fn a_total_that_moves_before_its_bucket_is_found() {
    replacement_fails(How::KVM.uncounted().with(Fault::TotalFirst), true, strict);
}

#[test]
fn a_monitor_that_reads_before_it_says_so_is_found() {
    replacement_fails(How::UFFD.with(Fault::ReadsFirst), true, strict);
    replacement_fails(How::UFFD.with(Fault::ReadsFirst), true, ordered);
}

#[test]
fn a_strict_lookup_that_does_not_probe_is_found() {
    for by in [strict as Look, batched] {
        let report = explored(60, |cx| {
            let how = How::UFFD.with(Fault::NoProbe);
            a_lookup_of_memory_that_another_thread_is_giving_back(cx, how, by);
        });
        let failure = report.failures.first().expect("the missing probe was not found");
        assert!(failure.message.contains("given back"), "{failure}");
    }
}
