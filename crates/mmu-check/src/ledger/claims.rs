// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the exchange of June 2014 says and asks, retold, and what each comes to in cells.
//!
//! A statement is written as somebody who is sure of it would put it; the cells decide. The memory that a path uses is
//! in [`crate::path`]: what is said of uprobes, say, rests on the mapping that its paths make.

use super::{Claim, Statement, Table, Test, cells};
use crate::answer::Row;
use crate::oracle::Rule;
use crate::path::{PATHS, Path, named};
use crate::scenario::Cell;
use drivers::{Callback, Callbacks, Kind};
use mmu_notifier::Access;
use softmm::KernelProfile;

const V3_16: KernelProfile = KernelProfile::V3_16;
const BARE: KernelProfile = KernelProfile::UNWRAPPED_A;
const V6_18: KernelProfile = KernelProfile::V6_18;

/// The paths that store a pte with set_pte_at_notify.
pub const NOTIFIED: [&str; 9] = [
    "cow",
    "cow-zero",
    "cow-file",
    "fork",
    "ksm-protect",
    "ksm-replace",
    "ksm-clean",
    "uprobe-insert",
    "uprobe-remove",
];

/// An event of the running kernel, and the path that is the same in softmm.
type Live = (&'static str, &'static str);
const ZERO: Live = ("zero_page_write", "cow-zero");
const FILE: Live = ("private_file_cow", "cow-file");
const FORK: Live = ("fork_parent_write/raw", "fork");
const MERGE: Live = ("ksm_merge", "ksm-replace");
const INSERT: Live = ("uprobe_insert/raw", "uprobe-insert");
const REMOVE: Live = ("uprobe_remove/raw", "uprobe-remove");

fn named_paths(names: &[&str]) -> Vec<&'static Path> {
    names.iter().filter_map(|name| named(name)).collect()
}

fn all_but(names: &[&str]) -> Vec<&'static Path> {
    PATHS.iter().filter(|path| !names.contains(&path.name)).collect()
}

const fn write(kind: &'static Kind) -> Row {
    Row { kind, access: Access::Write }
}

const fn read(kind: &'static Kind) -> Row {
    Row { kind, access: Access::Read }
}

const I915: Row = write(&drivers::i915_v3_16::MENDED);
const I915_RO: Row = read(&drivers::i915_v3_16_ro::KIND);
const I915_4_19: Row = write(&drivers::i915_v4_19::KIND);
const I915_5_13: Row = write(&drivers::i915_v5_13::KIND);
const I915_5_13_RO: Row = read(&drivers::i915_v5_13::KIND);
const KVM: Row = write(&drivers::kvm_v3_16::KIND);
const KVM_RO: Row = read(&drivers::kvm_v3_16::KIND);
const VFIO: Row = write(&drivers::vfio::KIND);
const VFIO_RO: Row = read(&drivers::vfio::KIND);
const ODP: Row = write(&drivers::rdma_odp::KIND);
const EVERYTHING: &Kind = &drivers::design_drop_everything::KIND;
const EXACT: &Kind = &drivers::design_exact_start_only::KIND;
const SEQUENCE: &Kind = &drivers::design_start_with_seq::KIND;
const ATOMIC: &Kind = &drivers::design_atomic_change_pte::KIND;
const FLAG: &Kind = &drivers::design_flag_change_pte::KIND;

/// The five designs, binding for reading, which is the harder case.
pub const DESIGNS: [Row; 5] = [read(EVERYTHING), read(EXACT), read(SEQUENCE), read(ATOMIC), read(FLAG)];

fn with_pair(cell: &Cell) -> Cell {
    Cell { profile: V3_16, ..*cell }
}

fn without_pair(cell: &Cell) -> Cell {
    Cell { profile: BARE, ..*cell }
}

fn exact(cell: &Cell) -> Cell {
    Cell { kind: EXACT, ..*cell }
}

fn sequence(cell: &Cell) -> Cell {
    Cell { kind: SEQUENCE, ..*cell }
}

fn says(text: &'static str, test: Test, about: Vec<Cell>) -> Statement {
    Statement { says: text, about, test, bound: 1 }
}

/// Each driver of `rows` without `callback`, and with all that it has.
fn on_and_off(rows: &[Row], callback: Callback, paths: &[&str], profile: KernelProfile) -> Vec<Cell> {
    let with = cells(rows, &named_paths(paths), &[profile]);
    let has = |cell: &&Cell| cell.kind.callbacks.contains(callback);
    let without: Vec<Cell> =
        with.iter().filter(has).map(|cell| cell.with(Callbacks::ALL.without(callback))).collect();
    with.into_iter().chain(without).collect()
}

/// All of them.
pub fn claims() -> Vec<Claim> {
    let claim = |number, title, statements, table, live: &'static [Live]| Claim {
        number,
        title,
        statements,
        table,
        live,
    };
    let notified = named_paths(&NOTIFIED);
    // One of each kind: what the CPU writes, what KSM does, what uprobes do; then those and one of each other kind.
    let few = named_paths(&["cow", "cow-file", "ksm-replace", "uprobe-insert", "uprobe-remove"]);
    let all = all_but(&[]);
    vec![
        claim(
            1,
            "Does i915's userptr care about change_pte?",
            vec![
                says(
                    "Where the pair stands around it, a change_pte callback still has something to do.",
                    Test::Effective(Callback::ChangePte),
                    cells(&[KVM_RO, read(ATOMIC), read(FLAG)], &few, &[V3_16]),
                ),
                says(
                    "Without the pair it has something to do.",
                    Test::Effective(Callback::ChangePte),
                    cells(&[KVM_RO, read(ATOMIC), read(FLAG)], &few, &[BARE]),
                ),
                says(
                    "i915, which has no change_pte, is right on every path that calls it.",
                    Test::Right,
                    cells(&[I915, I915_RO, I915_5_13_RO], &notified, &[V3_16, BARE]),
                ),
            ],
            Some(Table::Worth),
            &[ZERO, FILE, MERGE, INSERT],
        ),
        claim(
            2,
            "Which is the best way to do it? (Doing all at invalidate_range_start seems more than is needed.)",
            vec![
                says(
                    "A design that only binds for writing, where the device pins, is right whatever it hooks.",
                    Test::Right,
                    cells(&DESIGNS.map(|row| write(row.kind)), &all, &[BARE]),
                ),
                says(
                    "A design that binds for reading too is right.",
                    Test::Right,
                    cells(&DESIGNS, &all, &[V3_16, BARE]),
                ),
            ],
            Some(Table::Cost),
            &[],
        ),
        claim(
            3,
            "Should it hook more notifiers than invalidate_range_start?",
            vec![
                says(
                    "invalidate_range_start alone is enough while the process lives.",
                    Test::Right,
                    cells(
                        &[I915, write(EXACT)],
                        &named_paths(&[
                            "cow",
                            "ksm-clean",
                            "uprobe-remove",
                            "swap-out",
                            "writeback",
                            "mprotect",
                            "truncate",
                            "munmap",
                            "dontneed",
                        ]),
                        &[V3_16],
                    ),
                ),
                says(
                    "Nobody needs release at exit.",
                    Test::Right,
                    on_and_off(
                        &[I915, I915_4_19, write(EXACT), write(SEQUENCE), KVM],
                        Callback::Release,
                        &["exit"],
                        V3_16,
                    ),
                ),
                says(
                    "Who has a sequence can do without invalidate_range_end.",
                    Test::Right,
                    on_and_off(
                        &[write(SEQUENCE), read(SEQUENCE), KVM],
                        Callback::End,
                        &["cow-file", "dontneed", "munmap"],
                        V3_16,
                    ),
                ),
            ],
            Some(Table::Minimal),
            &[("madv_dontneed/raw", "dontneed"), ("truncate/raw", "truncate")],
        ),
        claim(
            4,
            "Can the invalidate_range_start/end pair around the four callers of set_pte_at_notify go?",
            vec![says(
                "Nothing breaks without the pair that does not break with it.",
                Test::NoWorseThan(with_pair),
                cells(
                    &[I915, I915_RO, I915_5_13_RO, KVM_RO, ODP, read(SEQUENCE), read(ATOMIC), read(FLAG)],
                    &notified,
                    &[BARE, KernelProfile::UNWRAPPED_B, KernelProfile::UNWRAPPED_C],
                ),
            )],
            None,
            &[FORK, MERGE],
        ),
        claim(
            5,
            "A callback that may not sleep takes a mutex: does it matter?",
            vec![
                says(
                    "change_pte may take a mutex.",
                    Test::Keeps(Rule::Context),
                    cells(&[write(&drivers::i915_sleeping::CHANGE_PTE)], &notified, &[V3_16, BARE]),
                ),
                says(
                    "invalidate_page may take a mutex.",
                    Test::Keeps(Rule::Context),
                    cells(
                        &[write(&drivers::i915_sleeping::INVALIDATE_PAGE)],
                        &named_paths(&["swap-out", "writeback"]),
                        &[V3_16, KernelProfile::V4_12, KernelProfile::V4_14],
                    ),
                ),
            ],
            None,
            &[],
        ),
        claim(
            6,
            "KSM does not merge a page that get_user_pages has returned.",
            vec![says(
                "What KSM does leaves a device right that pins its page and hears nothing.",
                Test::Right,
                cells(
                    &[VFIO, VFIO_RO],
                    &named_paths(&["ksm-replace", "ksm-clean"]),
                    &[V3_16, KernelProfile::V5_10, V6_18],
                ),
            )],
            None,
            &[MERGE],
        ),
        claim(
            7,
            "Uprobes touch nothing but program text, so a driver need not care.",
            vec![
                says(
                    "Nobody hears of a uprobe in a private mapping of a file that is read as data (uprobe-insert) or has been \
                     made writable since (uprobe-remove).",
                    Test::Unheard,
                    cells(&[KVM_RO], &named_paths(&["uprobe-insert", "uprobe-remove"]), &[V3_16, V6_18]),
                ),
                says(
                    "A uprobe leaves a device right that pins its page and hears nothing.",
                    Test::Right,
                    cells(
                        &[VFIO, VFIO_RO],
                        &named_paths(&["uprobe-insert", "uprobe-remove"]),
                        &[V3_16, KernelProfile::V5_10, V6_18],
                    ),
                ),
            ],
            None,
            &[INSERT, REMOVE],
        ),
        claim(
            8,
            "invalidate_page comes from writeback, page ageing, swapping and execute-in-place, and from nowhere else.",
            vec![
                says(
                    "Each of these four calls it.",
                    Test::Called(Callback::Page),
                    cells(&[KVM], &named_paths(&["writeback", "age", "swap-out", "xip"]), &[V3_16]),
                ),
                Statement {
                    bound: 0,
                    ..says(
                        "No other path calls it (left out: ksm-clean and what it begins with, a swap-out; file-reclaim, which is the swapping of files).",
                        Test::Silent(Callback::Page),
                        // All the callers of set_pte_at_notify, and whatever else there is a path for.
                        cells(
                            &[write(&drivers::i915_sleeping::INVALIDATE_PAGE), KVM],
                            &all_but(&["writeback", "age", "swap-out", "xip", "ksm-clean", "file-reclaim"]),
                            &[V3_16, KernelProfile::UNWRAPPED_B, KernelProfile::UNWRAPPED_C],
                        ),
                    )
                },
            ],
            None,
            &[("fsync_writeback/raw", "writeback"), ("madv_pageout_swap/raw", "swap-out")],
        ),
        claim(
            9,
            "get_user_pages breaks copy-on-write by itself, so a pinned page stays the process's own.",
            vec![says(
                "A page that was pinned once stays right for a device that hears nothing.",
                Test::Right,
                cells(
                    &[VFIO, VFIO_RO],
                    &named_paths(&["cow", "cow-zero", "cow-file", "fork"]),
                    &[V3_16, KernelProfile::V5_10, V6_18],
                ),
            )],
            None,
            &[FORK, ZERO, FILE],
        ),
        claim(
            10,
            "Start with too much: solid foundations first, cleverness later.",
            vec![
                says(
                    "Dropping everything at any start is right.",
                    Test::Right,
                    cells(&[read(EVERYTHING)], &all, &[V3_16]),
                ),
                says(
                    "Dropping everything breaks nothing that dropping the exact range does not break.",
                    Test::NoWorseThan(exact),
                    cells(&[read(EVERYTHING)], &all, &[V3_16]),
                ),
                says(
                    "Dropping everything breaks nothing that a start with a sequence does not break.",
                    Test::NoWorseThan(sequence),
                    cells(&[read(EVERYTHING)], &all, &[V3_16]),
                ),
            ],
            None,
            &[],
        ),
        claim(
            11,
            "The pair is expensive.",
            vec![
                says(
                    "The pair takes a page from the device that it keeps without the pair.",
                    Test::UnbindsMoreThan(without_pair),
                    cells(&[I915, I915_RO, KVM_RO, read(SEQUENCE), read(ATOMIC)], &few, &[V3_16]),
                ),
                says(
                    "And in vain: without the pair the same driver is no worse.",
                    Test::UnbindsInVain(without_pair),
                    cells(&[I915, I915_RO, KVM_RO, read(SEQUENCE), read(ATOMIC)], &few, &[V3_16]),
                ),
            ],
            None,
            &[],
        ),
        claim(
            12,
            "It probably does not matter for i915, but somebody should check.",
            vec![
                says(
                    "For i915 as it was, nothing breaks without the pair that does not break with it.",
                    Test::NoWorseThan(with_pair),
                    cells(&[I915], &notified, &[BARE]),
                ),
                says(
                    "The same of i915 as it became.",
                    Test::NoWorseThan(with_pair),
                    cells(&[I915_RO, I915_5_13, I915_5_13_RO], &notified, &[BARE]),
                ),
                says(
                    "A write pin that i915 takes while fork runs (between its start and its write-protection) is let go of again.",
                    Test::Right,
                    cells(&[I915], &named_paths(&["fork-idle"]), &[V3_16, BARE]),
                ),
            ],
            None,
            &[FORK],
        ),
        claim(
            13,
            "Found on the way: who walks the page table and hears invalidate_range needs nothing else.",
            vec![says(
                "AMD's IOMMUv2 of 3.19 is right without invalidate_page.",
                Test::Right,
                on_and_off(
                    &[write(&drivers::amd_iommu_invalidate_range::KIND_3_19)],
                    Callback::Page,
                    &["swap-out", "writeback", "cow"],
                    KernelProfile::V3_19,
                )
                .into_iter()
                .chain(on_and_off(
                    &[write(&drivers::amd_iommu_invalidate_range::KIND_3_19)],
                    Callback::Page,
                    &["swap-out", "writeback", "cow"],
                    KernelProfile::V4_14,
                ))
                .collect(),
            )],
            None,
            &[],
        ),
        claim(
            14,
            "Found on the way: the workers of i915 4.14 closed the gap between start and change.",
            vec![says(
                "i915 of 4.14 to 4.19 breaks nothing that i915 of 5.13 does not break.",
                Test::NoWorseThan(|cell| Cell { kind: &drivers::i915_v5_13::KIND, ..*cell }),
                cells(
                    &[I915_4_19],
                    &named_paths(&["dontneed", "munmap", "exit", "truncate"]),
                    &[KernelProfile::V4_14],
                ),
            )],
            None,
            &[],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_statement_is_about_something() {
        let claims = claims();
        for claim in &claims {
            assert!(!claim.statements.is_empty(), "{}", claim.number);
            for statement in &claim.statements {
                assert!(!statement.about.is_empty(), "{}: {}", claim.number, statement.says);
            }
        }
        assert!(claims.iter().map(|claim| claim.number).eq(1..=claims.len() as u32));
    }

    #[test]
    fn events_of_the_kernel_stand_beside_paths_that_there_are() {
        let catalogue = hostmm::disturb::catalogue();
        for (event, path) in claims().iter().flat_map(|claim| claim.live) {
            assert!(catalogue.iter().any(|e| e.name == *event), "{event}");
            assert!(named(path).is_some(), "{path}");
        }
    }

    #[test]
    fn the_paths_of_set_pte_at_notify_are_all_there() {
        assert_eq!(named_paths(&NOTIFIED).len(), NOTIFIED.len());
    }
}
