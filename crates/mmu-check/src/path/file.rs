// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happens to pages of a file behind the process's back: writeback, reclaim, truncate, and a hole of an XIP file that
//! gets its block.

use super::{ANON, Path, X};
use softmm::{FileKind, MapKind, Prot, Reclaimed};

pub(super) const WRITEBACK: Path = Path {
    name: "writeback",
    kernel: "page_mkclean of a shared file page",
    prepare: |cx, s| {
        s.of_file(cx, Prot::ReadWrite, MapKind::Shared);
        s.store(cx, X, 1);
    },
    run: |cx, s| {
        s.file.fsync(cx);
        s.store(cx, X, 2);
    },
    ..ANON
};

/// No CPU writes it again.
pub(super) const WRITEBACK_ALONE: Path =
    Path { name: "writeback-alone", run: |cx, s| s.file.fsync(cx), ..WRITEBACK };

/// The page is written out and dropped, and read from disk again. Where reclaim leaves the writing to others, they come next, and
/// reclaim once more.
pub(super) const RECLAIM: Path = Path {
    name: "file-reclaim",
    kernel: "try_to_unmap of a shared file page, then filemap_fault",
    run: |cx, s| {
        if s.file.reclaim(cx, 0, true) == Reclaimed::Kept {
            s.file.fsync(cx);
            s.file.reclaim(cx, 0, true);
        }
        s.store(cx, X, 2);
    },
    ..WRITEBACK
};

pub(super) const TRUNCATE: Path = Path {
    name: "truncate",
    kernel: "unmap_mapping_range of a shared file page",
    explicit: true,
    leaves_memory: false,
    run: |cx, s| {
        let _ = s.file.truncate(cx, 0);
    },
    ..WRITEBACK
};

/// The process has read a hole, as zeros; write(2) fills it.
pub(super) const XIP: Path = Path {
    name: "xip",
    kernel: "__xip_unmap: a hole of a private mapping gets its block",
    file: FileKind::Xip,
    prepare: |cx, s| {
        s.of_file(cx, Prot::Read, MapKind::Private);
        s.load(cx, X);
    },
    run: |cx, s| {
        let _ = s.file.write(cx, 0, 0, 2);
        s.load(cx, X);
    },
    writable: false,
    ..ANON
};
