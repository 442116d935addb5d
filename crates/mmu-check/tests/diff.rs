// SPDX-License-Identifier: MIT OR Apache-2.0
//! softmm beside the running kernel, path by path and at random; and a wrong softmm, which must be noticed.

use hostmm::capability::Capability;
use hostmm::lab::Backing::{Anonymous, PrivateFile, SharedFile};
use hostmm::lab::Rights::{Read, ReadWrite};
use hostmm::{lab, testing};
use mmu_check::diff::script::{Op, Span, Who::Child, Who::Parent, random};
use mmu_check::diff::subject::Subject;
use mmu_check::diff::{Compared, compare};
use softmm::KernelProfile;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(120);

fn live(name: &str, body: impl FnOnce(&mut Subject)) {
    let needed = [Capability::DevKvm, Capability::KvmTracepoint, Capability::Bpf, Capability::Pfn];
    if needed.into_iter().all(testing::require) {
        testing::in_child(name, DEADLINE, || body(&mut Subject::open().unwrap()));
    }
}

fn span(first: u64, pages: u64) -> Span {
    Span { first, pages }
}

fn anon(first: u64, pages: u64) -> Op {
    Op::Map(Parent, span(first, pages), ReadWrite, Anonymous)
}

fn file(first: u64, pages: u64, backing: lab::Backing) -> Op {
    Op::Map(Parent, span(first, pages), ReadWrite, backing)
}

/// Both sides agree.
fn agree(subject: &mut Subject, what: &str, script: &[Op]) -> Compared {
    let compared = compare(subject, KernelProfile::V6_18, script).unwrap();
    if let Some(difference) = &compared.difference {
        panic!("{what}: {difference}");
    }
    compared
}

/// What is done, how many ranges it announces on both sides, and how.
type Path = (&'static str, usize, Vec<Op>);

fn anonymous_paths() -> Vec<Path> {
    vec![
        (
            "first touch is silent, a write over the zero page is not",
            1,
            vec![anon(4, 4), Op::Store(Parent, 4, 1), Op::Load(Parent, 5), Op::Store(Parent, 5, 2)],
        ),
        (
            "munmap with a hole, and of nothing",
            2,
            vec![
                anon(2, 4),
                anon(10, 4),
                Op::Store(Parent, 11, 1),
                Op::Unmap(Parent, span(0, 20)),
                Op::Unmap(Parent, span(0, 20)),
                anon(3, 1),
                anon(3, 1),
            ],
        ),
        (
            "MAP_FIXED over other memory",
            1,
            vec![anon(4, 8), Op::Store(Parent, 6, 1), anon(5, 4), Op::Load(Parent, 6)],
        ),
        (
            "mprotect",
            2,
            vec![
                anon(4, 8),
                Op::Protect(Parent, span(4, 2), Read),
                Op::Store(Parent, 7, 1),
                Op::Protect(Parent, span(6, 2), Read),
                Op::Protect(Parent, span(6, 2), Read),
                Op::Store(Parent, 7, 2),
                Op::Protect(Parent, span(4, 8), ReadWrite),
                Op::Store(Parent, 7, 3),
                Op::Protect(Parent, span(10, 4), Read),
            ],
        ),
        (
            "mprotect across a page table's end",
            2,
            vec![
                anon(12, 8),
                Op::Store(Parent, 18, 1),
                Op::Protect(Parent, span(13, 6), Read),
                Op::Store(Parent, 12, 1),
                Op::Protect(Parent, span(12, 8), ReadWrite),
            ],
        ),
        (
            "MADV_DONTNEED, of nothing and over a hole as well",
            3,
            vec![
                anon(4, 4),
                Op::Store(Parent, 5, 1),
                Op::DontNeed(Parent, span(4, 2)),
                Op::Load(Parent, 5),
                Op::DontNeed(Parent, span(6, 1)),
                Op::DontNeed(Parent, span(6, 4)),
            ],
        ),
        (
            "fork, copy and reuse",
            3,
            vec![
                anon(4, 4),
                anon(12, 4),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 5, 2),
                Op::Fork,
                Op::Store(Parent, 4, 3),
                Op::Load(Child, 4),
                Op::Store(Child, 4, 4),
                Op::Store(Child, 5, 5),
                Op::Exit,
                Op::Store(Parent, 5, 6),
                Op::Fork,
                Op::Exit,
                Op::Store(Parent, 5, 7),
            ],
        ),
    ]
}

fn file_paths() -> Vec<Path> {
    vec![
        (
            "private file: first write, write to a page that was read, fault-around",
            2,
            vec![
                Op::WriteFile(3, 9),
                Op::WriteFile(5, 9),
                file(4, 8, PrivateFile(0)),
                Op::Store(Parent, 4, 1),
                Op::Load(Parent, 7),
                Op::Store(Parent, 7, 2),
                Op::Store(Parent, 9, 3),
            ],
        ),
        (
            "shared file: truncate twice, hole once, growth not at all",
            3,
            vec![
                file(4, 8, SharedFile(0)),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 9, 1),
                Op::Punch(0, 0),
                Op::Load(Parent, 4),
                Op::Truncate(4),
                Op::Load(Parent, 9),
                Op::Truncate(30),
                Op::Load(Parent, 9),
            ],
        ),
        (
            "a private copy survives a hole, not a truncation",
            3,
            vec![
                file(4, 8, PrivateFile(0)),
                Op::Store(Parent, 6, 1),
                Op::Punch(0, 7),
                Op::Load(Parent, 6),
                Op::Truncate(1),
                Op::Load(Parent, 6),
            ],
        ),
    ]
}

#[test]
fn each_path_of_anonymous_memory_agrees() {
    live("each_path_of_anonymous_memory_agrees", |subject| {
        for (what, least, script) in anonymous_paths() {
            let compared = agree(subject, what, &script);
            assert!(compared.ranges >= least, "{what}: {compared:?}");
        }
    });
}

#[test]
fn each_path_of_files_agrees() {
    live("each_path_of_files_agrees", |subject| {
        for (what, least, script) in file_paths() {
            let compared = agree(subject, what, &script);
            assert!(compared.ranges >= least, "{what}: {compared:?}");
        }
    });
}

#[test]
fn random_operations_agree() {
    live("random_operations_agree", |subject| {
        let mut all = Compared::default();
        for seed in 0..25 {
            all.add(agree(subject, &format!("seed {seed}"), &random(seed, 80)));
        }
        assert!(all.operations > 1500 && all.faults > 20 && all.ranges > 300, "{all:?}");
        assert!(all.told * 100 < all.operations, "{all:?}");
    });
}

#[test]
fn a_wrong_softmm_is_noticed_and_the_script_gets_short() {
    live("a_wrong_softmm_is_noticed_and_the_script_gets_short", |subject| {
        let right = KernelProfile::V6_18;
        let unwrapped = KernelProfile { change_pte: KernelProfile::UNWRAPPED_A.change_pte, ..right };
        let old_reuse = KernelProfile { reuse: KernelProfile::V3_16.reuse, ..right };
        let no_upgrade = KernelProfile { mprotect_upgrades: false, ..right };
        let old_slices = KernelProfile { mprotect: KernelProfile::V5_10.mprotect, ..right };
        for (profile, longest) in [(unwrapped, 4), (old_reuse, 10), (no_upgrade, 6), (old_slices, 8)] {
            let find = |seed| compare(subject, profile, &random(seed, 80)).unwrap().difference;
            let found = (0..40).find_map(find).expect("noticed");
            assert!(found.script.len() <= longest, "{found}");
            let right = compare(subject, right, &found.script).unwrap();
            assert_eq!(right.difference, None, "the difference is the profile's");
        }
    });
}

#[test]
fn the_lab_has_one_user_and_keeps_to_its_arena() {
    testing::in_child("the_lab_has_one_user_and_keeps_to_its_arena", DEADLINE, || {
        let arena = mmu_check::diff::step::arena();
        let lab = lab::Lab::open(arena).unwrap();
        assert!(lab::Lab::open(arena).is_err());
        let outside = mmu_notifier::Range::new(arena.end(), 4096).unwrap();
        assert_eq!(lab.call(&lab::Call::Unmap(outside)), Err(lab::Errno::INVAL));
        assert_eq!(lab.call(&lab::Call::Store(arena.first_page(), 1)), Err(lab::Errno::FAULT));
        drop(lab);
        lab::Lab::open(arena).unwrap();
    });
}
