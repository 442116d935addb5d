// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts of pins, and of what the kernel must be made to do: swap out, merge, write back, probe.

use super::{Path, anon, file, path, span};
use crate::diff::script::{Op, Who::Child, Who::Parent};
use hostmm::lab::Backing::{PrivateFile, SharedFile};
use hostmm::lab::Rights::{Read, ReadWrite};

pub(super) fn pins() -> Vec<Path> {
    vec![
        path(
            "a pin for writing breaks copy-on-write, and the page stays",
            &["cow"],
            3,
            vec![
                anon(4, 4),
                Op::Load(Parent, 4),
                Op::Store(Parent, 5, 1),
                Op::Fork,
                Op::Pin(span(4, 3)),
                Op::Store(Parent, 4, 2),
                Op::Store(Parent, 5, 3),
                Op::Store(Child, 5, 4),
                Op::Unpin,
                Op::Store(Parent, 5, 5),
            ],
        ),
        path(
            "fork copies a pinned page for the child",
            &["fork", "cow"],
            2,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 5, 2),
                Op::Pin(span(4, 1)),
                Op::Fork,
                Op::Store(Parent, 4, 3),
                Op::Store(Parent, 5, 4),
                Op::Load(Child, 4),
                Op::Exit,
                Op::Unpin,
            ],
        ),
        path(
            "a pin for reading un-shares a page, not the zero page",
            &["cow"],
            3,
            vec![
                anon(4, 4),
                Op::Load(Parent, 4),
                Op::ReadPinned(Parent, 4),
                Op::Store(Parent, 5, 1),
                Op::Fork,
                Op::ReadPinned(Parent, 5),
                Op::Store(Parent, 5, 2),
                Op::ReadPinned(Child, 5),
                Op::WritePinned(Child, 5, 3),
                Op::WritePinned(Parent, 4, 4),
                Op::ReadPinned(Parent, 20),
            ],
        ),
        path(
            "pins of files: a private page is copied, a hole takes a pinned page",
            &["cow-file", "truncate"],
            3,
            vec![
                file(4, 4, PrivateFile(0)),
                file(8, 4, SharedFile(4)),
                Op::Load(Parent, 4),
                Op::ReadPinned(Parent, 4),
                Op::Pin(span(4, 6)),
                Op::Store(Parent, 8, 1),
                Op::Punch(0, 5),
                Op::Load(Parent, 4),
                Op::Load(Parent, 8),
                Op::Unpin,
                Op::Pin(span(10, 4)),
            ],
        ),
    ]
}

pub(super) fn reclaim() -> Vec<Path> {
    vec![
        path(
            "swap-out, and back by a load and a store",
            &["swap-out"],
            4,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 5, 2),
                Op::PageOut(Parent, 4),
                Op::PageOut(Parent, 5),
                Op::PageOut(Parent, 6),
                Op::Load(Parent, 4),
                Op::Store(Parent, 5, 3),
                Op::PageOut(Parent, 4),
                Op::DontNeed(Parent, span(4, 2)),
                Op::Load(Parent, 4),
            ],
        ),
        path(
            "a pinned page is passed over",
            &["swap-out"],
            1,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 1),
                Op::Pin(span(4, 1)),
                Op::PageOut(Parent, 4),
                Op::Unpin,
                Op::PageOut(Parent, 4),
            ],
        ),
        path(
            "the parent hears of a child's page too: its mapping starts lower, so it is asked first",
            &["swap-out", "fork"],
            3,
            vec![
                anon(4, 8),
                Op::Store(Parent, 8, 7),
                Op::Fork,
                anon(0, 9),
                Op::PageOut(Child, 8),
                Op::Load(Child, 8),
            ],
        ),
        path(
            "swap entries are forked, and both come back",
            &["swap-out", "fork"],
            4,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 5, 2),
                Op::PageOut(Parent, 4),
                Op::PageOut(Parent, 5),
                Op::Fork,
                Op::Load(Parent, 4),
                Op::Load(Child, 4),
                Op::Store(Parent, 4, 3),
                Op::Store(Child, 5, 4),
                Op::Exit,
                Op::Load(Parent, 5),
            ],
        ),
    ]
}

pub(super) fn freed() -> Vec<Path> {
    vec![
        path(
            "MADV_FREE: discarded unless written since, and no swap entry either way",
            &["free"],
            12,
            vec![
                anon(4, 6),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 5, 2),
                Op::Store(Parent, 6, 3),
                Op::PageOut(Parent, 6),
                Op::Load(Parent, 7),
                Op::Free(Parent, span(4, 4)),
                Op::Load(Parent, 4),
                Op::Load(Parent, 6),
                Op::Store(Parent, 5, 4),
                Op::PageOut(Parent, 4),
                Op::PageOut(Parent, 5),
                Op::Load(Parent, 4),
                Op::Load(Parent, 5),
                // Of nothing, over a hole, and of a file.
                Op::Free(Parent, span(8, 1)),
                Op::Free(Parent, span(8, 4)),
                file(16, 2, PrivateFile(0)),
                Op::Free(Parent, span(16, 1)),
                Op::Store(Parent, 4, 5),
                Op::Free(Parent, span(4, 1)),
                Op::WritePinned(Parent, 4, 6),
                Op::PageOut(Parent, 4),
                Op::Load(Parent, 4),
            ],
        ),
        path(
            "MADV_FREE of forked pages and of a pinned one",
            &["free", "fork"],
            10,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 5, 2),
                Op::Fork,
                Op::Free(Parent, span(4, 2)),
                Op::Free(Child, span(5, 1)),
                Op::Store(Child, 4, 3),
                Op::Exit,
                Op::PageOut(Parent, 4),
                Op::PageOut(Parent, 5),
                Op::Load(Parent, 4),
                Op::Load(Parent, 5),
                Op::Store(Parent, 6, 4),
                Op::Pin(span(6, 1)),
                Op::Free(Parent, span(6, 1)),
                Op::PageOut(Parent, 6),
                Op::Unpin,
                Op::PageOut(Parent, 6),
                Op::Load(Parent, 6),
            ],
        ),
    ]
}

pub(super) fn file_reclaim() -> Vec<Path> {
    vec![
        path(
            "reclaim of a file's pages: dirty ones stay in the cache, and fsync finds them there",
            &["file-reclaim"],
            9,
            vec![
                Op::Disk,
                Op::Sync,
                file(4, 4, SharedFile(0)),
                file(10, 4, PrivateFile(0)),
                // Clean, and in the cache alone afterwards; the private mapping may have it as well.
                Op::Load(Parent, 4),
                Op::PageOut(Parent, 4),
                Op::Load(Parent, 4),
                Op::Store(Parent, 5, 1),
                Op::PageOut(Parent, 5),
                Op::Sync,
                Op::Store(Parent, 5, 2),
                Op::Load(Parent, 10),
                // Mapped twice now.
                Op::PageOut(Parent, 4),
                Op::DontNeed(Parent, span(4, 1)),
                Op::PageOut(Parent, 10),
                Op::Store(Parent, 11, 3),
                Op::PageOut(Parent, 11),
                Op::Load(Parent, 11),
                Op::Pin(span(4, 1)),
                Op::PageOut(Parent, 4),
            ],
        ),
        path(
            "reclaim of shmem: swapped out, and fault-around passes over it",
            &["file-reclaim"],
            6,
            vec![
                file(4, 8, SharedFile(0)),
                file(14, 8, PrivateFile(0)),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 5, 2),
                Op::Load(Parent, 6),
                Op::PageOut(Parent, 4),
                Op::PageOut(Parent, 6),
                Op::Load(Parent, 15),
                Op::Load(Parent, 14),
                Op::Load(Parent, 4),
                Op::DontNeed(Parent, span(14, 8)),
                Op::PageOut(Parent, 4),
                Op::Punch(0, 0),
                Op::Load(Parent, 4),
                Op::Pin(span(5, 1)),
                Op::PageOut(Parent, 5),
                Op::Store(Parent, 5, 3),
                Op::Unpin,
                Op::PageOut(Parent, 5),
                Op::Store(Parent, 5, 4),
            ],
        ),
    ]
}

pub(super) fn ksm() -> Vec<Path> {
    vec![
        path(
            "KSM merges, and a store and a pin for reading part",
            &["ksm-replace"],
            5,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 7),
                Op::Store(Parent, 6, 7),
                Op::Merge(4, 6),
                Op::Load(Parent, 4),
                Op::Store(Parent, 4, 8),
                Op::ReadPinned(Parent, 6),
            ],
        ),
        path(
            "MADV_UNMERGEABLE parts what KSM has merged",
            &["ksm-replace"],
            5,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 7),
                Op::Store(Parent, 5, 7),
                Op::Merge(4, 5),
                Op::Unmerge(span(4, 4)),
                Op::Store(Parent, 4, 8),
            ],
        ),
        path(
            "KSM merges clean read-only pages",
            &["ksm-clean"],
            8,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 7),
                Op::Store(Parent, 5, 7),
                Op::PageOut(Parent, 4),
                Op::PageOut(Parent, 5),
                Op::Protect(Parent, span(4, 2), Read),
                Op::Load(Parent, 4),
                Op::Load(Parent, 5),
                Op::Merge(4, 5),
                Op::Protect(Parent, span(4, 2), ReadWrite),
                Op::Store(Parent, 5, 8),
            ],
        ),
        path(
            "a merged page is forked",
            &["ksm-replace", "fork"],
            7,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 7),
                Op::Store(Parent, 5, 7),
                Op::Merge(4, 5),
                Op::Fork,
                Op::Store(Child, 4, 8),
                Op::Store(Parent, 5, 9),
                Op::Exit,
                Op::Store(Parent, 4, 10),
            ],
        ),
    ]
}

pub(super) fn disk() -> Vec<Path> {
    vec![
        path(
            "writeback takes the right to write, once for each dirty page and mapping",
            &["writeback"],
            10,
            vec![
                Op::Disk,
                file(4, 4, SharedFile(0)),
                file(10, 4, SharedFile(0)),
                file(16, 4, PrivateFile(0)),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 5, 2),
                Op::Store(Parent, 10, 3),
                Op::Load(Parent, 16),
                Op::Sync,
                Op::Sync,
                Op::Store(Parent, 5, 4),
                Op::Sync,
                Op::Pin(span(4, 1)),
            ],
        ),
        path(
            "a file on a disk: truncate notifies also when it grows, a hole once",
            &["truncate"],
            5,
            vec![
                Op::Disk,
                file(4, 8, SharedFile(0)),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 9, 1),
                Op::Punch(0, 0),
                Op::Truncate(4),
                Op::Load(Parent, 9),
                Op::Truncate(6),
                // Or else readahead would decide which pages the load finds.
                Op::WriteFile(5, 2),
                Op::Load(Parent, 9),
            ],
        ),
    ]
}

pub(super) fn uprobes() -> Vec<Path> {
    let text = |first| Op::Map(Parent, span(first, 4), Read, PrivateFile(0));
    vec![
        path(
            "a uprobe goes into mappings that are there and that come, and out again",
            &["uprobe-insert", "uprobe-remove"],
            3,
            vec![
                text(4),
                Op::Load(Parent, 4),
                Op::Probe(0),
                Op::Load(Parent, 4),
                text(10),
                Op::Load(Parent, 10),
                Op::Unprobe,
                Op::Load(Parent, 4),
                Op::Load(Parent, 10),
            ],
        ),
        path(
            "a uprobe is removed from memory that was made writable and written",
            &["uprobe-remove"],
            2,
            vec![
                text(4),
                Op::WriteFile(1, 5),
                Op::Probe(1),
                Op::Protect(Parent, span(4, 4), ReadWrite),
                Op::Store(Parent, 4, 3),
                Op::Unprobe,
                Op::Load(Parent, 5),
            ],
        ),
        path(
            "a uprobe goes into a page that was written before it lost the right",
            &["uprobe-insert", "uprobe-remove"],
            2,
            vec![
                text(4),
                Op::Protect(Parent, span(4, 1), ReadWrite),
                Op::Store(Parent, 4, 3),
                Op::Protect(Parent, span(4, 1), Read),
                Op::Probe(0),
                Op::Load(Parent, 4),
                Op::Unprobe,
                Op::Load(Parent, 4),
            ],
        ),
    ]
}
