// SPDX-License-Identifier: MIT OR Apache-2.0
//! Paths of the table with another user of the device: one that binds the page while the path runs, takes it away, or closes
//! the driver. What they are for is mutation: with a page that is bound and used before, no fault of the device is in flight when
//! the first notification comes, and nobody takes the locks of binding and closing.

use super::{Path, User, cow, exit, file, ksm, mapping, swap, uprobe};

const fn bind(path: Path, name: &'static str) -> Path {
    Path { name, user: User::Binds, ..path }
}

const fn unbind(path: Path, name: &'static str) -> Path {
    Path { name, user: User::Unbinds, ..path }
}

const fn close(path: Path, name: &'static str) -> Path {
    Path { name, user: User::Closes, ..path }
}

/// Each path that notifies in its own way, by a user of each kind; and MADV_FREE, which the kernels of the table's question did not
/// have.
pub static VARIANTS: &[Path] = &[
    mapping::FREE,
    bind(mapping::DONTNEED, "dontneed-bind"),
    bind(cow::AFTER_FORK, "cow-bind"),
    bind(ksm::REPLACE, "ksm-replace-bind"),
    bind(swap::OUT, "swap-out-bind"),
    bind(swap::AGE, "age-bind"),
    bind(file::WRITEBACK, "writeback-bind"),
    bind(file::TRUNCATE, "truncate-bind"),
    bind(uprobe::INSERT, "uprobe-insert-bind"),
    bind(exit::EXIT, "exit-bind"),
    unbind(ksm::REPLACE, "ksm-replace-unbind"),
    unbind(swap::AGE, "age-unbind"),
    unbind(exit::EXIT, "exit-unbind"),
    close(mapping::DONTNEED, "dontneed-close"),
    close(ksm::REPLACE, "ksm-replace-close"),
    close(swap::OUT, "swap-out-close"),
];
