// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mappings of files: each path's notifier sequence, exactly, and what else each file's head promises.

mod common;

use common::{Heard, Recorder, range, register};
use interleave::{LockClass, MaySleep, Sleep, SpinLock};
use mmu_notifier::{Event, Invalidation, MmuNotifier, Ops, PageAddr, Pfn, Range, WouldBlock};
use softmm::{
    AccessError, Config, FaultError, File, FileError, FileKind, Foll, Machine, MapKind, Mm, MmUser,
    MmapError, Placement, Prot, Reclaimed,
};
use std::sync::{Arc, Weak};

static TEST: LockClass = LockClass::new("test state");

/// A machine, a file of four pages, and a process with room at 16 to 23 and a recorder on it.
struct Setup {
    machine: Arc<Machine>,
    file: Arc<File>,
    user: MmUser,
    recorder: Arc<Recorder>,
}

fn setup(cx: &mut MaySleep<'_>, kind: FileKind) -> Setup {
    let machine = Machine::new(Config::default());
    let file = machine.new_file(kind, 4);
    let user = machine.new_mm().unwrap();
    let recorder = Recorder::of_files(&user, range(16, 8));
    register(cx, &user, recorder.clone());
    Setup { machine, file, user, recorder }
}

impl Setup {
    /// Maps the file's pages from `pgoff` on at page `at`.
    fn map(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &Mm,
        (at, len): (u64, u64),
        pgoff: u64,
        prot: Prot,
        kind: MapKind,
    ) {
        let there = Placement::FixedNoReplace(range(at, len));
        mm.mmap_file(cx, there, prot, &self.file, pgoff, kind).unwrap();
    }

    fn store(&self, cx: &mut MaySleep<'_>, page: u64, value: u64) {
        self.machine.cpus()[0].store(cx, &self.user, page << 12, value).unwrap();
    }

    fn load(&self, cx: &mut MaySleep<'_>, page: u64) -> u64 {
        self.machine.cpus()[0].load(cx, &self.user, page << 12).unwrap()
    }

    fn pte(&self, page: u64) -> softmm::Pte {
        self.user.peek_pte(addr(page))
    }

    fn heard(&self, cx: &mut MaySleep<'_>) -> Vec<Heard> {
        self.recorder.check_quiet(cx);
        self.recorder.take(cx)
    }

    fn in_cache(&self, cx: &mut MaySleep<'_>, index: u64) -> Option<Pfn> {
        self.file.cached(cx).into_iter().find(|&(i, _)| i == index).map(|(_, pfn)| pfn)
    }

    fn finish(self, cx: &mut MaySleep<'_>) {
        self.user.mmput(cx);
        drop(self.file);
        assert_eq!(self.machine.frames().free_frames(), self.machine.frames().total_frames());
        assert_eq!(self.machine.tables_in_use(), 0);
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{reports:#?}");
    }
}

fn addr(page: u64) -> PageAddr {
    PageAddr::new(page << 12).unwrap()
}

fn pair(event: Event, range: Range) -> [Heard; 2] {
    [Heard::S(Some(event), range), Heard::E(Some(event), range)]
}

fn fault(error: FaultError) -> AccessError {
    AccessError::Fault(error)
}

#[test]
fn only_copy_on_write_makes_a_fault_heard() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Regular);
        t.file.write(cx, 0, 0, 5).unwrap();
        t.map(cx, &t.user, (16, 2), 0, Prot::ReadWrite, MapKind::Private);
        t.map(cx, &t.user, (20, 2), 0, Prot::ReadWrite, MapKind::Shared);
        assert_eq!((t.load(cx, 16), t.load(cx, 20)), (5, 5));
        assert_eq!(t.pte(16).pfn(), t.pte(20).pfn());
        t.store(cx, 20, 6);
        t.store(cx, 17, 1);
        t.store(cx, 21, 2);
        assert_eq!(t.heard(cx), [], "present, writable, and a private copy where nothing was mapped");
        assert_eq!((t.load(cx, 16), t.load(cx, 17), t.file.read(cx, 1, 0)), (6, 1, Ok(2)));
        t.store(cx, 16, 7);
        assert_eq!(t.heard(cx), pair(Event::Clear, range(16, 1)));
        assert_eq!((t.load(cx, 16), t.load(cx, 20), t.file.read(cx, 0, 0)), (7, 6, Ok(6)));
        t.finish(cx);
    });
}

#[test]
fn a_read_of_a_shared_mapping_is_writable_only_without_dirty_accounting() {
    MaySleep::enter(|cx| {
        for (kind, writable) in [(FileKind::Regular, false), (FileKind::Shmem, true)] {
            let t = setup(cx, kind);
            t.map(cx, &t.user, (16, 1), 0, Prot::ReadWrite, MapKind::Shared);
            t.load(cx, 16);
            assert_eq!((t.pte(16).is_writable(), t.pte(16).is_dirty()), (writable, false));
            t.store(cx, 16, 3);
            assert_eq!(t.file.read(cx, 0, 0), Ok(3));
            t.user.munmap(cx, range(16, 1));
            assert_eq!(t.file.read(cx, 0, 0), Ok(3), "the dirty bit went to the page");
            let pfn = t.in_cache(cx, 0).unwrap();
            assert!(t.machine.frames().dirty(pfn));
            t.finish(cx);
        }
    });
}

#[test]
fn past_the_end_is_a_bus_error_until_the_file_grows() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Shmem);
        t.map(cx, &t.user, (16, 6), 0, Prot::ReadWrite, MapKind::Shared);
        let cpu = &t.machine.cpus()[0];
        assert_eq!(cpu.load(cx, &t.user, 20 << 12), Err(fault(FaultError::PastEnd(addr(20)))));
        assert_eq!(t.file.read(cx, 4, 0), Err(FileError::PastEnd(4)));
        t.file.write(cx, 4, 0, 9).unwrap();
        assert_eq!(t.load(cx, 20), 9);
        assert_eq!(t.file.write(cx, 0, 8, 1), Err(FileError::NotStored(8)));
        assert_eq!(t.file.truncate(cx, u64::MAX), Err(FileError::TooBig(u64::MAX)));
        let far = t.user.mmap_file(
            cx,
            Placement::Fixed(range(40, 2)),
            Prot::Read,
            &t.file,
            FileError::PAGES_MAX - 1,
            MapKind::Shared,
        );
        assert_eq!(far, Err(MmapError::Offset(FileError::PAGES_MAX - 1)));
        t.finish(cx);
    });
}

#[test]
fn truncate_notifies_twice_and_takes_private_copies() {
    MaySleep::enter(|cx| {
        for kind in [FileKind::Regular, FileKind::Shmem] {
            let t = setup(cx, kind);
            t.map(cx, &t.user, (16, 4), 0, Prot::ReadWrite, MapKind::Private);
            t.map(cx, &t.user, (20, 4), 0, Prot::ReadWrite, MapKind::Shared);
            for page in 16..24 {
                t.store(cx, page, page);
            }
            t.file.truncate(cx, 1).unwrap();
            let round = [pair(Event::Clear, range(17, 3)), pair(Event::Clear, range(21, 3))].concat();
            assert_eq!(t.heard(cx), [round.clone(), round].concat());
            assert_eq!((t.load(cx, 16), t.load(cx, 20)), (16, 20));
            let cpu = &t.machine.cpus()[0];
            for page in [17, 21] {
                assert_eq!(cpu.load(cx, &t.user, page << 12), Err(fault(FaultError::PastEnd(addr(page)))));
            }
            t.file.truncate(cx, 4).unwrap();
            let grown = t.heard(cx);
            assert_eq!((t.load(cx, 17), t.load(cx, 21)), (0, 0));
            assert_eq!(grown, [], "nothing lay past the new end");
            t.finish(cx);
        }
    });
}

#[test]
fn growing_a_regular_file_notifies_what_lies_past_its_end() {
    MaySleep::enter(|cx| {
        for (kind, heard) in [(FileKind::Regular, 4), (FileKind::Shmem, 0)] {
            let t = setup(cx, kind);
            t.map(cx, &t.user, (16, 8), 0, Prot::ReadWrite, MapKind::Shared);
            t.file.truncate(cx, 6).unwrap();
            let got = t.heard(cx);
            assert_eq!(got.len(), heard);
            assert!(got.iter().all(
                |h| matches!(h, Heard::S(Some(Event::Clear), r) | Heard::E(Some(Event::Clear), r) if *r == range(22, 2))
            ));
            t.finish(cx);
        }
    });
}

#[test]
fn a_hole_notifies_once_and_leaves_private_copies() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Shmem);
        t.map(cx, &t.user, (16, 4), 0, Prot::ReadWrite, MapKind::Private);
        t.map(cx, &t.user, (20, 4), 0, Prot::ReadWrite, MapKind::Shared);
        t.store(cx, 21, 1);
        t.store(cx, 22, 2);
        t.store(cx, 17, 3);
        t.load(cx, 18);
        t.file.punch_hole(cx, 1..3);
        let heard = [pair(Event::Clear, range(17, 2)), pair(Event::Clear, range(21, 2))].concat();
        assert_eq!(t.heard(cx), heard);
        assert!(t.pte(17).is_present() && t.pte(18).is_none());
        let loaded = [17, 18, 21, 22].map(|page| t.load(cx, page));
        assert_eq!(loaded, [3, 0, 0, 0]);
        t.finish(cx);
    });
}

/// At the first E of its mm, faults a page in again: between the first round of a truncate and the emptying.
struct RefaultAtEnd {
    machine: Arc<Machine>,
    mm: Weak<Mm>,
    todo: SpinLock<Option<u64>>,
}

impl MmuNotifier for RefaultAtEnd {
    fn ops(&self) -> Ops {
        Ops::END
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) {
        let Some(page) = self.todo.lock(&mut cx).take() else { return };
        let (machine, mm) = (self.machine.clone(), self.mm.clone());
        let other = interleave::spawn("refault", move |cx| {
            let mm = mm.upgrade().expect("alive");
            machine.cpus()[1].load(cx, &mm, page << 12).expect("still in the file");
        });
        let Sleep::May(cx) = cx else { return };
        other.join(cx).expect("faulted");
    }
}

#[test]
fn a_page_that_comes_back_during_a_punch_is_notified_again() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Shmem);
        t.map(cx, &t.user, (16, 4), 0, Prot::Read, MapKind::Shared);
        t.file.write(cx, 1, 0, 7).unwrap();
        assert_eq!(t.load(cx, 17), 7);
        let todo = SpinLock::new(&TEST, Some(17));
        let refault =
            Arc::new(RefaultAtEnd { machine: t.machine.clone(), mm: Arc::downgrade(&t.user), todo });
        register(cx, &t.user, refault);
        t.file.punch_hole(cx, 0..3);
        let heard = [pair(Event::Clear, range(16, 3)), pair(Event::Clear, range(17, 1))].concat();
        assert_eq!(t.recorder.take(cx), heard);
        assert_eq!(t.load(cx, 17), 0);
        t.finish(cx);
    });
}

#[test]
fn a_held_page_leaves_the_file_and_stays_with_its_holder() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Regular);
        t.map(cx, &t.user, (16, 1), 0, Prot::ReadWrite, MapKind::Shared);
        let pin = t.user.get_user_pages(cx, range(16, 1), Foll::PIN.write()).unwrap();
        let frame = pin.frames().next().unwrap();
        t.file.truncate(cx, 0).unwrap();
        t.file.truncate(cx, 1).unwrap();
        t.machine.frames().write(frame, 0, 9).unwrap();
        pin.set_dirty();
        assert_eq!((t.load(cx, 16), t.file.read(cx, 0, 0)), (0, Ok(0)), "the write goes nowhere");
        t.file.fsync(cx);
        drop(pin);
        assert!(!t.machine.frames().is_live(frame));
        t.finish(cx);
    });
}

#[test]
fn writeback_write_protects_every_shared_mapping_of_a_dirty_page() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Regular);
        t.map(cx, &t.user, (16, 2), 0, Prot::ReadWrite, MapKind::Shared);
        t.map(cx, &t.user, (20, 2), 0, Prot::Read, MapKind::Shared);
        t.map(cx, &t.user, (22, 2), 0, Prot::Read, MapKind::Private);
        t.store(cx, 16, 1);
        t.load(cx, 17);
        t.load(cx, 22);
        t.file.fsync(cx);
        let heard = [pair(Event::ProtectionPage, range(16, 1)), pair(Event::ProtectionPage, range(20, 1))];
        assert_eq!(t.heard(cx), heard.concat(), "the second covers the page without mapping it");
        assert_eq!((t.pte(16).is_writable(), t.pte(16).is_dirty()), (false, false));
        assert_eq!(t.file.on_disk(cx, 0).map(|words| words[0]), Some(1));
        assert_eq!(t.file.on_disk(cx, 1), None, "clean");
        t.file.fsync(cx);
        assert_eq!(t.heard(cx), []);
        t.store(cx, 16, 2);
        assert_eq!(t.heard(cx), []);
        assert!(t.machine.frames().dirty(t.pte(16).pfn()));
        t.file.fsync(cx);
        assert_eq!(t.file.on_disk(cx, 0).map(|words| words[0]), Some(2));
        t.finish(cx);
    });
}

#[test]
fn a_pinned_device_writes_behind_the_back_of_writeback() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Regular);
        t.map(cx, &t.user, (16, 1), 0, Prot::ReadWrite, MapKind::Shared);
        let longterm = t.user.get_user_pages(cx, range(16, 1), Foll::PIN.write().longterm());
        assert_eq!(longterm.err(), Some(FaultError::NotPinnable(addr(16))));
        let cpu = &t.machine.cpus()[0];
        let pin = t.user.get_user_pages_fast(cx, cpu, range(16, 1), Foll::PIN.write()).unwrap();
        t.file.fsync(cx);
        t.machine.frames().write(pin.frames().next().unwrap(), 0, 9).unwrap();
        t.file.fsync(cx);
        assert_eq!(t.file.on_disk(cx, 0).map(|words| words[0]), Some(0), "nobody said that it is dirty");
        pin.set_dirty();
        t.file.fsync(cx);
        assert_eq!(t.file.on_disk(cx, 0).map(|words| words[0]), Some(9));
        drop(pin);
        t.finish(cx);
    });
}

#[test]
fn reclaim_unmaps_every_mapping_and_frees_what_nobody_holds() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Regular);
        t.map(cx, &t.user, (16, 2), 0, Prot::ReadWrite, MapKind::Shared);
        t.map(cx, &t.user, (20, 2), 0, Prot::ReadWrite, MapKind::Private);
        assert_eq!(t.file.reclaim(cx, 0, true), Reclaimed::Absent);
        t.store(cx, 16, 1);
        t.load(cx, 20);
        assert!(t.file.referenced(cx, 0) && !t.file.referenced(cx, 0), "asking forgets");
        assert_eq!(t.heard(cx), []);
        assert_eq!(t.file.reclaim(cx, 0, true), Reclaimed::Kept, "dirty");
        let heard = [pair(Event::Clear, range(16, 1)), pair(Event::Clear, range(20, 1))];
        assert_eq!(t.heard(cx), heard.concat());
        t.file.fsync(cx);
        assert_eq!(t.file.reclaim(cx, 0, true), Reclaimed::Freed);
        assert_eq!((t.heard(cx), t.in_cache(cx, 0)), (vec![], None), "nobody has mapped it since");
        assert_eq!((t.load(cx, 16), t.load(cx, 20)), (1, 1), "read back from the disk");

        let pin = t.user.get_user_pages(cx, range(16, 1), Foll::PIN.write()).unwrap();
        assert_eq!(t.file.reclaim(cx, 0, true), Reclaimed::Kept);
        assert!(t.pte(16).is_none());
        assert_eq!(t.load(cx, 16), 1);
        assert_eq!(t.pte(16).pfn(), pin.frames().next().unwrap().pfn, "the same page again");
        drop(pin);
        t.finish(cx);

        let t = setup(cx, FileKind::Shmem);
        t.map(cx, &t.user, (16, 1), 0, Prot::ReadWrite, MapKind::Shared);
        t.store(cx, 16, 1);
        assert_eq!(t.file.reclaim(cx, 0, true), Reclaimed::Freed);
        assert_eq!(t.file.on_disk(cx, 0).map(|words| words[0]), Some(1), "in swap");
        assert_eq!((t.load(cx, 16), t.file.on_disk(cx, 0)), (1, None));
        assert_eq!(
            t.file.reclaim(cx, 0, true),
            Reclaimed::Freed,
            "and out again though nobody has written it"
        );
        t.file.punch_hole(cx, 0..1);
        assert_eq!(t.load(cx, 16), 0);
        t.finish(cx);
    });
}

#[test]
fn fork_notifies_a_private_mapping_with_copies_and_no_shared_one() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Shmem);
        t.map(cx, &t.user, (16, 2), 0, Prot::ReadWrite, MapKind::Private);
        t.map(cx, &t.user, (20, 2), 0, Prot::ReadWrite, MapKind::Shared);
        t.load(cx, 16);
        t.store(cx, 20, 1);
        let first = t.user.fork(cx).unwrap();
        assert_eq!(t.heard(cx), [], "no anon_vma: the child can fault everything in");
        t.store(cx, 17, 5);
        let second = t.user.fork(cx).unwrap();
        assert_eq!(t.heard(cx), pair(Event::ProtectionPage, range(16, 2)));
        let cpu = &t.machine.cpus()[0];
        cpu.store(cx, &second, 20 << 12, 2).unwrap();
        assert_eq!((t.load(cx, 20), cpu.load(cx, &second, 17 << 12)), (2, Ok(5)));
        t.file.truncate(cx, 0).unwrap();
        for child in [&first, &second] {
            let gone = cpu.load(cx, child, 17 << 12);
            assert_eq!(gone, Err(fault(FaultError::PastEnd(addr(17)))), "truncate finds the children too");
        }
        first.mmput(cx);
        second.mmput(cx);
        t.finish(cx);
    });
}

#[test]
fn the_reverse_map_follows_splits_merges_and_overlays() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Shmem);
        t.map(cx, &t.user, (16, 2), 0, Prot::Read, MapKind::Shared);
        t.map(cx, &t.user, (18, 2), 2, Prot::Read, MapKind::Shared);
        assert_eq!(t.user.vma_ranges(cx), [range(16, 4)], "merged");
        t.file.truncate(cx, 0).unwrap();
        let twice = |range| [pair(Event::Clear, range), pair(Event::Clear, range)].concat();
        assert_eq!(t.heard(cx), twice(range(16, 4)));
        t.file.write(cx, 3, 0, 1).unwrap();
        t.user.munmap(cx, range(17, 1));
        t.heard(cx);
        t.file.truncate(cx, 1).unwrap();
        assert_eq!(t.heard(cx), twice(range(18, 2)), "only the upper half is past the end");
        t.user.mmap(cx, Placement::Fixed(range(18, 1)), Prot::Read).unwrap();
        t.heard(cx);
        t.file.punch_hole(cx, 0..4);
        let left = [pair(Event::Clear, range(16, 1)), pair(Event::Clear, range(19, 1))].concat();
        assert_eq!(t.heard(cx), left);
        t.user.munmap(cx, range(16, 8));
        t.heard(cx);
        t.file.punch_hole(cx, 0..4);
        assert_eq!(t.heard(cx), []);
        t.finish(cx);
    });
}

#[test]
fn longterm_read_pins_unshare_pages_of_private_mappings() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Regular);
        t.map(cx, &t.user, (16, 2), 0, Prot::ReadWrite, MapKind::Private);
        let cpu = &t.machine.cpus()[0];
        let short = t.user.get_user_pages_fast(cx, cpu, range(16, 1), Foll::PIN).unwrap();
        assert_eq!(t.heard(cx), []);
        let long = t.user.get_user_pages_fast(cx, cpu, range(16, 1), Foll::PIN.longterm()).unwrap();
        assert_eq!(t.heard(cx), pair(Event::Clear, range(16, 1)));
        t.store(cx, 16, 4);
        assert_eq!(t.heard(cx), [], "written in place");
        let sees = |pages: &softmm::UserPages| t.machine.frames().read(pages.frames().next().unwrap(), 0);
        assert_eq!((sees(&short), sees(&long)), (Ok(0), Ok(4)));
        drop((short, long));
        t.finish(cx);
    });
}

/// Counts what CPU 0 caches, and whether the frame still has a mapper, at each A.
struct AtFlush {
    machine: Arc<Machine>,
    pfn: Pfn,
    seen: SpinLock<Vec<(Range, u32, bool)>>,
}

impl MmuNotifier for AtFlush {
    fn ops(&self) -> Ops {
        Ops::SECONDARY_TLBS
    }

    fn arch_invalidate_secondary_tlbs(&self, cx: &mut interleave::Atomic<'_>, range: Range) {
        let (mappers, dirty) =
            (self.machine.frames().mapcount(self.pfn), self.machine.frames().dirty(self.pfn));
        self.seen.lock(cx).push((range, mappers, dirty));
    }
}

#[test]
fn a_dirty_page_is_flushed_before_it_loses_its_mapper() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Shmem);
        t.map(cx, &t.user, (16, 2), 0, Prot::ReadWrite, MapKind::Shared);
        t.store(cx, 16, 1);
        let seen = SpinLock::new(&TEST, Vec::new());
        let at_flush = Arc::new(AtFlush { machine: t.machine.clone(), pfn: t.pte(16).pfn(), seen });
        register(cx, &t.user, at_flush.clone());
        t.user.munmap(cx, range(16, 2));
        let seen = at_flush.seen.lock(cx).clone();
        assert_eq!(seen[0], (range(16, 1), 1, true));
        t.finish(cx);
    });
}

#[test]
fn a_read_fault_maps_what_is_cached_around_and_its_first_write_is_heard() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Regular);
        (0..3).for_each(|index| t.file.write(cx, index, 0, index).unwrap());
        t.map(cx, &t.user, (16, 4), 0, Prot::ReadWrite, MapKind::Private);
        assert_eq!(t.load(cx, 17), 1);
        let mapped = [16, 17, 18, 19].map(|page| t.pte(page).is_present());
        assert_eq!(mapped, [true, true, true, false], "page 3 of the file was not cached");
        t.store(cx, 18, 7);
        t.store(cx, 19, 8);
        assert_eq!(t.heard(cx), pair(Event::Clear, range(18, 1)));
        t.finish(cx);
    });
}

/// The oom reaper gains nothing from a shared mapping, and leaves it.
#[test]
fn the_oom_reaper_leaves_shared_mappings() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Shmem);
        t.map(cx, &t.user, (16, 1), 0, Prot::ReadWrite, MapKind::Shared);
        t.map(cx, &t.user, (20, 1), 0, Prot::ReadWrite, MapKind::Private);
        t.store(cx, 16, 1);
        t.user.oom_reap(cx);
        assert_eq!(t.heard(cx), pair(Event::Unmap, range(20, 1)));
        assert!(t.pte(16).is_present());
        t.finish(cx);
    });
}

/// Counts its starts and that each may sleep.
struct MaySleepAtStart {
    starts: SpinLock<usize>,
}

impl MmuNotifier for MaySleepAtStart {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        assert!(inv.blockable && matches!(cx, Sleep::May(_)));
        *self.starts.lock(&mut cx) += 1;
        Ok(())
    }
}

#[test]
fn every_start_on_a_file_may_sleep() {
    MaySleep::enter(|cx| {
        let t = setup(cx, FileKind::Regular);
        let counter = Arc::new(MaySleepAtStart { starts: SpinLock::new(&TEST, 0) });
        register(cx, &t.user, counter.clone());
        t.map(cx, &t.user, (16, 2), 0, Prot::ReadWrite, MapKind::Shared);
        t.store(cx, 16, 1);
        t.file.fsync(cx);
        t.file.reclaim(cx, 0, true);
        t.file.truncate(cx, 0).unwrap();
        assert_eq!(*counter.starts.lock(cx), 4);
        t.finish(cx);
    });
}
