// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts that any machine can run.

use super::{Path, anon, file, path, span};
use crate::diff::script::{Op, Who::Child, Who::Parent};
use hostmm::lab::Backing::{PrivateFile, SharedFile};
use hostmm::lab::Rights::{Read, ReadWrite};

pub(super) fn anonymous() -> Vec<Path> {
    vec![
        path(
            "first touch is silent, a write over the zero page is not",
            &["cow-zero"],
            1,
            vec![anon(4, 4), Op::Store(Parent, 4, 1), Op::Load(Parent, 5), Op::Store(Parent, 5, 2)],
        ),
        path(
            "munmap with a hole, and of nothing",
            &["munmap"],
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
        path(
            "MAP_FIXED over other memory",
            &["munmap"],
            1,
            vec![anon(4, 8), Op::Store(Parent, 6, 1), anon(5, 4), Op::Load(Parent, 6)],
        ),
        path(
            "mprotect",
            &["mprotect"],
            4,
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
        path(
            "mprotect across a page table's end",
            &["mprotect"],
            2,
            vec![
                anon(12, 8),
                Op::Store(Parent, 18, 1),
                Op::Protect(Parent, span(13, 6), Read),
                Op::Store(Parent, 12, 1),
                Op::Protect(Parent, span(12, 8), ReadWrite),
            ],
        ),
        path(
            "MADV_DONTNEED, of nothing and over a hole as well",
            &["dontneed"],
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
        path(
            "fork, copy and reuse",
            &["fork", "cow"],
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

pub(super) fn moves() -> Vec<Path> {
    vec![
        path(
            "mremap: the old place twice, the new one where something was",
            &["mremap"],
            8,
            vec![
                anon(4, 4),
                anon(12, 2),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 12, 2),
                Op::Move(Parent, 4, 20),
                Op::Load(Parent, 20),
                Op::Load(Parent, 4),
                Op::Move(Parent, 20, 12),
                Op::Load(Parent, 12),
                Op::Move(Parent, 5, 6),
                Op::Move(Parent, 5, 5),
                Op::Move(Parent, 4, 9),
            ],
        ),
        path(
            "mremap: a moved page is forked, copied and fetched again",
            &["mremap", "fork", "cow"],
            8,
            vec![
                anon(4, 4),
                Op::Store(Parent, 4, 1),
                Op::Store(Parent, 5, 2),
                Op::Move(Parent, 4, 8),
                Op::Move(Parent, 5, 20),
                Op::Store(Parent, 6, 3),
                Op::Fork,
                Op::Store(Child, 8, 4),
                Op::Store(Parent, 20, 5),
                Op::Move(Child, 20, 4),
                Op::Exit,
                Op::Store(Parent, 8, 6),
            ],
        ),
    ]
}

pub(super) fn files() -> Vec<Path> {
    vec![
        path(
            "private file: first write, write to a page that was read, fault-around",
            &["cow-file"],
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
        path(
            "shared file: truncate twice, hole once, growth not at all",
            &["truncate"],
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
        path(
            "a private copy survives a hole, not a truncation",
            &["truncate"],
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
