// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handing a source to a process without privileges.

use crate::memory::{Memory, PAGE, forked};
use crate::{SOON, live};
use hostmm::kvm::{CanaryPage, Grant, KvmSource, OpenError, Options};
use hostmm::testing;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

/// Asks for a grant for `canary`, in a helper that is forked now and is gone when this returns.
fn from_helper(options: &Options, canary: mmu_notifier::Range) -> Result<Grant, OpenError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let code = forked(false, || {
        Grant::make(options, canary).unwrap().send(&theirs).unwrap();
        0
    });
    assert_eq!(code, 0);
    Grant::receive(&ours)
}

#[test]
fn nobody_hears_its_own_changes() {
    live("grant::nobody_hears_its_own_changes", || {
        let m = Memory::touched(4 * PAGE);
        let other = Memory::touched(PAGE);
        let canary = CanaryPage::reserve().unwrap();
        let options = Options {
            window: Some(m.range()),
            ring: Some(1 << 16),
            age: true,
            buckets: None,
            ..Options::default()
        };
        let grant = from_helper(&options, canary.range()).unwrap();
        testing::become_nobody();
        assert!(KvmSource::open(&options).is_err(), "nobody cannot open one itself");
        let source = KvmSource::from_grant(grant, canary).unwrap();
        let (tx, rx) = channel();
        let sub = source.subscribe(m.range(), move |n| _ = tx.send(*n)).unwrap();
        let seq = sub.watch().snapshot().unwrap();
        other.unmap();
        assert!(!sub.watch().changed_since(seq), "outside the window");
        m.advise(libc::MADV_DONTNEED);
        assert!(sub.watch().changed_since(seq));
        rx.recv_timeout(SOON).unwrap();
        let seq = sub.watch().snapshot().unwrap();
        m.unmap();
        assert!(sub.watch().changed_since(seq));
        assert_eq!(source.health().unwrap().misses, None);
    });
}

#[test]
fn a_grant_for_another_page_is_refused() {
    live("grant::a_grant_for_another_page_is_refused", || {
        let (mine, other) = (CanaryPage::reserve().unwrap(), CanaryPage::reserve().unwrap());
        let m = Memory::touched(PAGE);
        let options = Options { window: Some(m.range()), ..Options::default() };
        let grant = from_helper(&options, other.range()).unwrap();
        let e = KvmSource::from_grant(grant, mine).unwrap_err();
        assert!(matches!(e, OpenError::Canary(_)), "{e}");
    });
}

#[test]
fn what_is_no_grant_is_refused() {
    use std::io::Write;
    live("grant::what_is_no_grant_is_refused", || {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[0; 32]).unwrap();
        assert!(matches!(Grant::receive(&ours), Err(OpenError::Grant(_))));
        theirs.write_all(&[1; 7]).unwrap();
        drop(theirs);
        assert!(matches!(Grant::receive(&ours), Err(OpenError::Grant(_))));
        assert!(matches!(Grant::receive(&ours), Err(OpenError::Grant(_))));
    });
}
