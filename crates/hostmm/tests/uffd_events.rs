// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which changes the `uffd` source hears, how it takes them, and which it does not hear.

#[macro_use]
mod uffd_support;

use std::sync::mpsc;

use hostmm::uffd::{Gone, Seq, UffdSource, Watch};
use mmu_notifier::Range;
use uffd_support::*;

fn watched(source: &UffdSource, range: Range) -> (Watch, Seq) {
    let watch = source.watch(range).unwrap();
    let seq = watch.snapshot().unwrap();
    assert!(!watch.changed_since_ordered(seq) && !watch.changed_since_strict(seq));
    (watch, seq)
}

#[derive(Debug, PartialEq, Clone, Copy)]
enum Heard {
    Dead,
    Changed,
    No,
}
use Heard::{Changed, Dead, No};

/// What a watch of `range` says after `change`, by both checks and by a batch.
fn hears<R>(source: &UffdSource, range: Range, change: impl FnOnce() -> R) -> Heard {
    let (watch, seq) = watched(source, range);
    let _ = change();
    let changed = watch.changed_since_ordered(seq);
    assert_eq!(watch.changed_since_strict(seq), changed);
    assert_eq!(source.probe().unwrap().changed_since(&watch, seq), changed);
    match watch.snapshot() {
        Err(Gone::Unmapped) => {
            assert!(changed);
            Dead
        }
        Ok(now) => {
            assert!(!watch.changed_since_ordered(now));
            if changed { Changed } else { No }
        }
        Err(gone) => panic!("{gone}"),
    }
}

live!(every_way_to_unmap_is_heard_and_kills_the_watch, || {
    let s = &open();
    let r = anon(4);
    assert_eq!(hears(s, r, || unmap(r)), Dead);
    for (first, pages) in [(0, 1), (1, 2), (3, 1)] {
        let r = anon(4);
        assert_eq!(hears(s, r, || unmap(part(r, first, pages))), Dead);
    }
    let r = anon(4);
    let wide = Range::new(r.start() - PAGE, r.len() + 2 * PAGE).unwrap();
    let _ = map_at(wide.start(), PAGE, RW, ANON | libc::MAP_FIXED_NOREPLACE, -1);
    assert_eq!(hears(s, r, || unmap(wide)), Dead);
    let fixed = ANON | libc::MAP_FIXED;
    let r = anon(4);
    assert_eq!(hears(s, r, || map_at(r.start(), r.len(), RW, fixed, -1).unwrap()), Dead);
    let r = anon(4);
    assert_eq!(hears(s, r, || map_at(r.start(), PAGE, libc::PROT_NONE, fixed, -1).unwrap()), Dead);
    // SAFETY: a buffer of the test, freed once; glibc maps one of this size for itself.
    let block = unsafe { libc::malloc(8 << 20) };
    let r = Range::enclosing(block.addr() as u64, 8 << 20).unwrap();
    // SAFETY: as above.
    assert_eq!(hears(s, r, || unsafe { libc::free(block) }), Dead);
});

live!(raw_instructions_are_heard_like_libc, || {
    let s = &open();
    let r = anon(2);
    let munmap = || {
        // SAFETY: munmap of memory of the test, that nothing refers to.
        unsafe {
            std::arch::asm!("syscall", inlateout("rax") libc::SYS_munmap => _, in("rdi") r.start(), in("rsi") r.len(),
                out("rcx") _, out("r11") _);
        }
    };
    assert_eq!(hears(s, r, munmap), Dead);
});

live!(brk_shrink_is_heard, || {
    let s = &open();
    let brk = |at| call(libc::SYS_brk, [at, 0, 0, 0, 0, 0]).unwrap();
    let old = brk(0);
    let start = old.next_multiple_of(PAGE);
    assert_eq!(brk(start + 4 * PAGE), start + 4 * PAGE);
    let r = Range::new(start, 4 * PAGE).unwrap();
    touch(r);
    assert_eq!(hears(s, r, || brk(start + 2 * PAGE)), Dead);
});

live!(mremap_is_heard_on_both_sides, || {
    let s = &open();
    let away = || anon(4).start();
    let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (r, to) = (anon(4), away());
    assert_eq!(hears(s, r, || mremap(r, r.len(), fixed, to).unwrap()), Dead, "moved");
    let r = anon(4);
    assert_eq!(hears(s, r, || mremap(r, 2 * PAGE, 0, 0).unwrap()), Dead, "shrunk");
    let r = anon(4);
    let dontunmap = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
    assert_eq!(hears(s, r, || mremap(r, r.len(), dontunmap, 0).unwrap()), Dead, "old one kept");
    let (r, other) = (anon(4), anon(4));
    assert_eq!(hears(s, r, || mremap(other, r.len(), fixed, r.start()).unwrap()), Dead, "moved onto");
    let wall = island(4);
    let _ = map_at(wall.end(), PAGE, libc::PROT_NONE, ANON | libc::MAP_FIXED_NOREPLACE, -1).unwrap();
    let grow = || mremap(wall, 8 * PAGE, libc::MREMAP_MAYMOVE, 0).unwrap();
    assert_eq!(hears(s, wall, grow), Dead, "grown elsewhere");
    let free = island(4);
    assert_eq!(hears(s, free, || mremap(free, 5 * PAGE, 0, 0).unwrap()), No, "grown in place");
});

live!(a_moved_registration_is_given_back, || {
    let s = &open();
    let (r, to) = (anon(4), anon(4).start());
    let (watch, _) = watched(s, r);
    let moved = mremap(r, r.len(), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to).unwrap();
    // Another userfaultfd can only have it once ours has let it go.
    let moved = Range::new(moved, r.len()).unwrap();
    assert!(eventually(|| open().watch(moved).is_ok()));
    drop(watch);
});

live!(madvise_that_drops_pages_is_heard_and_the_watch_lives, || {
    let s = &open();
    const DONTNEED_LOCKED: i32 = 24;
    for advice in [libc::MADV_DONTNEED, libc::MADV_FREE, DONTNEED_LOCKED] {
        let r = anon(4);
        let (watch, _) = watched(s, r);
        for (first, pages) in [(0, 4), (0, 1), (1, 2), (3, 1)] {
            let seq = watch.snapshot().unwrap();
            madvise(part(r, first, pages), advice).unwrap();
            assert!(watch.changed_since_ordered(seq) && watch.changed_since_strict(seq), "{advice}");
            touch(r);
        }
        assert!(watch.snapshot().is_ok());
        assert_eq!(hears(s, r, || unmap(r)), Dead);
    }
    let shared = map_at(0, 4 * PAGE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap();
    touch(shared);
    assert_eq!(hears(s, shared, || madvise(shared, libc::MADV_REMOVE).unwrap()), Changed);
});

live!(neighbours_and_other_watches_are_left_alone, || {
    let s = &open();
    let r = anon(8);
    let (low, seq) = watched(s, part(r, 0, 3));
    let (high, _) = watched(s, part(r, 5, 3));
    unmap(part(r, 3, 2));
    assert!(!low.changed_since_strict(seq) && !high.changed_since_strict(seq));
    madvise(part(r, 5, 1), libc::MADV_DONTNEED).unwrap();
    assert!(!low.changed_since_strict(seq) && high.changed_since_strict(seq));
    unmap(part(r, 2, 1));
    assert!(low.changed_since_ordered(seq) && high.snapshot().is_ok());
});

live!(overlapping_watches_share_the_registration, || {
    let s = &open();
    let r = anon(8);
    let (all, seq) = watched(s, r);
    let (part_of_it, _) = watched(s, part(r, 2, 4));
    drop(part_of_it);
    madvise(part(r, 3, 1), libc::MADV_DONTNEED).unwrap();
    assert!(all.changed_since_ordered(seq), "still registered after the other let go");
    let (tail, _) = watched(s, part(r, 6, 2));
    drop(all);
    let seq = tail.snapshot().unwrap();
    let heard = s.stats().removes;
    madvise(part(r, 0, 6), libc::MADV_DONTNEED).unwrap();
    assert_eq!(s.stats().removes, heard, "nobody holds these any more");
    assert!(!tail.changed_since_ordered(seq));
    madvise(part(r, 6, 1), libc::MADV_DONTNEED).unwrap();
    assert!(tail.changed_since_ordered(seq));
});

live!(what_it_cannot_hear_it_does_not_hear, || {
    let s = &open();
    const GUARD_INSTALL: i32 = 102;
    let r = anon(4);
    let mprotect = |prot: i32| call(libc::SYS_mprotect, [r.start(), r.len(), prot as u64, 0, 0, 0]).unwrap();
    assert_eq!(hears(s, r, || mprotect(libc::PROT_READ)), No);
    mprotect(RW);
    for advice in [libc::MADV_PAGEOUT, libc::MADV_COLD, libc::MADV_MERGEABLE, GUARD_INSTALL] {
        // Advice that this kernel does not know changes nothing either.
        assert_eq!(hears(s, anon(4), || madvise(r, advice)), No, "{advice}");
        let r = anon(4);
        assert_eq!(hears(s, r, || madvise(r, advice)), No, "{advice}");
    }
    let fd = memfd();
    let r = map_at(0, 4 * PAGE, RW, libc::MAP_SHARED, fd).unwrap();
    touch(r);
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
    let fallocate = || call(libc::SYS_fallocate, [fd as u64, punch, 0, PAGE, 0, 0]).unwrap();
    assert_eq!(hears(s, r, fallocate), No);
    assert_eq!(hears(s, r, || call(libc::SYS_ftruncate, [fd as u64, 2 * PAGE, 0, 0, 0, 0]).unwrap()), No);
    let id = call(libc::SYS_shmget, [libc::IPC_PRIVATE as u64, 4 * PAGE, 0o600, 0, 0, 0]).unwrap();
    let at = call(libc::SYS_shmat, [id, 0, 0, 0, 0, 0]).unwrap();
    call(libc::SYS_shmctl, [id, libc::IPC_RMID as u64, 0, 0, 0, 0]).unwrap();
    let r = Range::new(at, 4 * PAGE).unwrap();
    touch(r);
    assert_eq!(hears(s, r, || call(libc::SYS_shmdt, [at, 0, 0, 0, 0, 0]).unwrap()), No);
});

fn memfd() -> i32 {
    let fd = call(libc::SYS_memfd_create, [c"test".as_ptr().addr() as u64, 0, 0, 0, 0, 0]).unwrap() as i32;
    call(libc::SYS_ftruncate, [fd as u64, 4 * PAGE, 0, 0, 0, 0]).unwrap();
    fd
}

live!(every_kind_of_mapping_that_registers_is_heard, || {
    use std::os::fd::AsRawFd;
    let s = &open();
    let shared = libc::MAP_SHARED;
    let memory = [
        map_at(0, 4 * PAGE, RW, ANON, -1),
        map_at(0, 4 * PAGE, libc::PROT_READ, ANON, -1),
        map_at(0, 4 * PAGE, libc::PROT_NONE, ANON, -1),
        map_at(0, 4 * PAGE, RW, shared | libc::MAP_ANONYMOUS, -1),
        map_at(0, 4 * PAGE, RW, shared, memfd()),
        map_at(0, 4 * PAGE, RW, libc::MAP_PRIVATE, memfd()),
        map_at(0, 4 * PAGE, RW, ANON | libc::MAP_LOCKED, -1),
        map_at(0, 4 * PAGE, RW, ANON | libc::MAP_GROWSDOWN | libc::MAP_STACK, -1),
    ];
    for (kind, range) in memory.into_iter().enumerate() {
        let range = range.unwrap_or_else(|e| panic!("kind {kind}: {e}"));
        assert_eq!(hears(s, range, || unmap(range)), Dead, "kind {kind}");
    }
    let path = std::env::temp_dir().join(format!("userptr-uffd-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(4 * PAGE).unwrap();
    for flags in [libc::MAP_PRIVATE, shared] {
        let range = map_at(0, 4 * PAGE, RW, flags, file.as_raw_fd()).unwrap();
        if s.takes_files() {
            assert_eq!(hears(s, range, || unmap(range)), Dead);
        } else {
            assert!(matches!(s.watch(range), Err(hostmm::uffd::WatchError::Unsupported { .. })));
        }
    }
});

live!(huge_pages_are_heard, || {
    let s = &open();
    const HUGE: u64 = 2 << 20;
    let wide = map_at(0, 4 * HUGE, RW, ANON, -1).unwrap();
    let thp = Range::new(wide.start().next_multiple_of(HUGE), 2 * HUGE).unwrap();
    madvise(thp, libc::MADV_HUGEPAGE).unwrap();
    touch(thp);
    assert_eq!(hears(s, part(thp, 3, 1), || madvise(part(thp, 3, 1), libc::MADV_DONTNEED).unwrap()), Changed);
    assert_eq!(hears(s, thp, || unmap(thp)), Dead);
    match hostmm::setting::Setting::set("/proc/sys/vm/nr_hugepages", "2") {
        Ok(_pages) => {
            // What was asked for is had as far as there is memory in one piece.
            let Ok(range) = map_at(0, HUGE, RW, ANON | libc::MAP_HUGETLB, -1) else {
                return hostmm::testing::skip_for("huge_page", "no memory in one piece");
            };
            touch(range);
            assert_eq!(hears(s, range, || madvise(range, libc::MADV_DONTNEED).unwrap()), Changed);
            assert!(s.watch(part(range, 1, 1)).is_err(), "part of a huge page");
            assert_eq!(hears(s, range, || unmap(range)), Dead);
        }
        Err(why) => hostmm::testing::skip(hostmm::capability::Capability::Hugetlb, &why.to_string()),
    }
});

live!(the_stack_can_be_watched_and_still_grows, || {
    let s = &open();
    let local = [0u8; 64];
    let r = Range::enclosing(local.as_ptr().addr() as u64, 1).unwrap();
    let (watch, seq) = watched(s, r);
    fn deep(n: u32) -> u64 {
        let frame = std::hint::black_box([u64::from(n); 512]);
        if n == 0 { frame[7] } else { deep(n - 1) + frame[3] }
    }
    assert_eq!(deep(100), (0..=100).sum());
    assert!(!watch.changed_since_strict(seq));
});

live!(unpopulated_pages_can_be_read_and_written, || {
    let s = &open();
    for flags in [ANON, libc::MAP_SHARED | libc::MAP_ANONYMOUS] {
        let range = map_at(0, 8 * PAGE, RW, flags, -1).unwrap();
        let (watch, seq) = watched(s, range);
        for (i, page) in range.iter_pages().enumerate() {
            let at = page.get() as *mut u64;
            // SAFETY: memory of the test.
            unsafe {
                if i % 2 == 0 {
                    assert_eq!(at.read_volatile(), 0);
                }
                at.write_volatile(1);
            }
        }
        assert!(!watch.changed_since_strict(seq));
    }
});

live!(callbacks_tell_what_happened_and_drop_is_a_fence, || {
    let s = &open();
    let r = anon(4);
    let (tx, rx) = mpsc::channel();
    let watch = s.watch_with(r, move |change| tx.send(*change).unwrap()).unwrap();
    madvise(part(r, 1, 1), libc::MADV_DONTNEED).unwrap();
    let change = rx.recv_timeout(SOON).unwrap();
    assert!(change.removed && !change.unmapped && change.range == part(r, 1, 1), "{change:?}");
    unmap(part(r, 2, 2));
    let change = rx.recv_timeout(SOON).unwrap();
    assert!(change.unmapped && change.range == part(r, 2, 2), "{change:?}");
    madvise(part(r, 0, 1), libc::MADV_DONTNEED).unwrap();
    drop(watch);
    let _ = rx.try_iter().count();
    madvise(part(r, 0, 1), libc::MADV_DONTNEED).unwrap();
    // The closure is dropped with the watch, and its sender with it.
    assert_eq!(rx.recv_timeout(SOON), Err(mpsc::RecvTimeoutError::Disconnected));
});
