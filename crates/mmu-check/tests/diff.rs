// SPDX-License-Identifier: MIT OR Apache-2.0
//! softmm beside the running kernel, path by path and at random; and a wrong softmm, which must be noticed.

use hostmm::capability::Capability;
use hostmm::{lab, testing};
use mmu_check::diff::paths::{self, Path};
use mmu_check::diff::script::{Op, random};
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

/// Both sides agree.
fn agree(subject: &mut Subject, what: &str, script: &[Op]) -> Compared {
    let compared = compare(subject, KernelProfile::V6_18, script).unwrap();
    if let Some(difference) = &compared.difference {
        panic!("{what}: {difference}");
    }
    compared
}

#[test]
fn each_path_by_hand_agrees() {
    live("each_path_by_hand_agrees", |subject| {
        let heard = |path: &Path| (path.name, agree(subject, path.name, &path.script).ranges);
        let heard: Vec<_> = paths::all().iter().map(heard).collect();
        let declared: Vec<_> = paths::all().iter().map(|path| (path.name, path.ranges)).collect();
        assert_eq!(heard, declared);
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
        let old_slices = KernelProfile { mprotect: KernelProfile::V5_10.mprotect, ..right };
        let charged = KernelProfile { mprotect_unaccounts: false, ..right };
        let wrong = [("pair", unwrapped, 4), ("slices", old_slices, 8), ("charge", charged, 8)];
        for (name, profile, longest) in wrong {
            let find = |seed| compare(subject, profile, &random(seed, 80)).unwrap().difference;
            let found = (0..60).find_map(find).unwrap_or_else(|| panic!("{name} was not noticed"));
            assert!(found.script.len() <= longest, "{name}: {found}");
            let right = compare(subject, right, &found.script).unwrap();
            assert_eq!(right.difference, None, "{name}: the difference is the profile's");
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
