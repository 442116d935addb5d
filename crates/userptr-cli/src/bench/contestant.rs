// SPDX-License-Identifier: MIT OR Apache-2.0
//! The caches that are measured, behind one face. The device keeps nothing, so that what is measured is the cache and
//! its source.

use std::hint::black_box;
use std::sync::Arc;

use hostmm::kvm::{self, KvmSource};
use hostmm::peer::ucx::{Rcache, Registrar};
use hostmm::primary::{HostMm, Source};
use hostmm::race::Subject;
use hostmm::uffd::{self, UffdSource};
use interleave::MaySleep;
use mmu_notifier::{Access, Range};
use serde::{Deserialize, Serialize};
use userptr::RegistrationCache;
use userptr::cache::Options;
use userptr::device::{Device, DeviceAddr, DeviceError, Hold, Limits};
use userptr::source::AnonymousUffd;

pub(super) const PAGE: usize = mmu_notifier::PAGE_SIZE as usize;
/// Records of the kvm source; a bound for its callbacks, not for correctness.
const RING: u32 = 1 << 20;

/// How lookups ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum How {
    /// Each for itself.
    Strict,
    /// Each, about system calls that have returned.
    Ordered,
    /// 64 share one question.
    Batch,
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Side {
    /// `ucs_rcache`.
    Ucx,
    /// Ours over the kvm source.
    Kvm,
    /// Ours over the uffd source.
    Uffd,
}

impl Side {
    pub(super) const ALL: [Side; 3] = [Side::Ucx, Side::Kvm, Side::Uffd];

    pub(super) fn name(self) -> &'static str {
        match self {
            Side::Ucx => "ucx",
            Side::Kvm => "kvm",
            Side::Uffd => "uffd",
        }
    }

    pub(super) fn named(name: &str) -> Option<Side> {
        Side::ALL.into_iter().find(|side| side.name() == name)
    }

    /// The ways of asking that differ. (To the kvm source they are one.)
    pub(super) fn hows(self) -> &'static [How] {
        match self {
            Side::Ucx | Side::Kvm => &[How::Strict],
            Side::Uffd => &[How::Strict, How::Batch, How::Ordered],
        }
    }
}

/// A registration cache.
pub(super) trait Contestant: Sync {
    /// Gets ready for so many registrations, if it has to; may forget those of before.
    fn make_room(&mut self, _: usize) -> Result<(), String> {
        Ok(())
    }

    /// Looks up and lets go of one page at each address.
    fn look_up(&self, how: How, pages: &[usize]) -> Result<(), String>;

    /// Looks up and lets go. Was it a hit?
    fn hits(&self, addr: usize, len: usize) -> Result<bool, String>;

    /// Registrations made so far.
    fn registered(&self) -> u64;
}

/// A device that keeps nothing.
pub(super) struct Nothing;

impl<S: Source> Device<HostMm<S>> for Nothing {
    type Pages = Range;
    type Mapping = Range;
    const HOLD: Hold = Hold::Coherent;

    fn limits(&self) -> Limits {
        Limits { mappings: u32::MAX, bytes: u64::MAX }
    }

    fn get_pages(
        &self,
        _: &mut MaySleep<'_>,
        _: &HostMm<S>,
        range: Range,
        _: Access,
    ) -> Result<Range, DeviceError> {
        Ok(range)
    }

    fn put_pages(&self, _: &mut MaySleep<'_>, _: Range, _: bool) {}

    fn map(
        &self,
        _: &mut MaySleep<'_>,
        range: Range,
        _: Option<DeviceAddr>,
    ) -> Result<Range, (DeviceError, Range)> {
        Ok(range)
    }

    fn address(&self, range: &Range) -> DeviceAddr {
        DeviceAddr(range.start())
    }

    fn wait_idle(&self, _: &mut MaySleep<'_>, _: &Range) {}

    fn unmap(&self, _: &mut MaySleep<'_>, range: Range) -> Range {
        range
    }
}

pub(super) struct Ours<S: Source + 'static>(RegistrationCache<HostMm<S>, Nothing>);

/// The default, or more if that is asked for.
fn options(registrations: usize) -> Options {
    let default = Options::default();
    // As much again as a fraction: what is dead and not reaped yet takes room too.
    let entries = default.entries.max(registrations + registrations / 8);
    Options { entries, bytes: 1 << 40, ..default }
}

impl<S: Source + 'static> Ours<S> {
    pub(super) fn new(source: S) -> Result<Ours<S>, String> {
        let mm = HostMm::new(source, 1).map_err(|e| e.to_string())?;
        RegistrationCache::new(Arc::new(mm), Nothing, options(0)).map(Ours).map_err(|e| e.to_string())
    }
}

pub(super) fn kvm_source() -> Result<KvmSource, String> {
    let options = kvm::Options { ring: Some(RING), ..kvm::Options::default() };
    KvmSource::open(&options).map_err(|e| format!("the kvm source does not open: {e}"))
}

pub(super) fn uffd_source() -> Result<AnonymousUffd, String> {
    // The measurement registers neighbours, which share their VMA; a budget for the worst case would stop it.
    let options = uffd::Options { vma_budget: Some(usize::MAX), ..uffd::Options::default() };
    let source = UffdSource::open(&options).map_err(|e| format!("the uffd source does not open: {e}"))?;
    AnonymousUffd::new(source).map_err(|e| e.to_string())
}

impl<S: Source + 'static> Contestant for Ours<S> {
    fn make_room(&mut self, registrations: usize) -> Result<(), String> {
        let cache = RegistrationCache::new(Arc::clone(self.0.mm()), Nothing, options(registrations));
        self.0 = cache.map_err(|e| e.to_string())?;
        Ok(())
    }

    #[inline]
    fn look_up(&self, how: How, pages: &[usize]) -> Result<(), String> {
        let cache = &self.0;
        match how {
            How::Batch => {
                let batch = cache.batch().map_err(|e| e.to_string())?;
                let mut missed = 0;
                batch.lookup_all(pages.iter().map(|addr| (*addr, PAGE)), Access::Write, |_, found| {
                    missed += u64::from(found.is_none());
                    black_box(found.map(|found| found.rights()));
                });
                drop(batch);
                if missed > 0 { self.look_up(How::Ordered, pages) } else { Ok(()) }
            }
            How::Strict => {
                for addr in pages {
                    black_box(cache.get(*addr, PAGE, Access::Write).map_err(|e| e.to_string())?.rights());
                }
                Ok(())
            }
            How::Ordered => {
                for addr in pages {
                    let lease = cache.get_ordered(*addr, PAGE, Access::Write);
                    black_box(lease.map_err(|e| e.to_string())?.rights());
                }
                Ok(())
            }
        }
    }

    fn hits(&self, addr: usize, len: usize) -> Result<bool, String> {
        if self.0.lookup(addr, len, Access::Write).is_some() {
            return Ok(true);
        }
        self.0.get(addr, len, Access::Write).map(|_| false).map_err(|e| e.to_string())
    }

    fn registered(&self) -> u64 {
        self.0.stats().map_or(0, |stats| stats.registered + stats.one_shot)
    }
}

/// Registrations for UCX that cost nothing.
pub(super) struct Dummy;

impl Registrar for Dummy {
    fn register(&self, _: usize, _: usize) -> Option<u64> {
        Some(0)
    }

    fn deregister(&self, _: u64) {}
}

impl Contestant for Rcache<Dummy> {
    #[inline]
    fn look_up(&self, _: How, pages: &[usize]) -> Result<(), String> {
        for addr in pages {
            black_box(self.get(*addr, PAGE).map_err(|e| e.to_string())?.token());
        }
        Ok(())
    }

    fn hits(&self, addr: usize, len: usize) -> Result<bool, String> {
        self.get(addr, len).map(|held| !held.is_fresh()).map_err(|e| e.to_string())
    }

    fn registered(&self) -> u64 {
        Rcache::registered(self)
    }
}

/// A contestant in the races. A buffer is looked up once in its life, so any hit is stale.
pub(super) struct Raced<'c, C>(pub(super) &'c C);

impl<C: Contestant> Subject for Raced<'_, C> {
    type Token = Range;

    fn take(&self, range: Range) -> Result<Range, String> {
        self.0.hits(range.start() as usize, range.len() as usize).map(|_| range)
    }

    fn is_current(&self, range: &Range) -> bool {
        // Who cannot tell has nothing cached.
        self.0.hits(range.start() as usize, range.len() as usize).unwrap_or(false)
    }
}
