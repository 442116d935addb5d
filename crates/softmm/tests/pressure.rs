// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads that store and check while others take their pages away: reclaim, KSM, fork, ageing, DONTNEED; under every
//! profile, on real threads. No store is lost, nothing is freed that a CPU can reach, nothing leaks, and lockdep is quiet.

mod common;

use common::range;
use interleave::{AtomicBool, AtomicU64, MaySleep, Ordering, scope};
use mmu_notifier::PageAddr;
use softmm::{AccessError, Config, FaultError, Foll, KernelProfile, Machine, Mm, Placement, Prot, Reclaim};

const FIRST: u64 = 510;
const PAGES: u64 = 4;
/// At least; a writer goes on until that many pages have been reclaimed, and everybody else has had his turns too.
const ROUNDS: u64 = 10_000;
/// A writer reclaims by itself that often, as one does that finds no free memory: how many turns the scheduler gives
/// to a thread that only reclaims is not this test's business.
const ROUNDS_PER_RECLAIM: u64 = 4;
/// Turns that everybody who disturbs has at least.
const TURNS: u64 = 100;
const RECLAIMS: u64 = 50;

fn page(n: u64) -> PageAddr {
    PageAddr::new((FIRST + n % PAGES) << 12).unwrap()
}

/// Stores round numbers into its own word of every page and finds them again.
fn store_and_check(
    cx: &mut MaySleep<'_>,
    machine: &Machine,
    mm: &Mm,
    who: u64,
    (reclaimed, turns): (&AtomicU64, &[AtomicU64]),
) {
    let cpu = &machine.cpus()[who as usize];
    let mut last = [0; PAGES as usize];
    let start = interleave::time::now();
    for round in 1.. {
        let disturbed = turns.iter().all(|turns| turns.load(Ordering::SeqCst) >= TURNS);
        if round > ROUNDS && disturbed && reclaimed.load(Ordering::SeqCst) >= RECLAIMS {
            return;
        }
        assert!(start.elapsed().as_secs() < 300, "reclaim gets nothing: the test shows nothing");
        let n = round * 7 + who;
        if round.is_multiple_of(ROUNDS_PER_RECLAIM) {
            reclaim(cx, machine, mm, n + 1, reclaimed);
        }
        let addr = page(n).get() + who * 8;
        let seen = cpu.load(cx, mm, addr).unwrap();
        assert_eq!(seen, last[(n % PAGES) as usize], "round {round}: a store was lost");
        // Every other value is the same for both, so that KSM finds twins.
        let value = if round % 2 == 0 { 1 } else { round };
        cpu.store(cx, mm, addr, value).unwrap();
        last[(n % PAGES) as usize] = value;
        if round % 50 == 0 {
            let one = range(FIRST + n % PAGES, 1);
            mm.madvise_mergeable(cx, one, round % 100 == 0).unwrap();
        }
    }
}

/// Reclaims the page that is mapped at `n`, if one is.
fn reclaim(cx: &mut MaySleep<'_>, machine: &Machine, mm: &Mm, n: u64, reclaimed: &AtomicU64) {
    let pte = mm.peek_pte(page(n));
    if pte.is_mapped() {
        let frame = machine.frames().id(pte.pfn());
        let done = machine.reclaim_page(cx, frame, !n.is_multiple_of(3));
        reclaimed.fetch_add(u64::from(done == Reclaim::Reclaimed), Ordering::SeqCst);
    }
}

fn check(profile: KernelProfile) {
    MaySleep::enter(|cx| {
        let config = Config { frames: 128, swap_slots: 6, gather_batch: 3, profile, ..Config::default() };
        let machine = Machine::new(config);
        let user = machine.new_mm().unwrap();
        let (mm, machine): (&Mm, &Machine) = (&user, &machine);
        let (frames, done, reclaimed) = (machine.frames(), &AtomicBool::new(false), &AtomicU64::new(0));
        let turns = &[(); 4].map(|()| AtomicU64::new(0));
        // Two more pages, whose contents nobody minds.
        mm.mmap(cx, Placement::Fixed(range(FIRST, PAGES + 2)), Prot::ReadWrite).unwrap();
        mm.madvise_mergeable(cx, range(FIRST, PAGES + 2), true).unwrap();
        scope(cx, |s, cx| {
            // Who only disturbs lets the writers go first, so that a busy machine does not starve them.
            let running = |who: usize| {
                turns[who].fetch_add(1, Ordering::SeqCst);
                interleave::yield_now();
                !done.load(Ordering::SeqCst)
            };
            let reclaimer = move |cx: &mut MaySleep<'_>| {
                let mut n = 0;
                while running(0) {
                    n += 1;
                    reclaim(cx, machine, mm, n, reclaimed);
                }
            };
            let merger = move |cx: &mut MaySleep<'_>| {
                let mut n = 0;
                while running(1) {
                    n += 1;
                    machine.ksm_merge(cx, (mm, page(n)), (mm, page(n + 1)));
                    if let Some(frame) = machine.swap_cache(cx).first() {
                        machine.page_idle_clear_refs(cx, *frame);
                    }
                }
            };
            let forker = move |cx: &mut MaySleep<'_>| {
                let mut n = 0;
                while running(2) {
                    n += 1;
                    let child = mm.fork(cx).unwrap();
                    let stored = machine.cpus()[0].store(cx, &child, page(n).get() + 16, n);
                    assert!(!matches!(stored, Err(AccessError::Freed(_))), "{stored:?}");
                    child.mmput(cx);
                }
            };
            let waster = move |cx: &mut MaySleep<'_>| {
                let mut n = 0;
                while running(3) {
                    n += 1;
                    let extra = range(FIRST + PAGES, 2);
                    machine.cpus()[1].store(cx, mm, extra.start(), n).unwrap();
                    mm.madvise_dontneed(cx, extra).unwrap();
                    let prot = if n % 2 == 0 { Prot::Read } else { Prot::ReadWrite };
                    mm.mprotect(cx, range(FIRST + PAGES + 1, 1), prot).unwrap();
                    let foll = if n % 2 == 0 { Foll::PIN } else { Foll::GET.write() };
                    match mm.get_user_pages_fast(cx, &machine.cpus()[1], extra, foll) {
                        Ok(_) | Err(FaultError::Access(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            };
            s.spawn("reclaimer", reclaimer);
            s.spawn("merger", merger);
            s.spawn("forker", forker);
            s.spawn("waster", waster);
            let writers: Vec<_> = (0..2)
                .map(|who| {
                    s.spawn("writer", move |cx| store_and_check(cx, machine, mm, who, (reclaimed, turns)))
                })
                .collect();
            let results: Vec<_> = writers.into_iter().map(|writer| writer.join(cx)).collect();
            done.store(true, Ordering::SeqCst);
            assert!(results.iter().all(Result::is_ok), "{}", profile.name);
        });
        user.mmput(cx);
        for frame in machine.swap_cache(cx) {
            assert_eq!(machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed);
        }
        assert_eq!(frames.free_frames(), frames.total_frames(), "{}", profile.name);
        assert_eq!((machine.tables_in_use(), machine.swap().in_use(cx)), (0, 0));
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{}: {reports:#?}", profile.name);
    });
}

#[test]
fn nothing_is_lost_under_pressure() {
    KernelProfile::ALL.into_iter().for_each(check);
}
