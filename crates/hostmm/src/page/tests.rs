// SPDX-License-Identifier: MIT OR Apache-2.0
//! Identity of live pages.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use mmu_notifier::{PAGE_SIZE, PageAddr, Range, TASK_SIZE};

use super::*;
use crate::capability::Capability;
use crate::setting::SwapSpace;
use crate::sys::test_memory::{Memory, RW, fork};
use crate::testing::{in_child, require};

const DEADLINE: Duration = Duration::from_secs(30);

fn pages() -> Pages {
    Pages::open(PidOrSelf::Myself).unwrap()
}

#[test]
fn anonymous_memory_goes_through_its_states() {
    if !require(Capability::Pfn) || !require(Capability::Kpageflags) || !require(Capability::Kpagecount) {
        return;
    }
    in_child("page::tests::anonymous_memory_goes_through_its_states", DEADLINE, || {
        let (pages, m) = (pages(), Memory::anon(2 * PAGE_SIZE));
        m.madvise(libc::MADV_NOHUGEPAGE).unwrap();
        assert_eq!(pages.identity(m.page(0)).unwrap().frame, Frame::None);
        m.read(0, 1);
        let zero = pages.detail(m.page(0)).unwrap();
        assert!(zero.flags.unwrap().contains(PageFlags::ZERO_PAGE), "{zero:?}");
        m.write(0, b"x");
        let page = pages.detail(m.page(0)).unwrap();
        assert_ne!(page.identity.pfn(), zero.identity.pfn(), "the write broke away from the zero page");
        assert!(page.flags.unwrap().contains(PageFlags::ANON) && page.map_count == Some(1), "{page:?}");
        assert!(page.identity.entry.is_exclusive() && !page.identity.entry.is_file());
        m.madvise(libc::MADV_DONTNEED).unwrap();
        assert_eq!(pages.identity(m.page(0)).unwrap().frame, Frame::None);
    });
}

#[test]
fn a_write_after_fork_changes_the_frame() {
    if !require(Capability::Pfn) {
        return;
    }
    in_child("page::tests::a_write_after_fork_changes_the_frame", DEADLINE, || {
        let (pages, m) = (pages(), Memory::anon(PAGE_SIZE));
        m.write(0, b"a");
        let before = pages.identity(m.page(0)).unwrap();
        let range = m.range;
        let ok = fork(|| {
            assert!(matches!(pages.identity(m.page(0)), Err(PageError::Forked)));
            assert!(matches!(pages.maps().find(m.page(0)), Err(PageError::Forked)));
            let mine = Pages::open(PidOrSelf::Myself).unwrap();
            let shared = mine.identity(m.page(0)).unwrap();
            assert_eq!(shared.pfn(), before.pfn());
            assert!(!shared.entry.is_exclusive());
            m.write(0, b"b");
            assert_ne!(mine.identity(range.first_page()).unwrap().pfn(), before.pfn());
        });
        assert!(ok);
        assert_eq!(pages.identity(m.page(0)).unwrap().pfn(), before.pfn());
    });
}

#[test]
fn two_mappings_of_a_memfd_are_one_frame() {
    if !require(Capability::Pfn) || !require(Capability::Kpagecount) {
        return;
    }
    in_child("page::tests::two_mappings_of_a_memfd_are_one_frame", DEADLINE, || {
        let file = File::from(rustix::fs::memfd_create("two", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(PAGE_SIZE).unwrap();
        let (a, b) = (
            Memory::file(&file, PAGE_SIZE, libc::MAP_SHARED),
            Memory::file(&file, PAGE_SIZE, libc::MAP_SHARED),
        );
        a.write(0, b"shared");
        assert_eq!(b.read(0, 6), b"shared");
        let pages = pages();
        let (x, y) = (pages.detail(a.page(0)).unwrap(), pages.detail(b.page(0)).unwrap());
        assert_eq!(x.identity.pfn(), y.identity.pfn());
        assert!(x.identity.entry.is_file() && x.map_count == Some(2), "{x:?}");
    });
}

#[test]
fn a_private_file_page_is_replaced_by_the_first_write() {
    if !require(Capability::Pfn) || !require(Capability::Kpageflags) {
        return;
    }
    in_child("page::tests::a_private_file_page_is_replaced_by_the_first_write", DEADLINE, || {
        let path = std::env::temp_dir().join(format!("userptr-page-{}", std::process::id()));
        let mut file = File::create_new(&path).unwrap();
        file.write_all(&[7; PAGE_SIZE as usize]).unwrap();
        let m = Memory::file(&File::open(&path).unwrap(), PAGE_SIZE, libc::MAP_PRIVATE);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(m.read(0, 1), [7]);
        let pages = pages();
        let cache = pages.detail(m.page(0)).unwrap();
        assert!(
            cache.identity.entry.is_file() && !cache.flags.unwrap().contains(PageFlags::ANON),
            "{cache:?}"
        );
        m.write(0, b"w");
        let copy = pages.detail(m.page(0)).unwrap();
        assert!(!copy.identity.entry.is_file() && copy.flags.unwrap().contains(PageFlags::ANON), "{copy:?}");
        assert_ne!(copy.identity.pfn(), cache.identity.pfn());
    });
}

#[test]
fn a_collapse_makes_huge_pages() {
    if !require(Capability::Pfn) || !require(Capability::Kpageflags) || !require(Capability::Thp) {
        return;
    }
    in_child("page::tests::a_collapse_makes_huge_pages", DEADLINE, || {
        let huge = 2 << 20;
        let m = Memory::anon(2 * huge);
        m.madvise(libc::MADV_NOHUGEPAGE).unwrap();
        m.touch();
        let pages = pages();
        let start = m.range.start().next_multiple_of(huge);
        let middle = PageAddr::containing(start + 5 * PAGE_SIZE).unwrap();
        let before = pages.detail(middle).unwrap();
        assert!(!before.flags.unwrap().contains(PageFlags::THP), "{before:?}");
        m.madvise(libc::MADV_HUGEPAGE).unwrap();
        m.madvise(libc::MADV_COLLAPSE).unwrap();
        let after = pages.detail(middle).unwrap();
        assert!(after.flags.unwrap().contains(PageFlags::THP), "{after:?}");
        assert_ne!(after.identity.pfn(), before.identity.pfn());
        let range = Range::new(start, huge).unwrap();
        let entries = pages.pagemap().entries(range).unwrap();
        let first = pages.identity(PageAddr::containing(start).unwrap()).unwrap().pfn().unwrap().get();
        let frames: Vec<Frame> = entries.iter().map(|e| e.frame()).collect();
        let want: Vec<Frame> = (0..512).map(|i| Frame::Present(Pfn::new(first + i).unwrap())).collect();
        assert_eq!(frames, want, "a huge page is 512 frames in a row");
    });
}

#[test]
fn a_swapped_page_says_where() {
    if !require(Capability::Pfn) || !require(Capability::Zram) {
        return;
    }
    in_child("page::tests::a_swapped_page_says_where", DEADLINE, || {
        let _swap = SwapSpace::add().unwrap();
        let (pages, m) = (pages(), Memory::anon(PAGE_SIZE));
        m.write(0, b"swap me");
        m.madvise(libc::MADV_PAGEOUT).unwrap();
        let page = pages.identity(m.page(0)).unwrap();
        assert!(matches!(page.frame, Frame::Swapped(Some(_))), "{page:?}");
        assert_eq!(m.read(0, 7), b"swap me");
        assert!(pages.identity(m.page(0)).unwrap().pfn().is_some());
    });
}

#[test]
fn a_guard_page_is_a_guard_page() {
    if !require(Capability::GuardPages) {
        return;
    }
    in_child("page::tests::a_guard_page_is_a_guard_page", DEADLINE, || {
        const MADV_GUARD_INSTALL: i32 = 102;
        let (pages, m) = (pages(), Memory::anon(PAGE_SIZE));
        m.write(0, b"x");
        m.madvise(MADV_GUARD_INSTALL).unwrap();
        let page = pages.identity(m.page(0)).unwrap();
        assert!(matches!(page.frame, Frame::Guard | Frame::Swapped(_)), "{page:?}");
    });
}

#[test]
fn bulk_reads_agree_with_single_ones_across_batches() {
    in_child("page::tests::bulk_reads_agree_with_single_ones_across_batches", DEADLINE, || {
        let m = Memory::anon(9000 * PAGE_SIZE);
        m.madvise(libc::MADV_NOHUGEPAGE).unwrap();
        for page in (0..9000).step_by(3) {
            m.write(page * PAGE_SIZE, b"x");
        }
        let pages = pages();
        let all = pages.pagemap().entries(m.range).unwrap();
        let present: Vec<bool> = all.iter().map(|e| e.is_present()).collect();
        assert_eq!(present, (0..9000).map(|n| n % 3 == 0).collect::<Vec<_>>());
        assert_eq!(pages.pagemap().entries(Range::page(m.page(3))).unwrap().len(), 1);
    });
}

#[test]
fn what_is_not_there_is_an_error_by_name() {
    in_child("page::tests::what_is_not_there_is_an_error_by_name", DEADLINE, || {
        let pages = pages();
        let m = Memory::anon(3 * PAGE_SIZE);
        let (range, middle) = (m.range, m.page(1));
        let hole = Memory { range: Range::page(middle) };
        hole.munmap();
        let Err(PageError::Unmapped { range: bad, next }) = pages.identity(middle) else {
            panic!("not unmapped")
        };
        assert_eq!(bad, Range::page(middle));
        assert_eq!(next.unwrap().start(), middle.get() + PAGE_SIZE);
        for addr in [TASK_SIZE, 0xffff_ffff_ff60_0000, u64::MAX] {
            assert!(PageAddr::containing(addr).is_err());
        }
        assert_eq!(pages.maps().holes(range).unwrap(), [Range::page(middle)]);
        let gone = PidOrSelf::Pid(u32::MAX >> 1);
        assert!(matches!(Pages::open(gone), Err(PageError::NoProcess { .. })));
        // kthreadd has no mm.
        if let Ok(kthread) = Pages::open(PidOrSelf::Pid(2)) {
            let e = kthread.identity(m.page(0)).unwrap_err();
            assert!(matches!(e, PageError::NoProcess { pid: 2 } | PageError::Unmapped { .. }), "{e:?}");
        }
    });
}

#[test]
fn both_ways_to_ask_for_mappings_agree() {
    if !require(Capability::ProcmapQuery) {
        return;
    }
    in_child("page::tests::both_ways_to_ask_for_mappings_agree", DEADLINE, || {
        let file = File::from(rustix::fs::memfd_create("agree", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(PAGE_SIZE).unwrap();
        let shared = Memory::file(&file, PAGE_SIZE, libc::MAP_SHARED);
        let anon = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let none = Memory::map(None, PAGE_SIZE, libc::PROT_NONE, anon, None).unwrap();
        let query = Maps::open(PidOrSelf::Myself).unwrap();
        let read = Maps::open_without_query(PidOrSelf::Myself).unwrap();
        assert!(query.by_query() && !read.by_query());
        for m in [&shared, &none] {
            assert_eq!(query.at(m.page(0)).unwrap(), read.at(m.page(0)).unwrap());
        }
        let vma = query.at(shared.page(0)).unwrap();
        assert!(vma.shared && vma.read && vma.write && !vma.exec, "{vma:?}");
        assert_eq!(vma.name.as_deref(), Some("/memfd:agree (deleted)".as_ref()));
        // Both walks allocate, and may grow the heap between them: the program's text does not move.
        let text = query
            .at(PageAddr::containing(both_ways_to_ask_for_mappings_agree as *const () as u64).unwrap())
            .unwrap();
        let file = |maps: &Maps| {
            let all = maps.in_range(Range::ALL).unwrap();
            all.into_iter().filter(|v| v.inode == text.inode && v.dev == text.dev).collect::<Vec<_>>()
        };
        assert!(file(&query).len() > 1);
        assert_eq!(file(&query), file(&read));
    });
}

#[test]
fn vm_flags_show_advice() {
    in_child("page::tests::vm_flags_show_advice", DEADLINE, || {
        let (pages, m) = (pages(), Memory::anon(PAGE_SIZE));
        let dump = |pages: &Pages| pages.maps().vm_flags(m.page(0)).unwrap().contains(VmFlags::DD);
        assert!(!dump(&pages));
        m.madvise(libc::MADV_DONTDUMP).unwrap();
        assert!(dump(&pages));
    });
}

#[test]
fn another_process_can_be_asked() {
    if !require(Capability::Pfn) {
        return;
    }
    in_child("page::tests::another_process_can_be_asked", DEADLINE, || {
        let m = Memory::map(None, PAGE_SIZE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None).unwrap();
        m.write(0, b"x");
        let parent = std::process::id();
        let mine = pages().identity(m.page(0)).unwrap();
        let ok = fork(|| {
            let theirs = Pages::open(PidOrSelf::Pid(parent)).unwrap();
            assert_eq!(theirs.identity(m.page(0)).unwrap().pfn(), mine.pfn());
            assert!(theirs.maps().at(m.page(0)).unwrap().shared);
        });
        assert!(ok);
    });
}
