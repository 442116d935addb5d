// SPDX-License-Identifier: MIT OR Apache-2.0
//! Uprobes: a breakpoint comes into a page of text, and goes again.

use super::{ANON, Path, X};
use softmm::{MapKind, Prot};

pub(super) const INSERT: Path = Path {
    name: "uprobe-insert",
    kernel: "uprobe_register, install_breakpoint",
    writable: false,
    prepare: |cx, s| {
        s.of_file(cx, Prot::Read, MapKind::Private);
        s.load(cx, X);
    },
    run: |cx, s| s.probe(cx),
    ..ANON
};

pub(super) const REMOVE: Path = Path {
    name: "uprobe-remove",
    kernel: "uprobe_unregister over memory that was made writable",
    writable: true,
    prepare: |cx, s| {
        s.of_file(cx, Prot::Read, MapKind::Private);
        s.load(cx, X);
        s.probe(cx);
        s.protect(cx, Prot::ReadWrite);
    },
    run: |cx, s| s.unprobe(cx),
    ..INSERT
};
