// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts by hand: at least one for each path of the mm that a script can take.

mod plain;
mod provoked;

use super::script::{Op, Span, Who::Parent};
use hostmm::capability::Capability;
use hostmm::lab::Backing::{self, Anonymous};
use hostmm::lab::Rights::ReadWrite;

/// A script and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// What it shows.
    pub name: &'static str,
    /// Which of [`crate::PATHS`] it takes, by name.
    pub covers: &'static [&'static str],
    /// How many ranges it announces, so that a script that does nothing cannot pass.
    pub ranges: usize,
    /// The operations.
    pub script: Vec<Op>,
}

/// Paths of [`crate::PATHS`] that no script can take, and why.
pub const WITHOUT_SCRIPT: &[(&str, &str)] = &[
    (
        "cow-in-flight",
        "the mm does what it does in cow, whose scripts stand for it: what differs is that a fault of the device is in flight",
    ),
    (
        "ksm-second-pass",
        "an earlier pass that protected the page and then found it different cannot be provoked, as in ksm-protect; what the \
second does is in the scripts of ksm-replace",
    ),
    ("age", "no range is told, only clear_flush_young, which the live source does not hear"),
    ("xip", "this kernel has DAX in its place (4.0 and later)"),
    (
        "exit",
        "the process that listens cannot hear its own end: release comes once nobody is left to be told; what a child's exit \
leaves to its parent is in the scripts of fork",
    ),
    (
        "oom-reap",
        "the oom killer is for a machine without memory; softmm's sequence is read in the source alone",
    ),
    (
        "ksm-protect",
        "ksmd compares two pages before it write-protects one, so they differ afterwards only if a store comes in between; the \
write protection itself is in the scripts of ksm-replace",
    ),
];

/// All of them.
#[must_use]
pub fn all() -> Vec<Path> {
    let plain = [plain::anonymous(), plain::moves(), plain::files(), provoked::pins()];
    let provoked = [
        provoked::reclaim(),
        provoked::freed(),
        provoked::file_reclaim(),
        provoked::ksm(),
        provoked::disk(),
        provoked::uprobes(),
    ];
    [plain.concat(), provoked.concat()].concat()
}

fn path(name: &'static str, covers: &'static [&'static str], ranges: usize, script: Vec<Op>) -> Path {
    Path { name, covers, ranges, script }
}

impl Path {
    /// What the kernel must have for it.
    #[must_use]
    pub fn needs(&self) -> Vec<Capability> {
        let mut needs: Vec<_> = self.script.iter().filter_map(Op::needs).collect();
        needs.sort();
        needs.dedup();
        needs
    }
}

fn span(first: u64, pages: u64) -> Span {
    Span { first, pages }
}

fn anon(first: u64, pages: u64) -> Op {
    Op::Map(Parent, span(first, pages), ReadWrite, Anonymous)
}

fn file(first: u64, pages: u64, backing: Backing) -> Op {
    Op::Map(Parent, span(first, pages), ReadWrite, backing)
}
