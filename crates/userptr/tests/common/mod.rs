// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the live tests share: caches over each source, the oracle, memory that is changed underneath, and the control.
#![allow(dead_code, reason = "each test binary uses some of it")]

pub(crate) mod memory;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::kvm::{self, KvmSource};
use hostmm::primary::{HostMm, LiveWatch, Source};
use hostmm::race::Subject;
use hostmm::testing;
use hostmm::uffd::{self, UffdSource};
use mmu_notifier::primary::{CountedBefore, Gone, Invalidate, SubscribeError, Unheard};
use mmu_notifier::{Access, InsideInvalidation, Range};
use userptr::cache::Options;
use userptr::device::io_uring::IoUring;
use userptr::source::AnonymousUffd;
use userptr::{CacheError, Lease, RegistrationCache};

use memory::memfd;

pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

pub(crate) type Cache<S> = RegistrationCache<HostMm<S>, IoUring>;

pub(crate) fn cache<S: Source + 'static>(source: S, options: Options) -> Cache<S> {
    let mm = Arc::new(HostMm::new(source, 1).unwrap());
    RegistrationCache::new(mm, IoUring::new(64).unwrap(), options).unwrap()
}

pub(crate) fn kvm_source() -> KvmSource {
    KvmSource::open(&kvm::Options { ring: Some(1 << 16), ..kvm::Options::default() }).unwrap()
}

pub(crate) fn uffd_source() -> AnonymousUffd {
    AnonymousUffd::new(UffdSource::open(&uffd::Options::default()).unwrap()).unwrap()
}

/// A source that hears nothing and says so to nobody.
pub(crate) struct NoNotifier;
pub(crate) struct Silence(Range);

impl Source for NoNotifier {
    type Delivery = CountedBefore;
    type Watch = Silence;
    const FILES: bool = false;
    const CANNOT_HEAR: &'static [Unheard] = &[];

    fn watch(&self, range: Range, _: Option<Arc<dyn Invalidate>>) -> Result<Silence, SubscribeError> {
        Ok(Silence(range))
    }
}

impl LiveWatch for Silence {
    type Seq = ();

    fn range(&self) -> Range {
        self.0
    }

    fn snapshot(&self) -> Result<(), Gone> {
        Ok(())
    }

    fn changed_since(&self, (): ()) -> bool {
        false
    }

    fn unsubscribe(&self) -> Result<(), InsideInvalidation> {
        Ok(())
    }
}

pub(crate) fn has(capabilities: &[Capability]) -> bool {
    capabilities.iter().all(|c| testing::require(*c))
}

pub(crate) fn has_kvm() -> bool {
    has(&[Capability::DevKvm, Capability::Bpf, Capability::IoUring])
}

pub(crate) fn has_uffd() -> bool {
    has(&[Capability::Userfaultfd, Capability::IoUring])
}

/// Runs `body` over each source, each in a process of its own.
pub(crate) fn over_both(test: &str, kvm: impl FnOnce(), uffd: impl FnOnce()) {
    if has_kvm() {
        testing::in_child(&format!("{test}#kvm"), DEADLINE, kvm);
    }
    if has_uffd() {
        testing::in_child(&format!("{test}#uffd"), DEADLINE, uffd);
    }
}

pub(crate) fn get<S: Source + 'static>(
    cache: &Cache<S>,
    range: Range,
) -> Result<Lease<'_, HostMm<S>, IoUring>, CacheError> {
    cache.get(range.start() as usize, range.len() as usize, Access::Write)
}

/// What the device sees in the first word.
pub(crate) fn see<S: Source + 'static>(cache: &Cache<S>, lease: &Lease<'_, HostMm<S>, IoUring>) -> u64 {
    let file = memfd();
    assert_eq!(cache.device().write_at(&file, 0, lease).unwrap(), lease.len());
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 0).unwrap();
    u64::from_ne_bytes(word)
}

/// Any hit is stale: the page was never asked for since it was mapped.
pub(crate) struct Raced<S: Source + 'static>(pub(crate) Cache<S>);

impl<S: Source + 'static> Subject for Raced<S> {
    type Token = Range;

    fn take(&self, range: Range) -> Result<Range, String> {
        get(&self.0, range).map(|_| range).map_err(|e| e.to_string())
    }

    fn is_current(&self, range: &Range) -> bool {
        self.0.lookup(range.start() as usize, range.len() as usize, Access::Write).is_some()
    }
}

/// Waits for what another thread of ours does by itself.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    assert!(testing::until(|| holds().then_some(())).is_some(), "never: {what}");
}
