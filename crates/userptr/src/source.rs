// SPDX-License-Identifier: MIT OR Apache-2.0
//! The best notifier source that this process can have, chosen at run time.
//!
//! `kvm` hears everything and a check costs two loads; `uffd` needs no privilege, hears less
//! ([`hostmm::uffd::DEAF`]) and a check costs a system call unless lookups share it. Without either there is none:
//! nothing is heard, every subscription is refused, and a cache registers each range for one lease.

use std::fmt;
use std::sync::Arc;

use hostmm::kvm::{self, KvmSource};
use hostmm::page::{Maps, PageError, PidOrSelf};
use hostmm::primary::{HostError, HostMm, KvmWatch, LiveWatch, Source};
use hostmm::uffd::{self, UffdSource};
use mmu_notifier::primary::{After, Count, Gone, Invalidate, SubscribeError, Unheard};
use mmu_notifier::{InsideInvalidation, Range};

/// Bytes of the ring that the callbacks of the kvm source are fed from.
const RING: u32 = 1 << 17;

/// userfaultfd, for the memory about which it tells everything that makes a pin stale: private and anonymous. What is
/// behind a file or shared can be truncated, punched or detached without an event; it is refused.
///
/// Two things remain that the program does to its own pages and must tell by itself
/// ([`RegistrationCache::invalidate`](crate::RegistrationCache::invalidate)): guard pages (MADV_GUARD_INSTALL), and a
/// right that it takes away (mprotect).
#[derive(Debug)]
pub struct AnonymousUffd {
    source: UffdSource,
    maps: Maps,
}

impl AnonymousUffd {
    /// With the mappings of this process.
    ///
    /// # Errors
    /// [`PageError`], if they cannot be read.
    pub fn new(source: UffdSource) -> Result<AnonymousUffd, PageError> {
        Ok(AnonymousUffd { source, maps: Maps::open(PidOrSelf::Myself)? })
    }
}

impl Source for AnonymousUffd {
    type Delivery = After;
    type Watch = uffd::Watch;
    const FILES: bool = false;
    const CANNOT_HEAR: &'static [Unheard] = <UffdSource as Source>::CANNOT_HEAR;

    fn watch(
        &self,
        range: Range,
        callback: Option<Arc<dyn Invalidate>>,
    ) -> Result<uffd::Watch, SubscribeError> {
        let watch = Source::watch(&self.source, range, callback)?;
        // Asked last: what is mapped over it from here on is heard.
        let vmas = self.maps.in_range(range);
        let vmas = vmas.map_err(|e| SubscribeError::Source { range, source: e.into() })?;
        match vmas.iter().find(|vma| vma.shared || vma.inode != 0) {
            None => Ok(watch),
            Some(vma) => {
                let kind = if vma.shared { "shared" } else { "of a file" };
                let why = format!(
                    "{} is {kind}: userfaultfd does not tell when it is truncated, punched or detached; the kvm \
                     source does",
                    vma.range.intersection(range).unwrap_or(range)
                );
                Err(SubscribeError::Unsupported { range, why })
            }
        }
    }

    fn settle(&self) -> Result<(), Gone> {
        self.source.settle()
    }

    #[inline]
    fn era_ordered(&self) -> Option<u64> {
        self.source.era_ordered()
    }
}

/// One of the sources, or none.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a process has one, and every hit would follow the pointer of a box"
)]
pub enum AnySource {
    /// Complete.
    Kvm(KvmSource),
    /// Private anonymous memory; munmap, mremap, madvise.
    Uffd(AnonymousUffd),
    /// Nothing is heard.
    None {
        /// Why not `kvm`.
        kvm: kvm::OpenError,
        /// Why not `uffd`.
        uffd: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl AnySource {
    /// The best that can be had. Sleeps.
    #[must_use]
    pub fn open() -> AnySource {
        let options = kvm::Options { ring: Some(RING), ..kvm::Options::default() };
        match KvmSource::open(&options) {
            Ok(source) => AnySource::Kvm(source),
            Err(kvm) => match AnySource::open_uffd() {
                Ok(source) => AnySource::Uffd(source),
                Err(uffd) => AnySource::None { kvm, uffd },
            },
        }
    }

    fn open_uffd() -> Result<AnonymousUffd, Box<dyn std::error::Error + Send + Sync>> {
        Ok(AnonymousUffd::new(UffdSource::open(&uffd::Options::default())?)?)
    }

    /// `kvm`, `uffd` or `none`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            AnySource::Kvm(_) => "kvm",
            AnySource::Uffd(_) => "uffd",
            AnySource::None { .. } => "none",
        }
    }
}

/// This process's memory, heard through the best source there is, with `pins` pins of its own for callers that want
/// them beside those of a device.
///
/// # Errors
/// [`HostError`], about what is needed besides a source.
pub fn open_mm(pins: u32) -> Result<Arc<HostMm<AnySource>>, HostError> {
    HostMm::new(AnySource::open(), pins).map(Arc::new)
}

/// One range of the source.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the large one is the one to be fast: no indirection")]
pub enum AnyWatch {
    /// Of the kvm source.
    Kvm(KvmWatch),
    /// Of the uffd source.
    Uffd(uffd::Watch),
}

/// A point in the life of a watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnySeq {
    /// Of the kvm source.
    Kvm(kvm::Seq),
    /// Of the uffd source.
    Uffd(uffd::Seq),
}

impl Source for AnySource {
    /// The weakest of them, since it is chosen at run time.
    type Delivery = After;
    type Watch = AnyWatch;
    const FILES: bool = <KvmSource as Source>::FILES;
    /// What the weakest does not hear.
    const CANNOT_HEAR: &'static [Unheard] = <UffdSource as Source>::CANNOT_HEAR;

    fn watch(&self, range: Range, callback: Option<Arc<dyn Invalidate>>) -> Result<AnyWatch, SubscribeError> {
        match self {
            AnySource::Kvm(source) => Source::watch(source, range, callback).map(AnyWatch::Kvm),
            AnySource::Uffd(source) => Source::watch(source, range, callback).map(AnyWatch::Uffd),
            AnySource::None { kvm, uffd } => {
                let missing = format!("a notifier source (kvm: {kvm}; uffd: {uffd})");
                Err(SubscribeError::NotPermitted { range, missing })
            }
        }
    }

    fn settle(&self) -> Result<(), Gone> {
        match self {
            AnySource::Uffd(source) => source.settle(),
            AnySource::Kvm(_) | AnySource::None { .. } => Ok(()),
        }
    }

    #[inline]
    fn era(&self) -> Option<u64> {
        match self {
            AnySource::Kvm(source) => Source::era(source),
            AnySource::Uffd(_) | AnySource::None { .. } => None,
        }
    }

    #[inline]
    fn count(&self, key: u64) -> Option<u64> {
        match self {
            AnySource::Kvm(source) => Source::count(source, key),
            AnySource::Uffd(_) | AnySource::None { .. } => None,
        }
    }

    #[inline]
    fn era_ordered(&self) -> Option<u64> {
        match self {
            AnySource::Kvm(source) => Source::era(source),
            AnySource::Uffd(source) => source.era_ordered(),
            AnySource::None { .. } => None,
        }
    }
}

impl LiveWatch for AnyWatch {
    type Seq = AnySeq;

    fn range(&self) -> Range {
        match self {
            AnyWatch::Kvm(watch) => watch.range(),
            AnyWatch::Uffd(watch) => watch.range(),
        }
    }

    fn snapshot(&self) -> Result<AnySeq, Gone> {
        match self {
            AnyWatch::Kvm(watch) => watch.snapshot().map(AnySeq::Kvm),
            AnyWatch::Uffd(watch) => LiveWatch::snapshot(watch).map(AnySeq::Uffd),
        }
    }

    #[inline]
    fn changed_since(&self, seq: AnySeq) -> bool {
        match (self, seq) {
            (AnyWatch::Kvm(watch), AnySeq::Kvm(seq)) => watch.changed_since(seq),
            (AnyWatch::Uffd(watch), AnySeq::Uffd(seq)) => LiveWatch::changed_since(watch, seq),
            _ => true,
        }
    }

    #[inline]
    fn changed_since_ordered(&self, seq: AnySeq) -> bool {
        match (self, seq) {
            (AnyWatch::Kvm(watch), AnySeq::Kvm(seq)) => watch.changed_since(seq),
            (AnyWatch::Uffd(watch), AnySeq::Uffd(seq)) => watch.changed_since_ordered(seq),
            _ => true,
        }
    }

    fn count_at(&self, seq: AnySeq) -> Option<Count> {
        match (self, seq) {
            (AnyWatch::Kvm(watch), AnySeq::Kvm(seq)) => LiveWatch::count_at(watch, seq),
            _ => None,
        }
    }

    fn unsubscribe(&self) -> Result<(), InsideInvalidation> {
        match self {
            AnyWatch::Kvm(watch) => watch.unsubscribe(),
            AnyWatch::Uffd(watch) => watch.unsubscribe(),
        }
    }
}

impl fmt::Display for AnySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AnySource::None { kvm, uffd } => write!(f, "none (kvm: {kvm}; uffd: {uffd})"),
            other => f.write_str(other.name()),
        }
    }
}
