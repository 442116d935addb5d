// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which changes the `uffd` source hears, how it takes them, and which it does not hear.

#[macro_use]
mod uffd_support;

use hostmm::uffd::{Gone, Watch};
use mmu_notifier::Range;
use uffd_support::*;

live!(an_munmap_is_heard_and_kills_the_watch, || {
    let source = open();
    let range = anon(4);
    let watch = source.watch(range).unwrap();
    let seq = watch.snapshot().unwrap();
    assert!(!watch.changed_since_ordered(seq) && !watch.changed_since_strict(seq));
    unmap(range);
    assert!(watch.changed_since_ordered(seq) && watch.changed_since_strict(seq));
    assert_eq!(watch.snapshot(), Err(Gone::Unmapped));
});
