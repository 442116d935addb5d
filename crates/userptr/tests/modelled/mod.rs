// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of softmm for tests, small enough to explore, and heard as the live sources hear the kernel.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::sync::Arc;

use interleave::MaySleep;
use mmu_notifier::{PAGE_SIZE, Range};
use softmm::{Machine, Mm, Placement, Prot};

pub(crate) type Told = softmm::told::Told;

/// A machine of which little is made anew for each execution.
pub(crate) fn small_machine() -> Arc<Machine> {
    Machine::new(softmm::Config {
        frames: 8,
        tables: 8,
        swap_slots: 0,
        cpus: 1,
        words_per_page: 1,
        ..softmm::Config::default()
    })
}

/// Where the tests have their memory.
pub(crate) fn pages(first: u64, pages: u64) -> Range {
    Range::new((0x100 + first) * PAGE_SIZE, pages * PAGE_SIZE).unwrap()
}

/// Maps `range`, and has `value` in the first word of each page.
pub(crate) fn map(cx: &mut MaySleep<'_>, mm: &Mm, range: Range, value: u64) {
    mm.mmap(cx, Placement::Fixed(range), Prot::ReadWrite).unwrap();
    for page in range.iter_pages() {
        mm.machine().cpus()[0].store(cx, mm, page.get(), value).unwrap();
    }
}
