// SPDX-License-Identifier: MIT OR Apache-2.0
//! An address space of the device, and what is submitted in it.

use std::collections::BTreeMap;
use std::sync::Arc;

use hostmm::primary::{HostMm, Source};
use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::primary::PrimaryMmu;
use mmu_notifier::{Access, Range};

use super::encode::{first_forbidden, forbidden, is_device, slot};
use super::error::KvmError;
use super::fence::KvmFence;
use super::job::{Batch, Place, Slot};
use super::layout::{KERNEL_ROOT, LARGE, Op, SYSTEM};
use super::queue::JOB_SLOTS;
use super::{Inner, KvmDevice};
use crate::device::{Command, Device, DeviceAddr, DeviceError, Engine, Fault, Hold, Limits, SubmitError};

static MAPPINGS: LockClass = LockClass::new("kvm_device_mappings");

/// Where mappings go that cannot have the program's own addresses: nothing of a program is usually there.
const ELSEWHERE: u64 = 0x1000_0000_0000;

/// One address space of a [`KvmDevice`], with an engine that works in it. Contexts of a device take turns.
///
/// Dropped, it kills what is in flight in it, waits until nothing is, and gives its page tables back.
#[derive(Debug)]
pub struct KvmContext {
    device: Arc<Inner>,
    pub(super) root: u64,
    /// Device addresses in use: start, end.
    mappings: Mutex<BTreeMap<u64, u64>>,
}

/// Memory that was present when [`Device::get_pages`] looked. Nothing is held.
#[derive(Debug)]
pub struct KvmPages {
    range: Range,
    access: Access,
}

/// Device addresses that lead to memory of the program. Take it away with [`Device::unmap`], or with the context.
#[derive(Debug)]
pub struct KvmMapping {
    at: DeviceAddr,
    pages: KvmPages,
}

impl KvmMapping {
    /// The device address of its first page.
    #[must_use]
    pub fn address(&self) -> DeviceAddr {
        self.at
    }
}

impl KvmContext {
    /// A new, empty address space.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn new(cx: &mut MaySleep<'_>, device: &KvmDevice) -> Result<KvmContext, KvmError> {
        let device = Arc::clone(&device.inner);
        let root = device.update(cx, Place::Any, |update| update.create().map_err(|_| KvmError::NoTables))?;
        Ok(KvmContext { device, root, mappings: Mutex::new(&MAPPINGS, BTreeMap::new()) })
    }

    /// Lets the device reach the memory at `range`: from `at` on, or else at its own addresses, or where there is room.
    ///
    /// Nothing is held, and nothing has to be there yet. [`Device::map`] does this with pages that were looked at.
    ///
    /// # Errors
    /// [`DeviceError`]; nothing is mapped then.
    pub fn map_range(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        access: Access,
        at: Option<DeviceAddr>,
    ) -> Result<KvmMapping, DeviceError> {
        let refuse =
            |at: u64, why: &str| DeviceError::Address { range, at: DeviceAddr(at), why: why.to_owned() };
        let mut mappings = self.mappings.lock(cx);
        let own = range.start();
        let at = match at {
            Some(at) if !at.0.is_multiple_of(mmu_notifier::PAGE_SIZE) => {
                return Err(refuse(at.0, "it is not the first address of a page"));
            }
            Some(at) => at.0,
            None if is_free(&mappings, own, range.len()) => own,
            None => elsewhere(&mappings, range).ok_or_else(|| refuse(ELSEWHERE, "no room is left"))?,
        };
        if !is_device(at, range.len()) {
            return Err(refuse(at, "there are no such device addresses"));
        }
        if !is_free(&mappings, at, range.len()) {
            return Err(refuse(at, "something is mapped there"));
        }
        let broken = |e: KvmError| device_error(range, e);
        let pieces = self.device.shared.windows.resolve(cx, range).map_err(broken)?;
        let root = self.root;
        let map = |cx: &mut MaySleep<'_>| {
            self.device.update(cx, Place::AnyFlush(root), |update| {
                let mut va = at;
                for (gpa, len) in &pieces {
                    update
                        .map(root, va, *gpa, *len, access == Access::Write)
                        .map_err(|_| KvmError::NoTables)?;
                    va += len;
                }
                Ok(())
            })
        };
        match map(cx) {
            Err(KvmError::NoTables) => {
                self.device
                    .update(cx, Place::AnyFlush(root), |update| {
                        update.prune(root);
                        Ok(())
                    })
                    .map_err(broken)?;
                map(cx).map_err(broken)?;
            }
            other => other.map_err(broken)?,
        }
        mappings.insert(at, at + range.len());
        Ok(KvmMapping { at: DeviceAddr(at), pages: KvmPages { range, access } })
    }

    /// Takes the mapping away, and waits until no access through it is in flight: for all that was submitted before, in
    /// any context. What hangs among that has to be killed.
    pub fn unmap_range(&self, cx: &mut MaySleep<'_>, mapping: KvmMapping) {
        let (at, len) = (mapping.at, mapping.pages.range.len());
        let mut mappings = self.mappings.lock(cx);
        let root = self.root;
        // A device that is lost accesses nothing.
        let _ = self.device.update(cx, Place::AnyFlush(root), |update| {
            update.unmap(root, at.0, len);
            Ok(())
        });
        mappings.remove(&at.0);
    }

    /// Kills every batch of this context that is not done, as [`KvmFence::kill`] does.
    pub fn kill(&self, cx: &mut MaySleep<'_>, why: &str) {
        let shared = &self.device.shared;
        let mut state = shared.queue.lock(cx);
        let mine: Vec<_> = state
            .jobs
            .iter()
            .filter(|job| job.batch.owner() == Some(self.root))
            .map(|job| Arc::clone(&job.batch))
            .collect();
        if mine.is_empty() {
            return;
        }
        state.kills.extend(mine.into_iter().map(|batch| (batch, why.to_owned())));
        drop(state);
        shared.kick();
    }

    /// Holds back whatever is submitted from now on, in any context, until the four bytes at `at` are `value`: a
    /// semaphore that the program or another device signals. If that never happens, kill it.
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn submit_wait(
        &self,
        cx: &mut MaySleep<'_>,
        at: DeviceAddr,
        value: u32,
    ) -> Result<KvmFence, SubmitError> {
        let fault = |addr| Fault { command: 0, addr: DeviceAddr(addr), access: Access::Read };
        let planned = forbidden(at.0, 4).map(fault);
        let wait = Slot { op: Op::WaitDword, src: at.0, len: value.into(), ..Slot::NOP };
        let slots = planned.is_none().then_some(wait);
        self.submit_slots(cx, slots.into_iter(), planned).map_err(submit_error)
    }

    /// Hands over slots as they are: what [`Engine::submit`] refuses, too.
    pub(super) fn submit_slots(
        &self,
        cx: &mut MaySleep<'_>,
        slots: impl ExactSizeIterator<Item = Slot>,
        planned: Option<Fault>,
    ) -> Result<KvmFence, KvmError> {
        let queue = &self.device.shared.queue;
        if !queue.memory.is_owned() {
            return Err(KvmError::Forked);
        }
        let batch = Batch::new(Some(self.root), planned);
        let mut slots = slots;
        let mut index = 0;
        let mut end = 0;
        loop {
            let job = slots.len().min(JOB_SLOTS);
            let take = (0..job).map(|_| slots.next().unwrap_or(Slot::NOP));
            match queue.submit(cx, Place::In(self.root), &batch, index, take).map_err(KvmError::Lost)? {
                Some(position) => end = position,
                None => break,
            }
            index += job;
            if slots.len() == 0 {
                break;
            }
        }
        Ok(KvmFence { device: Arc::clone(&self.device), batch, end })
    }
}

impl Drop for KvmContext {
    fn drop(&mut self) {
        let root = self.root;
        let _ = MaySleep::try_enter(|cx| {
            self.kill(cx, "its context was closed");
            let away = self.device.update(cx, Place::In(KERNEL_ROOT), |_| Ok(()));
            if away.is_ok() {
                let _ = self.device.update(cx, Place::Any, |update| {
                    update.destroy(root);
                    Ok(())
                });
            }
        });
    }
}

fn is_free(mappings: &BTreeMap<u64, u64>, at: u64, len: u64) -> bool {
    is_device(at, len) && mappings.range(..at + len).next_back().is_none_or(|(_, end)| *end <= at)
}

/// A free place with the same offset into a large page.
fn elsewhere(mappings: &BTreeMap<u64, u64>, range: Range) -> Option<u64> {
    let offset = range.start() % LARGE;
    let mut at = ELSEWHERE + offset;
    while !is_free(mappings, at, range.len()) {
        let (_, end) = mappings.range(..at + range.len()).next_back()?;
        at = end.next_multiple_of(LARGE) + offset;
        if at >= SYSTEM {
            return None;
        }
    }
    Some(at)
}

fn device_error(range: Range, e: KvmError) -> DeviceError {
    match e {
        KvmError::Forked => DeviceError::Forked,
        KvmError::NoTables | KvmError::NoWindow { .. } => DeviceError::Full { range, why: e.to_string() },
        e => DeviceError::Broken { range, source: Box::new(e) },
    }
}

fn submit_error(e: KvmError) -> SubmitError {
    match e {
        KvmError::Forked => SubmitError::Forked,
        e => SubmitError::Broken { source: Box::new(e) },
    }
}

impl<S: Source> Device<HostMm<S>> for KvmContext {
    type Pages = KvmPages;
    type Mapping = KvmMapping;
    const HOLD: Hold = Hold::Coherent;

    fn limits(&self) -> Limits {
        Limits { mappings: u32::MAX, bytes: super::layout::SYSTEM_LEN / 8 * mmu_notifier::PAGE_SIZE / 2 }
    }

    fn get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &HostMm<S>,
        range: Range,
        access: Access,
    ) -> Result<KvmPages, DeviceError> {
        mm.fault_in(cx, range, access)?;
        Ok(KvmPages { range, access })
    }

    /// Nothing: none are held, and writes went through the program's own page tables, which know.
    fn put_pages(&self, _cx: &mut MaySleep<'_>, _pages: KvmPages, _written: bool) {}

    fn map(
        &self,
        cx: &mut MaySleep<'_>,
        pages: KvmPages,
        at: Option<DeviceAddr>,
    ) -> Result<KvmMapping, (DeviceError, KvmPages)> {
        self.map_range(cx, pages.range, pages.access, at).map_err(|e| (e, pages))
    }

    fn address(&self, mapping: &KvmMapping) -> DeviceAddr {
        mapping.at
    }

    fn wait_idle(&self, cx: &mut MaySleep<'_>, _mapping: &KvmMapping) {
        let last = self.device.shared.queue.lock(cx).next;
        self.device.shared.queue.wait(cx, last, None, false);
    }

    fn unmap(&self, cx: &mut MaySleep<'_>, mapping: KvmMapping) -> KvmPages {
        let pages = KvmPages { ..mapping.pages };
        self.unmap_range(cx, mapping);
        pages
    }
}

// SAFETY: the guest translates every address by the context's page tables, which hold mappings alone; the position, which
// signals the fence, moves after the last access.
unsafe impl Engine for KvmContext {
    type Fence = KvmFence;

    unsafe fn submit(&self, cx: &mut MaySleep<'_>, batch: &[Command]) -> Result<KvmFence, SubmitError> {
        batch.iter().try_for_each(Command::check)?;
        let planned = batch.iter().enumerate().find_map(|(command, c)| {
            let (addr, access) = first_forbidden(c)?;
            Some(Fault { command, addr: DeviceAddr(addr), access })
        });
        let commands = planned.map_or(batch, |fault| &batch[..fault.command]);
        self.submit_slots(cx, commands.iter().map(slot), planned).map_err(submit_error)
    }
}
