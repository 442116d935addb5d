// SPDX-License-Identifier: MIT OR Apache-2.0
//! What there is to see of one operation, in terms that both sides share.

use super::script::{PAGES, Who};
use mmu_notifier::{PAGE_SHIFT, PageAddr, Range};
use std::collections::BTreeMap;
use std::fmt;

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// As asked.
    Done,
    /// The word that was loaded.
    Word(u64),
    /// SIGSEGV or SIGBUS.
    Fault,
    /// ENOMEM: a part of the range is not mapped.
    Hole,
    /// EINVAL: the ranges of mremap overlap, or MADV_FREE of a file.
    Invalid,
    /// Another error number.
    Errno(i32),
    /// There was nobody to do it, or nothing to do it to.
    Skipped,
}

/// Which frame is behind a page. Frames are numbered in the order of their first page, the parent's pages before the
/// child's: the kernel's numbers and softmm's have nothing in common but which pages share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// None.
    None,
    /// The zero page.
    Zero,
    /// It is in swap space.
    Swapped,
    /// This one.
    Number(u8),
}

/// One page of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Behind it.
    pub frame: Frame,
    /// Its first word, if it is present and may be read.
    pub word: Option<u64>,
}

/// One operation, seen from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// How it ended.
    pub answer: Answer,
    /// The ranges whose invalidation was announced to who listens to the parent, in order.
    pub heard: Vec<Heard>,
    /// All pages of the arena, the parent's and then, if there is one, the child's.
    pub pages: Vec<Page>,
}

/// An announced range.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// First byte, from the start of the arena.
    pub start: i64,
    /// First byte after it.
    pub end: i64,
}

impl Heard {
    pub(super) fn new(arena: Range, start: u64, end: u64) -> Heard {
        let from = |addr: u64| addr.cast_signed().wrapping_sub(arena.start().cast_signed());
        Heard { start: from(start), end: from(end) }
    }
}

impl fmt::Debug for Heard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if (self.start | self.end) % (1 << PAGE_SHIFT) == 0 {
            write!(f, "[{},{})", self.start >> PAGE_SHIFT, self.end >> PAGE_SHIFT)
        } else {
            write!(f, "bytes [{:#x},{:#x})", self.start, self.end)
        }
    }
}

/// Numbers frames; `F` is whatever names one.
pub(super) struct Frames<F>(BTreeMap<F, u8>);

impl<F: Ord> Frames<F> {
    pub(super) fn new() -> Frames<F> {
        Frames(BTreeMap::new())
    }

    pub(super) fn number(&mut self, frame: F) -> Frame {
        let next = self.0.len() as u8;
        Frame::Number(*self.0.entry(frame).or_insert(next))
    }
}

/// Where the arena lies: across a boundary of 1 GiB, in 512 GiB of address space that nothing else lies in, so that
/// every level of its page tables is its own.
pub fn arena() -> Range {
    const MIDDLE: u64 = 0x2000_4000_0000;
    let half = PAGES / 2;
    // A constant inside user space.
    Range::new(MIDDLE - (half << PAGE_SHIFT), PAGES << PAGE_SHIFT).unwrap_or(Range::ALL)
}

/// Page number `n` of the arena.
pub(super) fn page(n: u64) -> PageAddr {
    let addr = arena().start() + (n.min(PAGES - 1) << PAGE_SHIFT);
    PageAddr::containing(addr).unwrap_or(arena().first_page())
}

impl Step {
    /// How this step, the kernel's, and softmm's `other` differ; `None` if they do not.
    #[must_use]
    pub fn difference(&self, other: &Step) -> Option<String> {
        let mut parts = Vec::new();
        if self.answer != other.answer {
            parts.push(format!("the kernel answers {:?}, softmm {:?}", self.answer, other.answer));
        }
        if self.heard != other.heard {
            parts.push(format!("the kernel notifies {:?}, softmm {:?}", self.heard, other.heard));
        }
        if self.pages.len() != other.pages.len() {
            parts.push("one side has a child and the other has not".into());
        }
        let pages = self.pages.iter().zip(&other.pages).enumerate();
        for (n, (ours, theirs)) in pages.filter(|(_, (a, b))| a != b).take(4) {
            let who = if n < PAGES as usize { Who::Parent } else { Who::Child };
            let n = n % PAGES as usize;
            parts.push(format!("{who:?}'s page {n}: the kernel has {ours:?}, softmm {theirs:?}"));
        }
        if parts.is_empty() { None } else { Some(parts.join("; ")) }
    }
}
