// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files when memory is short and when threads meet: every allocation fails once, cleanly and without a leak; and threads
//! store while others write back, reclaim, truncate, punch, fork and probe, under every profile.

mod common;

use common::failure::Failure;
use common::range;
use interleave::{AtomicBool, AtomicU64, MaySleep, Ordering, scope};
use mmu_notifier::PageAddr;
use softmm::uprobes::BREAKPOINT;
use softmm::{
    AccessError, Allocation, Config, FaultError, File, FileKind, Foll, KernelProfile, Machine, MapKind, Mm,
    MmUser, Placement, Prot, Reclaimed,
};
use std::sync::Arc;

/// What was missing, of an error that must be for lack of memory.
fn missing<E: Failure + std::fmt::Debug>(error: E) -> Allocation {
    error.allocation().unwrap_or_else(|| panic!("{error:?}"))
}

/// Everything on files that allocates, once.
fn script(
    cx: &mut MaySleep<'_>,
    files: &[Arc<File>],
    user: &MmUser,
    child: &mut Option<MmUser>,
) -> Result<(), Allocation> {
    let cpu = &user.machine().cpus()[0];
    for (n, file) in files.iter().enumerate() {
        let at = 508 + 8 * n as u64;
        user.mmap_file(cx, Placement::Fixed(range(at, 2)), Prot::ReadWrite, file, 0, MapKind::Shared)
            .unwrap();
        user.mmap_file(cx, Placement::Fixed(range(at + 3, 2)), Prot::ReadWrite, file, 0, MapKind::Private)
            .unwrap();
        user.mmap_file(cx, Placement::Fixed(range(at + 6, 1)), Prot::Read, file, 0, MapKind::Private)
            .unwrap();
        file.write(cx, 2, 0, 1).map_err(missing)?;
        cpu.load(cx, user, (at + 4) << 12).map_err(missing)?;
        cpu.store(cx, user, at << 12, 1).map_err(missing)?;
        cpu.store(cx, user, (at + 1) << 12, 1).map_err(missing)?;
        cpu.store(cx, user, (at + 3) << 12, 2).map_err(missing)?;
        cpu.load(cx, user, (at + 6) << 12).map_err(missing)?;
        if file.kind() != FileKind::Xip {
            file.uprobe_register(cx, 0, 0).map_err(missing)?;
            let page = range(at + 4, 1);
            user.get_user_pages(cx, page, Foll::PIN.longterm()).map(drop).map_err(missing)?;
        }
    }
    let forked = user.fork(cx).map_err(missing)?;
    let child = child.insert(forked);
    cpu.store(cx, child, 511 << 12, 3).map_err(missing)?;
    for file in files.iter().filter(|file| file.kind() != FileKind::Xip) {
        file.uprobe_unregister(cx, 0, 0).map_err(missing)?;
    }
    Ok(())
}

/// The script on a machine of its own, where the nth allocation fails; how it went, and whether it came that far.
fn fails_at(
    cx: &mut MaySleep<'_>,
    profile: KernelProfile,
    what: Allocation,
    nth: u64,
) -> (Result<(), Allocation>, bool) {
    let machine = Machine::new(Config { profile, ..Config::default() });
    let files = [FileKind::Regular, FileKind::Shmem, FileKind::Xip].map(|kind| machine.new_file(kind, 2));
    machine.fail_nth(what, nth);
    let result = machine.new_mm().map_err(missing).and_then(|user| {
        let mut child = None;
        let result = script(cx, &files, &user, &mut child);
        child.into_iter().for_each(|child| child.mmput(cx));
        user.mmput(cx);
        result
    });
    let due = machine.failure_is_due(what);
    machine.fail_nth(what, 0);
    let cached: usize = files.iter().map(|file| file.cached(cx).len()).sum();
    let sparse = files.iter().filter(|file| file.xip_sparse_page(cx).is_some()).count();
    let frames = machine.frames();
    assert_eq!(frames.free_frames() + cached + sparse, frames.total_frames());
    drop(files);
    assert_eq!(frames.free_frames(), frames.total_frames());
    assert_eq!(machine.tables_in_use(), 0);
    (result, due)
}

#[test]
fn every_allocation_on_files_fails_cleanly() {
    MaySleep::enter(|cx| {
        for profile in KernelProfile::ALL {
            for (what, at_least) in [(Allocation::Frame, 14), (Allocation::Table, 10)] {
                let mut nth = 1;
                while let (result, false) = fails_at(cx, profile, what, nth) {
                    assert_eq!(result, Err(what), "{}: allocation {nth}", profile.name);
                    nth += 1;
                }
                assert!(nth > at_least, "{}: the script allocates {nth}", profile.name);
                assert_eq!(fails_at(cx, profile, what, 0).0, Ok(()));
            }
        }
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{reports:#?}");
    });
}

const FIRST: u64 = 509;
/// The last page of the file comes and goes; the others keep what is stored.
const KEPT: u64 = 3;
/// At least; a writer goes on until that many pages have been reclaimed, and everybody else has had his turns too.
const ROUNDS: u64 = 2_000;
/// A writer reclaims by itself that often, as one does that finds no free memory: how many turns the scheduler gives
/// to a thread that only reclaims is not this test's business.
const ROUNDS_PER_RECLAIM: u64 = 4;
/// Turns that everybody who disturbs has at least.
const TURNS: u64 = 50;
const RECLAIMS: u64 = 20;

fn addr(at: u64, word: u64) -> u64 {
    PageAddr::new(at << 12).unwrap().get() + word * 8
}

/// Stores round numbers into its own word of every page and finds them again, here and in the file.
fn store_and_check(
    cx: &mut MaySleep<'_>,
    machine: &Machine,
    mm: &Mm,
    file: &File,
    who: u64,
    (reclaimed, turns): (&AtomicU64, &[AtomicU64]),
) {
    let cpu = &machine.cpus()[who as usize];
    let mut last = [0; KEPT as usize];
    let start = interleave::time::now();
    for round in 1.. {
        let worked = file.kind() != FileKind::Regular || reclaimed.load(Ordering::SeqCst) >= RECLAIMS;
        let disturbed = turns.iter().all(|turns| turns.load(Ordering::SeqCst) >= TURNS);
        if round > ROUNDS && worked && disturbed {
            return;
        }
        assert!(start.elapsed().as_secs() < 300, "reclaim gets nothing: the test shows nothing");
        let n = (round * 7 + who) % KEPT;
        if round.is_multiple_of(ROUNDS_PER_RECLAIM) {
            let freed = file.reclaim(cx, (n + 1) % KEPT, true) == Reclaimed::Freed;
            reclaimed.fetch_add(u64::from(freed), Ordering::SeqCst);
        }
        let kept = &mut last[n as usize];
        assert_eq!(cpu.load(cx, mm, addr(FIRST + n, who)), Ok(*kept), "round {round}: a store was lost");
        cpu.store(cx, mm, addr(FIRST + n, who), round).unwrap();
        *kept = round;
        assert_eq!(file.read(cx, n, who as usize), Ok(round));
        // The page that comes and goes: a fault or any value of this thread, never a freed frame.
        match cpu.store(cx, mm, addr(FIRST + KEPT, who), round) {
            Ok(()) | Err(AccessError::Fault(FaultError::PastEnd(_))) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn check(kind: FileKind, profile: KernelProfile) {
    MaySleep::enter(|cx| {
        let config = Config { frames: 128, gather_batch: 3, profile, ..Config::default() };
        let machine = Machine::new(config);
        let made = machine.new_file(kind, KEPT + 1);
        let user = machine.new_mm().unwrap();
        let text = range(FIRST + 8, KEPT + 1);
        let window = Placement::Fixed(range(FIRST, KEPT + 1));
        user.mmap_file(cx, window, Prot::ReadWrite, &made, 0, MapKind::Shared).unwrap();
        user.mmap_file(cx, Placement::Fixed(text), Prot::Read, &made, 0, MapKind::Private).unwrap();
        let (mm, file, machine): (&Mm, &File, &Machine) = (&user, &made, &machine);
        let (done, worked) = (&AtomicBool::new(false), &AtomicU64::new(0));
        let turns = &[(); 4].map(|()| AtomicU64::new(0));
        scope(cx, |s, cx| {
            // Who only disturbs lets the writers go first, so that a busy machine does not starve them.
            let running = |who: usize| {
                turns[who].fetch_add(1, Ordering::SeqCst);
                interleave::yield_now();
                !done.load(Ordering::SeqCst)
            };
            let cleaner = move |cx: &mut MaySleep<'_>| {
                let mut n = 0;
                while running(0) {
                    n += 1;
                    file.fsync(cx);
                    let freed = file.reclaim(cx, n % (KEPT + 1), n % 2 == 0) == Reclaimed::Freed;
                    worked.fetch_add(u64::from(freed), Ordering::SeqCst);
                    file.referenced(cx, n % (KEPT + 1));
                }
            };
            let truncater = move |cx: &mut MaySleep<'_>| {
                while running(1) {
                    file.truncate(cx, KEPT).unwrap();
                    file.truncate(cx, KEPT + 1).unwrap();
                    file.punch_hole(cx, KEPT..KEPT + 1);
                }
            };
            let forker = move |cx: &mut MaySleep<'_>| {
                let mut n = 0;
                while running(2) {
                    n += 1;
                    let child = mm.fork(cx).unwrap();
                    let cpu = &machine.cpus()[0];
                    for at in [FIRST + KEPT, text.start() >> 12] {
                        let loaded = cpu.load(cx, &child, addr(at, 5));
                        assert!(!matches!(loaded, Err(AccessError::Freed(_))), "{loaded:?}");
                    }
                    child.munmap(cx, range(FIRST + n % 3, 1));
                    child.mmput(cx);
                }
            };
            let prober = move |cx: &mut MaySleep<'_>| {
                let cpu = &machine.cpus()[1];
                while running(3) {
                    if kind == FileKind::Xip {
                        continue;
                    }
                    file.uprobe_register(cx, 0, 5).unwrap();
                    assert_eq!(cpu.load(cx, mm, addr(FIRST + 8, 5)), Ok(BREAKPOINT));
                    file.uprobe_unregister(cx, 0, 5).unwrap();
                    assert_eq!(cpu.load(cx, mm, addr(FIRST + 8, 5)), Ok(0));
                    // Only a shared mapping may be pinned without a copy of the page.
                    drop(mm.get_user_pages_fast(cx, cpu, range(FIRST, 1), Foll::PIN.write()).unwrap());
                }
            };
            s.spawn("cleaner", cleaner);
            s.spawn("truncater", truncater);
            s.spawn("forker", forker);
            s.spawn("prober", prober);
            let writers: Vec<_> = (0..2)
                .map(|who| {
                    s.spawn("writer", move |cx| store_and_check(cx, machine, mm, file, who, (worked, turns)))
                })
                .collect();
            let results: Vec<_> = writers.into_iter().map(|writer| writer.join(cx)).collect();
            done.store(true, Ordering::SeqCst);
            assert!(results.iter().all(Result::is_ok), "{}", profile.name);
        });
        user.mmput(cx);
        drop(made);
        assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "{}", profile.name);
        assert_eq!(machine.tables_in_use(), 0);
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{}: {reports:#?}", profile.name);
    });
}

#[test]
fn no_store_to_a_file_is_lost_under_pressure() {
    for profile in KernelProfile::ALL {
        [FileKind::Regular, FileKind::Shmem, FileKind::Xip].into_iter().for_each(|kind| check(kind, profile));
    }
}
