// SPDX-License-Identifier: MIT OR Apache-2.0
//! What must be heard, and what must not.

use crate::memory::{Memory, PAGE, forked, memfd};
use crate::{SOON, live, live_both, open, open_ring};
use hostmm::capability::Capability;
use hostmm::kvm::{Buckets, Gone, KvmSource, Options, Prefer, Seq, Watch};
use hostmm::testing;
use std::sync::mpsc::channel;
use std::time::Instant;

/// A snapshot after which nothing changes. The VM of another program may change memory between any two lines.
fn quiet(watch: &Watch, what: &str) -> Seq {
    let snapshot = || watch.snapshot().unwrap();
    let quiet = (0..1000).map(|_| snapshot()).find(|seq| !watch.changed_since(*seq));
    quiet.unwrap_or_else(|| panic!("{what}: a new snapshot is never quiet"))
}

#[test]
fn its_own_changes_by_the_time_that_the_call_returns() {
    live_both("hears::its_own_changes_by_the_time_that_the_call_returns", |prefer| {
        let source = open(prefer);
        let change = |what: &str, f: &dyn Fn(&Memory)| {
            let m = Memory::touched(4 * PAGE);
            let watch = source.watch(m.part(1, 2)).unwrap();
            let seq = quiet(&watch, what);
            f(&m);
            assert!(watch.changed_since(seq), "{what}: after");
            let _again = quiet(&watch, what);
        };
        change("DONTNEED", &|m| m.advise(libc::MADV_DONTNEED));
        change("FREE", &|m| m.advise(libc::MADV_FREE));
        change("mprotect", &|m| m.protect(libc::PROT_READ));
        change("COW after fork", &|m| {
            forked(false, || 0);
            m.touch();
        });
        let m = Memory::touched(4 * PAGE);
        let watch = source.watch(m.range()).unwrap();
        let seq = watch.snapshot().unwrap();
        m.unmap();
        assert!(watch.changed_since(seq), "munmap");
        assert_ne!(source.health().unwrap().misses, Some(1));
    });
}

#[test]
fn a_truncate_by_another_process() {
    live_both("hears::a_truncate_by_another_process", |prefer| {
        let source = open(prefer);
        let fd = memfd(4 * PAGE);
        let m = Memory::shared(fd, 4 * PAGE);
        m.touch();
        let watch = source.watch(m.range()).unwrap();
        let seq = watch.snapshot().unwrap();
        // SAFETY: a plain system call on a descriptor that the child inherited.
        let code = forked(false, || unsafe { libc::ftruncate(fd, 0) });
        assert_eq!(code, 0);
        assert!(watch.changed_since(seq));
    });
}

#[test]
fn a_merge_by_ksmd() {
    if !testing::require(Capability::Ksm) {
        return;
    }
    live_both("hears::a_merge_by_ksmd", |prefer| {
        let _sleep = hostmm::setting::Setting::set("/sys/kernel/mm/ksm/sleep_millisecs", "1").unwrap();
        let _run = hostmm::setting::Setting::set("/sys/kernel/mm/ksm/run", "1").unwrap();
        let source = open(prefer);
        let m = Memory::touched(64 * PAGE);
        let watch = source.watch(m.range()).unwrap();
        m.advise(libc::MADV_MERGEABLE);
        let seq = watch.snapshot().unwrap();
        let start = Instant::now();
        while !watch.changed_since(seq) {
            assert!(start.elapsed() < SOON, "ksmd merged nothing that was heard");
            interleave::yield_now();
        }
    });
}

#[test]
fn only_its_window() {
    live_both("hears::only_its_window", |prefer| {
        let m = Memory::touched(16 * PAGE);
        let options = Options {
            prefer,
            window: Some(m.part(4, 4)),
            buckets: None,
            ring: Some(1 << 16),
            ..Options::default()
        };
        let source = KvmSource::open(&options).unwrap();
        // Without buckets the watch goes by the global counter, so any range that is counted shows.
        let watch = source.watch(m.part(4, 1)).unwrap();
        let dontneed = |page, pages| {
            let seq = watch.snapshot().unwrap();
            let r = m.part(page, pages);
            // SAFETY: a part of our own mapping.
            unsafe { libc::madvise(r.start() as *mut _, r.len() as usize, libc::MADV_DONTNEED) };
            watch.changed_since(seq)
        };
        assert!(!dontneed(0, 4), "up to the window");
        assert!(!dontneed(8, 4), "from the window's end");
        assert!(dontneed(3, 2), "straddling its start");
        assert!(dontneed(7, 2), "straddling its end");
        assert!(dontneed(5, 1), "inside");
        assert!(dontneed(0, 16), "around");
    });
}

#[test]
fn only_its_buckets() {
    live("hears::only_its_buckets", || {
        let buckets = Some(Buckets { count: 4096, granule_shift: 12, wide: 8 });
        let m = Memory::touched(64 * PAGE);
        let window = Some(m.range());
        let source = KvmSource::open(&Options { buckets, window, ..Options::default() }).unwrap();
        let watch = source.watch(m.part(10, 4)).unwrap();
        let dontneed = |page, pages| {
            let seq = watch.snapshot().unwrap();
            let r = m.part(page, pages);
            // SAFETY: a part of our own mapping.
            unsafe { libc::madvise(r.start() as *mut _, r.len() as usize, libc::MADV_DONTNEED) };
            watch.changed_since(seq)
        };
        for page in 0..64 {
            assert_eq!(dontneed(page, 1), (10..14).contains(&page), "page {page}");
        }
        assert!(!dontneed(2, 8), "eight granules, not wide");
        assert!(dontneed(3, 8), "eight granules, the last one inside");
        for first in 0..48 {
            let overlaps = first < 14 && first + 16 > 10;
            assert_eq!(dontneed(first, 16), overlaps, "a wide change from page {first} on");
        }
    });
}

#[test]
fn nothing_from_a_forked_child_and_the_child_knows() {
    live_both("hears::nothing_from_a_forked_child_and_the_child_knows", |prefer| {
        let m = Memory::touched(4 * PAGE);
        let source = open_ring(prefer, 1 << 16, m.range());
        let watch = source.watch(m.range()).unwrap();
        let seq = watch.snapshot().unwrap();
        for raw in [false, true] {
            let code = forked(raw, || {
                let mut bad = 0;
                bad |= i32::from(watch.snapshot() != Err(Gone::Forked));
                bad |= i32::from(!watch.changed_since(seq)) << 1;
                bad |= i32::from(source.health() != Err(Gone::Forked)) << 2;
                bad |= i32::from(source.watch(m.range()).err() != Some(Gone::Forked)) << 3;
                bad |= i32::from(source.subscribe(m.range(), |_| ()).is_ok()) << 4;
                bad
            });
            assert_eq!(code, 0, "raw clone: {raw}");
        }
        // And the parent's handle is none the worse for it.
        let seq = watch.snapshot().unwrap();
        m.advise(libc::MADV_DONTNEED);
        assert!(watch.changed_since(seq));
        // A child that drops its copies disturbs nobody either.
        let code = forked(false, move || {
            drop(watch);
            drop(source);
            0
        });
        assert_eq!(code, 0);
    });
}

#[test]
fn a_child_can_open_a_source_of_its_own() {
    live("hears::a_child_can_open_a_source_of_its_own", || {
        let _parents = open(Prefer::Bpf);
        let code = forked(false, || {
            let source = open(Prefer::Bpf);
            let m = Memory::touched(PAGE);
            let watch = source.watch(m.range()).unwrap();
            let seq = watch.snapshot().unwrap();
            m.advise(libc::MADV_DONTNEED);
            i32::from(!watch.changed_since(seq))
        });
        assert_eq!(code, 0);
    });
}

#[test]
fn after_close_range_of_everything() {
    live_both("hears::after_close_range_of_everything", |prefer| {
        let m = Memory::touched(PAGE);
        let source = open_ring(prefer, 1 << 16, m.range());
        let (tx, rx) = channel();
        let sub = source.subscribe(m.range(), move |n| _ = tx.send(*n)).unwrap();
        // SAFETY: closes what careless code would: everything but the standard streams.
        unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0) };
        let seq = sub.watch().snapshot().unwrap();
        m.advise(libc::MADV_DONTNEED);
        assert!(sub.watch().changed_since(seq));
        rx.recv_timeout(SOON).expect("the monitor still hears");
        assert_eq!(source.health().unwrap().misses, None, "the statistics are gone and say so");
        source.close();
        assert_eq!(sub.watch().snapshot(), Err(Gone::Closed));
    });
}

#[test]
fn two_sources_at_once() {
    live("hears::two_sources_at_once", || {
        let (a, b) = (open(Prefer::Bpf), open(Prefer::PerfRing));
        let c = open(Prefer::Bpf);
        let m = Memory::touched(PAGE);
        let (wa, wb, wc) =
            (a.watch(m.range()).unwrap(), b.watch(m.range()).unwrap(), c.watch(m.range()).unwrap());
        let (sa, sb, sc) = (wa.snapshot().unwrap(), wb.snapshot().unwrap(), wc.snapshot().unwrap());
        m.advise(libc::MADV_DONTNEED);
        assert!(wa.changed_since(sa) && wb.changed_since(sb) && wc.changed_since(sc));
        a.close();
        let (sb, sc) = (wb.snapshot().unwrap(), wc.snapshot().unwrap());
        m.advise(libc::MADV_DONTNEED);
        assert_eq!(wa.snapshot(), Err(Gone::Closed));
        assert!(wb.changed_since(sb) && wc.changed_since(sc));
    });
}

#[test]
fn what_is_counted_of_a_range_moves_with_it() {
    live("hears::what_is_counted_of_a_range_moves_with_it", || {
        let source = open(Prefer::Bpf);
        let m = Memory::touched(128 * PAGE);
        // The first page behind a boundary of granules, which are 16 pages.
        let start = m.range().start() as usize / PAGE;
        let on = start.next_multiple_of(16) - start;
        for (first, pages, touched) in [(on, 1, on), (on + 15, 2, on + 16), (on + 8, 48, on + 55)] {
            let watch = source.watch(m.part(first, pages)).unwrap();
            // Another program's change may come between any two lines: those who meet it ask again.
            let counted = (0..100).find_map(|_| {
                let count = watch.count_at(watch.snapshot().unwrap()).unwrap();
                (source.count(count.key) == Some(count.value)).then_some(count)
            });
            let count = counted.expect("a moment in which nothing changes");
            let last = m.part(touched, 1);
            // SAFETY: a part of our own mapping.
            unsafe { libc::madvise(last.start() as *mut _, last.len() as usize, libc::MADV_DONTNEED) };
            assert_ne!(source.count(count.key), Some(count.value), "page {touched} of {pages} at {first}");
        }
        let many = source.watch(m.part(on, 80)).unwrap();
        assert_eq!(many.count_at(many.snapshot().unwrap()), None, "in many words");
    });
}
