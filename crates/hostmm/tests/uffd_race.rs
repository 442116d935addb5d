// SPDX-License-Identifier: MIT OR Apache-2.0
//! Address reuse across threads: never stale with the probe, and sometimes without, or the race has no teeth.

#[macro_use]
mod uffd_support;

use hostmm::race::{Nothing, Way, churn, reuse};
use hostmm::uffd::raced::{Ordered, Strict};
use uffd_support::*;

live!(without_a_source_every_reuse_is_stale, || {
    let out = reuse(&Nothing, Way::Munmap, 1000, 0).unwrap();
    assert_eq!(out.stale, 1000);
});

live!(reuse_while_in_munmap, || {
    let source = open();
    let mut shown = 0;
    for (rounds, hogs) in [(20_000, 0), (1000, 3)] {
        let strict = reuse(&Strict(source.clone()), Way::Munmap, rounds, hogs).unwrap();
        let control = reuse(&Ordered(source.clone()), Way::Munmap, rounds, hogs).unwrap();
        println!("munmap, {hogs} hogs: strict {strict:?}, control {control:?}");
        assert_eq!(strict.stale, 0);
        shown += control.stale;
    }
    // Summed, for hogs may keep the two threads from ever running at once.
    assert!(shown > 0, "the control has no teeth");
});

live!(reuse_while_in_mremap, || {
    let source = open();
    let strict = reuse(&Strict(source.clone()), Way::Mremap, 20_000, 0).unwrap();
    let control = reuse(&Ordered(source.clone()), Way::Mremap, 20_000, 0).unwrap();
    println!("mremap: strict {strict:?}, control {control:?}");
    assert!(strict.stale == 0 && control.stale > 0, "{strict:?} {control:?}");
});

live!(churn_of_malloc_and_free, || {
    let source = open();
    let mut shown = 0;
    for threads in [1, 2, 4, 8] {
        let strict = churn(&Strict(source.clone()), threads, 20_000).unwrap();
        let control = churn(&Ordered(source.clone()), threads, 20_000).unwrap();
        println!("churn, {threads} threads: strict {strict:?}, control {control:?}");
        assert_eq!(strict.stale, 0);
        // One thread only meets what has returned, which needs no probe.
        assert!(threads > 1 || control.stale == 0, "{control:?}");
        shown += control.stale;
    }
    assert!(shown > 0, "the control has no teeth");
    assert_eq!(source.stats().gave_up, 0);
});
