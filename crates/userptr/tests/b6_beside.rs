// SPDX-License-Identifier: MIT OR Apache-2.0
//! Failure modes of registration caches, by the number that docs/failure-modes.md has for them: what the rest of the
//! program notices of a cache, and that each number of the page has a test.

mod common;

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::hash::{DefaultHasher, Hash, Hasher};

use common::memory::{ANON, Memory};
use common::{Cache, DEADLINE, cache, eventually, get, has_uffd, kvm_source, over_both, see, uffd_source};
use hostmm::page::{Maps, PidOrSelf, Vma};
use hostmm::primary::Source;
use hostmm::testing;
use hostmm::uffd::{self, UffdSource};
use interleave::{MaySleep, Ordering, scope};
use mmu_notifier::Range;
use userptr::cache::{Options, Stats};
use userptr::source::AnonymousUffd;

/// Far from what the kernel maps by itself: the kvm source cannot tell close neighbours apart.
const FAR: u64 = (1 << 32) + (37 << 20);

/// What the cache counts before and after `body`, in a round in which nothing of the machine has changed memory that the source
/// takes for this: what is dropped for that is no sign of anything.
fn once_quiet<S: Source + 'static>(
    cache: &Cache<S>,
    stamp: u64,
    mut body: impl FnMut(&Memory),
) -> (Stats, Stats) {
    let dropped = |stats: &Stats| stats.stale + stats.told + stats.retried;
    let near = Memory::stamped(1, 0).0.start();
    let mut rounds = (1..200).map(|n| {
        let memory = Memory::map(near - n * FAR, 4, ANON, None).unwrap();
        memory.fill(stamp);
        let before = cache.stats().unwrap();
        body(&memory);
        let after = cache.stats().unwrap();
        assert_eq!(see(cache, &get(cache, memory.0).unwrap()), stamp);
        (before, after)
    });
    rounds.find(|(before, after)| dropped(before) == dropped(after)).expect("a quiet round")
}

/// Hits are counted by plain loads and stores, in words that only one thread writes: had two threads one between them, some
/// would be lost. What this is worth in nanoseconds: `userptr bench`, hits by thread.
#[test]
fn b6_38_threads_that_hit_one_entry_write_no_word_together() {
    const THREADS: u64 = 8;
    const ROUNDS: u64 = 2_000;
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options { threads: 64, ..Options::default() });
        let (before, after) = once_quiet(&cache, 38, |memory| {
            drop(get(&cache, memory.0).unwrap());
            MaySleep::enter(|cx| {
                scope(cx, |threads, _| {
                    for _ in 0..THREADS {
                        threads.spawn("hits", |_| {
                            (0..ROUNDS).for_each(|_| drop(get(&cache, memory.0).unwrap()))
                        });
                    }
                });
            });
        });
        let counted = (after.hits - before.hits, after.registered - before.registered);
        assert_eq!(counted, (THREADS * ROUNDS, 1), "{after:?}");
    }
    let test = "b6_38_threads_that_hit_one_entry_write_no_word_together";
    over_both(test, || body(kvm_source()), || body(uffd_source()));
}

/// What others do to memory of theirs takes nothing out of use.
#[test]
fn b6_39_memory_that_nobody_registered_is_nobodys_business() {
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options::default());
        let (before, after) = once_quiet(&cache, 39, |memory| {
            drop(get(&cache, memory.0).unwrap());
            for _ in 0..10 {
                let stranger = Memory::stamped(16, 1);
                stranger.madvise(stranger.page(3), libc::MADV_DONTNEED).unwrap();
                stranger.unmap();
                assert_eq!(see(&cache, &get(&cache, memory.0).unwrap()), 39);
            }
        });
        let counted = (after.hits - before.hits, after.registered - before.registered);
        assert_eq!(counted, (10, 1), "{after:?}");
    }
    let test = "b6_39_memory_that_nobody_registered_is_nobodys_business";
    over_both(test, || body(kvm_source()), || body(uffd_source()));
}

/// What it costs to be told is one wake-up of the monitor for each event: nothing where nobody asked to be told, and one
/// for each stretch of memory that is told of. In time: `userptr bench` and `cargo bench -p userptr`.
#[test]
fn b6_39_40_only_what_is_registered_is_told_of_and_each_stretch_once() {
    if !has_uffd() {
        return;
    }
    let test = "b6_39_40_only_what_is_registered_is_told_of_and_each_stretch_once";
    testing::in_child(test, DEADLINE, || {
        let source = UffdSource::open(&uffd::Options::default()).unwrap();
        let events = || (source.stats().unmaps, source.stats().removes);
        let cache = cache(AnonymousUffd::new(source.clone()).unwrap(), Options::default());
        let memory = Memory::stamped(16, 1);
        // Held, so that what DONTNEED makes out of date is listened to until munmap.
        let _leases: Vec<_> = memory.islands().map(|page| get(&cache, page).unwrap()).collect();
        let (unmaps, removes) = events();
        for _ in 0..100 {
            let stranger = Memory::stamped(16, 1);
            stranger.madvise(stranger.page(3), libc::MADV_DONTNEED).unwrap();
        }
        assert_eq!(events(), (unmaps, removes), "of memory that nobody registered");
        memory.madvise(memory.0, libc::MADV_DONTNEED).unwrap();
        // The system call returns when its last event is read, and that is counted afterwards.
        eventually("eight stretches", || events() >= (unmaps, removes + 8));
        memory.unmap();
        eventually("munmap tells of all", || events().0 > unmaps);
        assert_eq!(events(), (unmaps + 1, removes + 8), "and of nothing twice");
    });
}

/// madvise over many registrations at once: each is heard of.
#[test]
fn b6_40_madvise_over_many_stretches() {
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options::default());
        let memory = Memory::stamped(64, 1);
        for round in 2..10 {
            memory.islands().for_each(|page| drop(get(&cache, page).unwrap()));
            memory.madvise(memory.0, libc::MADV_DONTNEED).unwrap();
            memory.fill(round);
            assert!(memory.islands().all(|page| see(&cache, &get(&cache, page).unwrap()) == round));
        }
    }
    over_both("b6_40_madvise_over_many_stretches", || body(kvm_source()), || body(uffd_source()));
}

/// Signals that were handled.
#[expect(clippy::disallowed_types, reason = "a word that a signal handler writes")]
static SIGNALS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// Those that can be handled and are nobody's: the two after 31 are the C library's.
fn signals() -> impl Iterator<Item = i32> {
    (1..=64).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(signal))
}

/// Counts each signal; the second of a kind has its default effect.
fn count_signals() {
    extern "C" fn count(_: i32) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }
    for signal in signals() {
        // SAFETY: all zero is a value of it; the handler does one atomic addition.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count as extern "C" fn(i32) as libc::sighandler_t;
            action.sa_flags = libc::SA_RESETHAND;
            assert_eq!(
                libc::sigaction(signal, &raw const action, std::ptr::null_mut()),
                0,
                "signal {signal}"
            );
        }
    }
}

/// Who handles what.
fn handlers() -> Vec<(i32, usize, i32)> {
    let of = |signal| {
        // SAFETY: all zero is a value of it; it is only asked for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            assert_eq!(libc::sigaction(signal, std::ptr::null(), &raw mut action), 0);
            (signal, action.sa_sigaction, action.sa_flags)
        }
    };
    signals().map(of).collect()
}

/// Whose functions are called by these names.
fn owners() -> Vec<(usize, CString)> {
    let owner = |name: &CStr| {
        // SAFETY: the names are of functions of the C library, and what is found is not called.
        unsafe {
            let at = libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr());
            let mut info: libc::Dl_info = std::mem::zeroed();
            assert!(!at.is_null() && libc::dladdr(at, &raw mut info) != 0, "{name:?}");
            (at.addr(), CStr::from_ptr(info.dli_fname).to_owned())
        }
    };
    [c"mmap", c"munmap", c"mremap", c"madvise", c"brk", c"sbrk", c"fork", c"free", c"shmdt"].map(owner).into()
}

/// Code and linkage: every mapping of a file that the program cannot write, and a digest of its bytes.
fn code() -> Vec<(Range, u64)> {
    let of_a_file =
        |vma: &Vma| vma.name.as_ref().is_some_and(|name| name.as_encoded_bytes().starts_with(b"/"));
    let maps = Maps::open(PidOrSelf::Myself).unwrap().in_range(Range::ALL).unwrap();
    let fixed = maps.iter().filter(|vma| of_a_file(vma) && vma.read && !vma.write);
    let digest = |range: Range| {
        // SAFETY: mapped for reading, and not for writing.
        let bytes = unsafe {
            std::slice::from_raw_parts(range.start() as *const u8, usize::try_from(range.len()).unwrap())
        };
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        (range, hasher.finish())
    };
    fixed.map(|vma| digest(vma.range)).collect()
}

/// What sanitizers, JVM and Go cannot live with: patched code, replaced functions, handlers and signals of somebody else's.
#[test]
fn b6_42_no_code_is_patched_no_function_replaced_and_no_signal_sent() {
    fn body<S: Source + 'static>(open: impl FnOnce() -> S) {
        count_signals();
        let before = (handlers(), owners(), code());
        assert!(
            before.2.len() > 3 && before.1.iter().all(|(_, file)| file.to_string_lossy().contains("libc"))
        );
        let cache = cache(open(), Options::default());
        for round in 1..50 {
            let memory = Memory::stamped(16, round);
            assert_eq!(see(&cache, &get(&cache, memory.0).unwrap()), round);
            memory.madvise(memory.page(0), libc::MADV_DONTNEED).unwrap();
            drop(get(&cache, memory.0).unwrap());
        }
        assert!((handlers(), owners(), code()) == before, "beside a cache");
        drop(cache);
        assert!((handlers(), owners(), code()) == before, "after it");
        assert_eq!(SIGNALS.load(Ordering::Relaxed), 0);
    }
    let test = "b6_42_no_code_is_patched_no_function_replaced_and_no_signal_sent";
    over_both(test, || body(kvm_source), || body(uffd_source));
}

#[test]
fn every_number_of_the_page_is_in_the_name_of_a_test() {
    let page = include_str!("../../../docs/failure-modes.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
    let listed: BTreeSet<u32> =
        rows.flat_map(|cell| cell.split(", ")).filter_map(|n| n.parse().ok()).collect();
    let mut tested = BTreeSet::new();
    for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests")).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let text = std::fs::read_to_string(path).unwrap();
        for name in text.lines().filter_map(|line| line.strip_prefix("fn b6_")) {
            tested.extend(name.split('_').map_while(|part| part.parse::<u32>().ok()));
        }
    }
    assert!(listed.len() > 30 && listed == tested, "{listed:?} are listed, {tested:?} are tested");
}
