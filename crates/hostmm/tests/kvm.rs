// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kvm source on the running kernel.

use hostmm::kvm::{KvmSource, Options};
use mmu_notifier::Range;

#[test]
fn hears_its_own_munmap() {
    let source = KvmSource::open(&Options { ring: Some(1 << 16), ..Options::default() }).unwrap();
    // SAFETY: a fresh private mapping.
    let p =
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, 3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
    let watch = source.watch(Range::new(p as u64, 4096).unwrap()).unwrap();
    let seq = watch.snapshot().unwrap();
    assert!(!watch.changed_since(seq));
    // SAFETY: unmaps what was mapped above.
    unsafe { libc::munmap(p, 4096) };
    assert!(watch.changed_since(seq));
    assert_eq!(source.health().unwrap().misses, Some(0));
}
