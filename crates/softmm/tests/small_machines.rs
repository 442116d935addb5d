// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines that are too small for what is asked of them, from no frame at all upwards, under every profile: whatever is
//! missing is named in the error, a process that is killed for memory gives it to the next, and afterwards all is free.

mod common;

use common::failure::Failure;
use common::range;
use interleave::MaySleep;
use mmu_notifier::PageAddr;
use softmm::{
    Allocation, Config, FileKind, Foll, KernelProfile, Machine, MapKind, Mm, Placement, Prot, Reap, Reclaim,
};
use std::collections::BTreeSet;
use std::fmt::Debug;

/// What was missing in a run.
#[derive(Default)]
struct Missing(BTreeSet<&'static str>);

impl Missing {
    /// It worked, or memory was missing: nothing else may be wrong.
    fn note<T, E: Failure + Debug>(&mut self, result: Result<T, E>) -> Option<T> {
        let error = match result {
            Ok(done) => return Some(done),
            Err(error) => error,
        };
        self.0.insert(match error.allocation() {
            Some(Allocation::Frame) => "frame",
            Some(Allocation::Table) => "table",
            Some(Allocation::SwapSlot) => "swap slot",
            None => panic!("{error:?}"),
        });
        None
    }
}

fn page_out(cx: &mut MaySleep<'_>, mm: &Mm, page: u64, missing: &mut Missing) {
    let pte = mm.peek_pte(PageAddr::new(page << 12).unwrap());
    if pte.is_mapped() {
        let frame = mm.machine().frames().id(pte.pfn());
        if mm.machine().reclaim_page(cx, frame, true) == Reclaim::NoSwap {
            let _: Option<()> = missing.note(Err(Reclaim::NoSwap));
        }
    }
}

/// Every path of the mm, each whatever became of those before.
fn everything(cx: &mut MaySleep<'_>, config: Config, missing: &mut Missing) {
    let label = format!("{config:?}");
    let machine = Machine::new(config);
    let (cpu, frames) = (&machine.cpus()[0], machine.frames());
    let files = [FileKind::Regular, FileKind::Shmem, FileKind::Xip].map(|kind| machine.new_file(kind, 2));
    let mms = [machine.new_mm(), machine.new_mm()].map(|mm| missing.note(mm));
    if let [Some(mm), Some(other)] = &mms {
        mm.mmap(cx, Placement::Fixed(range(510, 4)), Prot::ReadWrite).unwrap();
        mm.madvise_mergeable(cx, range(510, 4), true).unwrap();
        for (n, file) in files.iter().enumerate() {
            let at = 520 + 8 * n as u64;
            for (at, kind) in [(at, MapKind::Shared), (at + 3, MapKind::Private)] {
                mm.mmap_file(cx, Placement::Fixed(range(at, 2)), Prot::ReadWrite, file, 0, kind).unwrap();
                missing.note(cpu.load(cx, mm, at << 12));
                missing.note(cpu.store(cx, mm, (at + 1) << 12, 5));
            }
            missing.note(file.write(cx, 1, 0, 6));
        }
        for page in 510..514 {
            missing.note(cpu.load(cx, mm, page << 12));
            missing.note(cpu.store(cx, mm, page << 12, 7));
        }
        let pinned = missing.note(mm.get_user_pages(cx, range(510, 1), Foll::PIN.write()));
        let child = missing.note(mm.fork(cx));
        drop(pinned);
        for page in [511, 512] {
            page_out(cx, mm, page, missing);
        }
        if let Some(child) = &child {
            missing.note(cpu.store(cx, child, 511 << 12, 8));
            drop(missing.note(child.get_user_pages(cx, range(512, 1), Foll::PIN)));
        }
        let two = [512, 513].map(|page: u64| PageAddr::new(page << 12).unwrap());
        machine.ksm_merge(cx, (mm, two[0]), (mm, two[1]));
        missing.note(cpu.store(cx, mm, 513 << 12, 9));
        missing.note(mm.madvise_mergeable(cx, range(510, 4), false));
        missing.note(files[0].uprobe_register(cx, 0, 0));
        // Fails where there is no probe, or for memory; what is left behind goes with the mappings.
        let _ = files[0].uprobe_unregister(cx, 0, 0);
        files[0].fsync(cx);
        files[0].reclaim(cx, 0, true);
        for file in &files {
            file.truncate(cx, 1).unwrap();
            file.punch_hole(cx, 0..1);
        }
        // The child is killed for its memory, and the other process can go on with it.
        other.mmap(cx, Placement::Fixed(range(510, 1)), Prot::ReadWrite).unwrap();
        let fits = cpu.store(cx, other, 510 << 12, 1).is_ok();
        if let Some(child) = child {
            if child.oom_reap(cx) == Reap::Left(Vec::new()) {
                assert!(cpu.load(cx, &child, 510 << 12).is_err(), "{label}: it was reaped");
            }
            child.mmput(cx);
        }
        let fits_now = cpu.store(cx, other, 510 << 12, 1);
        assert!(!fits || fits_now == Ok(()), "{label}: {fits_now:?}");
        missing.note(fits_now);
    }
    for mm in mms.into_iter().flatten() {
        mm.mmput(cx);
    }
    let sparse = files.iter().filter(|file| file.xip_sparse_page(cx).is_some()).count();
    let cached: usize = files.iter().map(|file| file.cached(cx).len()).sum();
    for frame in machine.swap_cache(cx) {
        assert_eq!(machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed, "{label}");
    }
    assert_eq!(frames.free_frames() + cached + sparse, frames.total_frames(), "{label}");
    drop(files);
    assert_eq!(frames.free_frames(), frames.total_frames(), "{label}");
    assert_eq!((machine.tables_in_use(), machine.swap().in_use(cx)), (0, 0), "{label}");
}

#[test]
fn whatever_is_missing_the_rest_is_whole() {
    MaySleep::enter(|cx| {
        for profile in KernelProfile::ALL {
            let mut missing = Missing::default();
            let enough = Config { profile, ..Config::default() };
            everything(cx, enough.clone(), &mut missing);
            assert_eq!(missing.0, BTreeSet::new(), "{}: that was enough", profile.name);
            for frames in 0..24 {
                everything(cx, Config { frames, ..enough.clone() }, &mut missing);
            }
            for tables in 0..16 {
                everything(cx, Config { tables, ..enough.clone() }, &mut missing);
            }
            for swap_slots in 0..2 {
                everything(cx, Config { swap_slots, ..enough.clone() }, &mut missing);
            }
            let all = ["frame", "swap slot", "table"].into_iter().collect();
            assert_eq!(missing.0, all, "{}", profile.name);
        }
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{reports:#?}");
    });
}
