// SPDX-License-Identifier: MIT OR Apache-2.0
//! softmm beside the running kernel, path by path and at random; and a wrong softmm, which must be noticed.

use hostmm::capability::Capability;
use hostmm::{lab, testing};
use mmu_check::diff::paths::{self, Path};
use mmu_check::diff::script::{Op, random};
use mmu_check::diff::subject::{Subject, missing};
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

fn may(needs: Capability) -> bool {
    missing(needs).is_none()
}

/// Both sides agree.
fn agree(subject: &mut Subject, what: &str, script: &[Op]) -> Compared {
    let compared = compare(subject, KernelProfile::V6_18, script).unwrap();
    if let Some(difference) = &compared.difference {
        panic!("{what}: {difference}");
    }
    compared
}

#[test]
fn every_path_of_the_checker_has_a_script_or_a_reason() {
    let scripts = paths::all();
    for path in mmu_check::PATHS {
        let scripted = scripts.iter().any(|script| script.covers.contains(&path.name));
        let reasoned = paths::WITHOUT_SCRIPT.iter().any(|(name, why)| *name == path.name && !why.is_empty());
        assert!(scripted != reasoned, "{}: scripted {scripted}, reason {reasoned}", path.name);
    }
    for name in scripts.iter().flat_map(|script| script.covers) {
        assert!(mmu_check::path::named(name).is_some(), "{name} is no path");
    }
}

#[test]
fn each_path_by_hand_agrees() {
    live("each_path_by_hand_agrees", |subject| {
        let (mut heard, mut declared) = (Vec::new(), Vec::new());
        for Path { name, ranges, script, .. } in paths::all() {
            if !script.iter().filter_map(Op::needs).all(testing::require) {
                continue;
            }
            let compared = agree(subject, name, &script);
            if compared.unprovoked + compared.passing > 0 {
                // The machine was too busy for reclaim or ksmd to do their part.
                println!("not provoked: {name}: {compared:?}");
                continue;
            }
            heard.push((name, compared.ranges));
            declared.push((name, ranges));
        }
        assert_eq!(heard, declared);
    });
}

#[test]
fn random_operations_agree() {
    live("random_operations_agree", |subject| {
        let mut all = Compared::default();
        for seed in 0..25 {
            all.add(agree(subject, &format!("seed {seed}"), &random(seed, 80, may)));
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
        let old_slices = KernelProfile { mprotect: KernelProfile::V5_10.mprotect, ..right };
        let charged = KernelProfile { mprotect_unaccounts: false, ..right };
        let wrong = [("pair", unwrapped, 4), ("slices", old_slices, 8), ("charge", charged, 8)];
        for (name, profile, longest) in wrong {
            // What any machine can do, so that the scripts are the same everywhere.
            let find = |seed| compare(subject, profile, &random(seed, 80, |_| false)).unwrap().difference;
            let found = (0..600).find_map(find).unwrap_or_else(|| panic!("{name} was not noticed"));
            assert!(found.script.len() <= longest, "{name}: {found}");
            let right = compare(subject, right, &found.script).unwrap();
            assert_eq!(right.difference, None, "{name}: the difference is the profile's");
        }
    });
}

/// Each path has a script that notices when softmm takes it as another kernel does.
#[test]
fn a_wrong_path_is_noticed_by_a_script() {
    live("a_wrong_path_is_noticed_by_a_script", |subject| {
        let right = KernelProfile::V6_18;
        let wrong = [
            ("no un-sharing", KernelProfile { read_pin_unshares: false, ..right }, None),
            ("no copy at fork", KernelProfile { fork_copies_pinned: false, ..right }, None),
            (
                "pins do not count",
                KernelProfile { reclaim_spares_pinned: false, ..right },
                Some(Capability::Zram),
            ),
            (
                "probes replace",
                KernelProfile { uprobes: KernelProfile::V5_10.uprobes, ..right },
                Some(Capability::Uprobes),
            ),
            (
                "long pins of files",
                KernelProfile { longterm_refuses_files: false, ..right },
                Some(Capability::DiskFile),
            ),
            (
                "dirty pages of files are written and dropped",
                KernelProfile { reclaim_writes_files: true, ..right },
                Some(Capability::Zram),
            ),
            ("no MADV_FREE", KernelProfile { madvise_free: false, ..right }, Some(Capability::Zram)),
            (
                "no pair",
                KernelProfile { unmap: KernelProfile::V4_12.unmap, ..right },
                Some(Capability::DiskFile),
            ),
        ];
        for (name, profile, needs) in wrong {
            if !needs.is_none_or(testing::require) {
                continue;
            }
            let able = |path: &Path| path.needs().into_iter().all(may);
            let found = paths::all()
                .into_iter()
                .filter(able)
                .find_map(|path| compare(subject, profile, &path.script).unwrap().difference);
            assert!(found.is_some(), "{name} was not noticed");
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
