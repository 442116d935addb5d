// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device: a page table per context, a TLB, accessed and dirty bits, and DMA by frame number.
//!
//! An access goes through the TLB; a miss walks the context's page table and is cached until it is flushed. The table and the TLB
//! know nothing of the mm: whoever forgets to take an entry out, or to flush, leaves the device where it was. A frame that has
//! been freed is found out by its generation ([`softmm::FrameId`]).
//!
//! Invariants
//! * One access (lookup, walk, DMA) is one section under the TLB's lock, which a flush takes: when the flush returns, no
//!   access through an older translation is in flight. A device of which that is not true is modelled by not flushing.
//! * A TLB entry allows no more than the walk that filled it found; a write through an entry that was not dirty walks again, as
//!   on x86, so that the dirty bit is never missed.
//!
//! Lock order: locks of drivers > device TLB > device page table. Both are spin locks: every method here but those that wait for
//! requests (engine.rs) may be called in any context.

use crate::callbacks::Callback;
use crate::counters::Counters;
use crate::engine::Engine;
use crate::observer::{DeviceAccess, DriverBug, Follows, Moment, Observer};
use crate::op::{Binding, DeviceFault, DeviceOp};
use interleave::explore::{SiteKind, mutated};
use interleave::{Atomic, Context, LockClass, MaySleep, SpinLock, WaitQueue};
use mmu_notifier::{Access, PAGE_SIZE, PageAddr, Range};
use softmm::{FrameId, Mm};
use std::collections::BTreeMap;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;

static TLB: LockClass = LockClass::new("device TLB");
static TABLE: LockClass = LockClass::new("device page table");
static ENGINE: LockClass = LockClass::new("device engine");
static PROGRESS: LockClass = LockClass::new("device progress");

/// What a translation leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The frame, and which of its lives.
    pub frame: FrameId,
    /// May the device write?
    pub writable: bool,
    /// Was it used since it was mapped or aged?
    pub accessed: bool,
    /// Was it written?
    pub dirty: bool,
}

/// Where walks of a context begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Root {
    /// The context's own table.
    Own,
    /// The page table of the process (IOMMU with a PASID).
    Process,
    /// A table without entries.
    Empty,
}

type Key = (u32, Binding, PageAddr);

struct Table {
    root: Root,
    entries: BTreeMap<(Binding, PageAddr), Translation>,
}

/// A device. Contexts share its TLB and its engine.
pub struct Device {
    pub(crate) observer: Arc<dyn Observer>,
    tlb: SpinLock<BTreeMap<Key, Translation>>,
    pub(crate) engine: SpinLock<Engine>,
    pub(crate) progress: WaitQueue,
}

impl Device {
    /// A device, with nobody or somebody who looks on.
    pub fn new(observer: Arc<dyn Observer>) -> Arc<Device> {
        Arc::new(Device {
            observer,
            tlb: SpinLock::new(&TLB, BTreeMap::new()),
            engine: SpinLock::new(&ENGINE, Engine::default()),
            progress: WaitQueue::new(&PROGRESS),
        })
    }

    /// Translations cached, of all contexts.
    pub fn cached(&self, cx: &mut impl Context) -> usize {
        self.tlb.lock(cx).len()
    }
}

/// One address space of a device: what a driver maps for one mm.
pub struct DeviceContext {
    device: Arc<Device>,
    id: u32,
    driver: &'static str,
    follows: Follows,
    pub(crate) flushes_at_start: bool,
    mm: Arc<Mm>,
    table: SpinLock<Table>,
    counters: Counters,
}

impl DeviceContext {
    /// For a driver that lives outside of this crate: a context with an empty page table of its own.
    pub fn new(
        cx: &mut MaySleep<'_>,
        device: &Arc<Device>,
        mm: &Arc<Mm>,
        driver: &'static str,
    ) -> DeviceContext {
        DeviceContext::open(cx, device, mm, driver, Root::Own)
    }

    pub(crate) fn open(
        cx: &mut MaySleep<'_>,
        device: &Arc<Device>,
        mm: &Arc<Mm>,
        driver: &'static str,
        root: Root,
    ) -> DeviceContext {
        let id = device.engine.lock(cx).new_context();
        DeviceContext {
            device: device.clone(),
            id,
            driver,
            follows: Follows::Address,
            flushes_at_start: false,
            mm: mm.clone(),
            table: SpinLock::new(&TABLE, Table { root, entries: BTreeMap::new() }),
            counters: Counters::default(),
        }
    }

    /// Mappings follow the page and not the address, by design.
    pub(crate) fn following_pages(self) -> DeviceContext {
        DeviceContext { follows: Follows::Pages, ..self }
    }

    /// Each request begins with a flush of the TLB (batches of a GPU).
    #[track_caller]
    pub(crate) fn flushing_at_start(self) -> DeviceContext {
        DeviceContext { flushes_at_start: !mutated(SiteKind::Flush, Location::caller()), ..self }
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The address space that is mirrored.
    pub fn mm(&self) -> &Arc<Mm> {
        &self.mm
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// What has been counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Tells the observer that the driver broke a rule of its own.
    pub fn bug(&self, bug: DriverBug) {
        self.device.observer.driver_bug(self.driver, bug);
    }

    /// The moment that it is now, for [`Follows::PagesSince`].
    pub fn now(&self) -> Moment {
        self.device.observer.now()
    }

    /// Writes an entry of the page table. What the TLB has cached of an older one stays.
    pub fn map(
        &self,
        cx: &mut impl Context,
        binding: Binding,
        page: PageAddr,
        frame: FrameId,
        writable: bool,
    ) {
        let entry = Translation { frame, writable, accessed: false, dirty: false };
        self.table.lock(cx).entries.insert((binding, page), entry);
    }

    /// Takes entries out of the page table: of `binding`, or of every binding, within `range`. The TLB stays as it is.
    pub fn unmap(
        &self,
        cx: &mut impl Context,
        binding: Option<Binding>,
        range: Range,
    ) -> Vec<(Binding, PageAddr, Translation)> {
        let mut table = self.table.lock(cx);
        let hit = |&(b, page): &(Binding, PageAddr)| {
            binding.is_none_or(|wanted| wanted == b) && range.contains_addr(page.get())
        };
        let keys: Vec<_> = table.entries.keys().copied().filter(hit).collect();
        let taken: Vec<_> = keys
            .iter()
            .filter_map(|key| table.entries.remove(key).map(|entry| (key.0, key.1, entry)))
            .collect();
        self.counters.unbound(taken.len() as u64);
        taken
    }

    /// Forgets cached translations within `range`, of `binding` or of all, and waits for accesses through them.
    #[track_caller]
    pub fn flush(&self, cx: &mut impl Context, binding: Option<Binding>, range: Range) {
        if mutated(SiteKind::Flush, Location::caller()) {
            return;
        }
        self.counters.flushed(1);
        self.device.tlb.lock(cx).retain(|&(context, b, page), _| {
            context != self.id
                || binding.is_some_and(|wanted| wanted != b)
                || !range.contains_addr(page.get())
        });
    }

    /// Switches to another page table. What the TLB has cached stays.
    pub(crate) fn set_root(&self, cx: &mut impl Context, root: Root) {
        self.table.lock(cx).root = root;
    }

    /// The entries of the context's own page table, in order; for oracles and tests.
    pub fn entries(&self, cx: &mut impl Context) -> Vec<(Binding, PageAddr, Translation)> {
        self.table.lock(cx).entries.iter().map(|(&(b, page), &entry)| (b, page, entry)).collect()
    }

    /// What the TLB has cached for this context, in order; for oracles and tests.
    pub fn cached(&self, cx: &mut impl Context) -> Vec<(Binding, PageAddr, Translation)> {
        let tlb = self.device.tlb.lock(cx);
        let own = tlb.iter().filter(|((context, ..), _)| *context == self.id);
        own.map(|(&(_, b, page), &entry)| (b, page, entry)).collect()
    }

    /// Were pages of `range` used? `clear` forgets it in the page table; the TLB stays as it is.
    pub(crate) fn young(&self, cx: &mut impl Context, range: Range, clear: bool) -> bool {
        let mut young = false;
        for ((_, page), entry) in &mut self.table.lock(cx).entries {
            if range.contains_addr(page.get()) {
                young |= entry.accessed;
                entry.accessed &= !clear;
            }
        }
        young
    }

    /// One access of the device; any context. Not for drivers: the hardware calls it, from engine.rs.
    pub(crate) fn access(
        &self,
        cx: &mut impl Context,
        binding: Binding,
        op: DeviceOp,
        follows: Follows,
    ) -> Result<u64, DeviceFault> {
        let access = op.access();
        let fault = |page| DeviceFault::NoTranslation { page, access };
        let Ok(page) = PageAddr::containing(op.addr()) else {
            return Err(fault(Range::ALL.last_page()));
        };
        let word = (op.addr() % PAGE_SIZE / 8) as usize;
        let mut guard = self.device.tlb.lock(cx);
        let (tlb, cx) = guard.split();
        let Some(entry) = self.translate(cx, tlb, (self.id, binding, page), access) else {
            self.counters.faulted(1);
            return Err(fault(page));
        };
        self.counters.accessed(1);
        let seen = DeviceAccess {
            driver: self.driver,
            mm: &self.mm,
            binding,
            page,
            word,
            frame: entry.frame,
            access,
            writable: entry.writable,
            follows,
        };
        self.device.observer.device_access(cx, &seen);
        let frames = self.mm.machine().frames();
        let result = match op {
            DeviceOp::Read(_) => frames.read(entry.frame, word),
            DeviceOp::Write(_, value) => frames.write(entry.frame, word, value).map(|()| value),
        };
        self.device.observer.access_done(cx, &seen, result);
        Ok(result?)
    }

    fn translate(
        &self,
        cx: &mut Atomic<'_>,
        tlb: &mut BTreeMap<Key, Translation>,
        key: Key,
        access: Access,
    ) -> Option<Translation> {
        let enough = |entry: &Translation| access == Access::Read || (entry.writable && entry.dirty);
        if let Some(entry) = tlb.get(&key).filter(|entry| enough(entry)) {
            return Some(*entry);
        }
        let entry = self.walk(cx, (key.1, key.2), access);
        match entry {
            Some(entry) => tlb.insert(key, entry),
            None => tlb.remove(&key),
        };
        entry
    }

    fn walk(&self, cx: &mut Atomic<'_>, at: (Binding, PageAddr), access: Access) -> Option<Translation> {
        let mut table = self.table.lock(cx);
        match table.root {
            Root::Own => {
                let entry = table.entries.get_mut(&at)?;
                if access == Access::Write && !entry.writable {
                    return None;
                }
                entry.accessed = true;
                entry.dirty |= access == Access::Write;
                Some(*entry)
            }
            Root::Process => {
                let (frame, pte) = self.mm.walk(at.1, access)?;
                let (writable, dirty) = (pte.is_writable(), pte.is_dirty());
                Some(Translation { frame, writable, accessed: true, dirty })
            }
            Root::Empty => None,
        }
    }

    pub(crate) fn follows(&self) -> Follows {
        self.follows
    }

    /// The callback that runs had an effect.
    pub fn effect(&self, kind: Callback) {
        self.counters.effect(kind);
    }
}

impl fmt::Debug for DeviceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceContext").field("driver", &self.driver).field("id", &self.id).finish()
    }
}
