// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device over softmm: a page table from bus addresses to frames, and an engine that does DMA by frame number when it
//! is told to. It stores words, as softmm does. Access to a frame that was freed is the failure of a test.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use interleave::{LockClass, MaySleep, Mutex, WaitQueue};
use mmu_notifier::primary::{Pin, PrimaryMmu};
use mmu_notifier::{Access, PAGE_SIZE, Range};
use softmm::{FrameId, Machine};
use userptr::device::{
    Command, Device, DeviceAddr, DeviceError, Engine, Fault, Fence, FenceError, Hold, Limits, SubmitError,
    WaitError,
};

static STATE: LockClass = LockClass::new("soft_device");
static CHANGED: LockClass = LockClass::new("soft_device_changed");

/// How the device holds pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holds {
    /// As get_user_pages.
    Pins,
    /// Not at all, as HMM: right only if nothing is ever used after its invalidation.
    Nothing,
}

/// When a batch is executed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// At submission.
    AtOnce,
    /// By [`SoftDevice::run`].
    Told,
}

struct State {
    table: BTreeMap<u64, (FrameId, Access)>,
    next: u64,
    queue: VecDeque<Vec<Command>>,
    submitted: u64,
    /// Batches executed so far.
    done: u64,
    faults: BTreeMap<u64, Fault>,
    stop: bool,
    released: Vec<(Range, bool)>,
}

struct Shared {
    machine: Arc<Machine>,
    state: Mutex<State>,
    changed: WaitQueue,
}

#[derive(Clone)]
pub(crate) struct SoftDevice {
    shared: Arc<Shared>,
    holds: Holds,
    when: When,
}

pub(crate) struct SoftPages<P> {
    range: Range,
    access: Access,
    frames: Vec<FrameId>,
    pin: Option<P>,
}

pub(crate) struct SoftMapping<P> {
    at: u64,
    pages: SoftPages<P>,
}

impl SoftDevice {
    pub(crate) fn new(machine: &Arc<Machine>, holds: Holds, when: When) -> SoftDevice {
        let state = State {
            table: BTreeMap::new(),
            next: 0x10_0000,
            queue: VecDeque::new(),
            submitted: 0,
            done: 0,
            faults: BTreeMap::new(),
            stop: false,
            released: Vec::new(),
        };
        let shared = Shared {
            machine: Arc::clone(machine),
            state: Mutex::new(&STATE, state),
            changed: WaitQueue::new(&CHANGED),
        };
        SoftDevice { shared: Arc::new(shared), holds, when }
    }

    /// Executes what is submitted until [`stop`](SoftDevice::stop) is called and nothing is left.
    pub(crate) fn run(&self, cx: &mut MaySleep<'_>) {
        let mut state = self.shared.state.lock(cx);
        loop {
            while let Some(batch) = state.queue.pop_front() {
                for (command, what) in batch.iter().enumerate() {
                    // The lock is let go of between commands, as a device lets go of the bus.
                    drop(state);
                    state = self.shared.state.lock(cx);
                    if let Err((addr, access)) = self.execute(&state, what) {
                        let done = state.done;
                        state.faults.insert(done, Fault { command, addr: DeviceAddr(addr), access });
                        break;
                    }
                }
                state.done += 1;
                self.shared.changed.wake_all();
            }
            if state.stop {
                return;
            }
            state = self.shared.changed.wait(cx, state);
        }
    }

    pub(crate) fn stop(&self, cx: &mut MaySleep<'_>) {
        self.shared.state.lock(cx).stop = true;
        self.shared.changed.wake_all();
    }

    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.shared.machine
    }

    /// What was given back so far, and whether it was said to be written.
    pub(crate) fn released(&self, cx: &mut MaySleep<'_>) -> Vec<(Range, bool)> {
        self.shared.state.lock(cx).released.clone()
    }

    /// How many pages it could reach now.
    pub(crate) fn mapped(&self, cx: &mut MaySleep<'_>) -> usize {
        self.shared.state.lock(cx).table.len()
    }

    fn frame(state: &State, addr: u64, access: Access) -> Result<(FrameId, usize), (u64, Access)> {
        let (frame, allowed) = state.table.get(&(addr / PAGE_SIZE)).ok_or((addr, access))?;
        if access == Access::Write && *allowed == Access::Read {
            return Err((addr, access));
        }
        Ok((*frame, (addr % PAGE_SIZE / 8) as usize))
    }

    fn read(&self, state: &State, addr: u64) -> Result<u64, (u64, Access)> {
        let (frame, word) = SoftDevice::frame(state, addr, Access::Read)?;
        Ok(self.shared.machine.frames().read(frame, word).expect("the device read a page that was freed"))
    }

    fn write(&self, state: &State, addr: u64, value: u64) -> Result<(), (u64, Access)> {
        let (frame, word) = SoftDevice::frame(state, addr, Access::Write)?;
        let written = self.shared.machine.frames().write(frame, word, value);
        written.expect("the device wrote a page that was freed");
        Ok(())
    }

    fn execute(&self, state: &State, command: &Command) -> Result<(), (u64, Access)> {
        match *command {
            Command::Copy { dst, src, len } => {
                for off in (0..len).step_by(8) {
                    self.write(state, dst.0 + off, self.read(state, src.0 + off)?)?;
                }
                Ok(())
            }
            Command::Fill { dst, len, byte } => {
                let value = u64::from_le_bytes([byte; 8]);
                (0..len).step_by(8).try_for_each(|off| self.write(state, dst.0 + off, value))
            }
            other => panic!("{other:?} is not for a device of words"),
        }
    }
}

impl<M: PrimaryMmu> Device<M> for SoftDevice {
    type Pages = SoftPages<M::Pin>;
    type Mapping = SoftMapping<M::Pin>;
    const HOLD: Hold = Hold::Pinned;

    fn limits(&self) -> Limits {
        Limits { mappings: u32::MAX, bytes: 64 * PAGE_SIZE }
    }

    fn get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &M,
        range: Range,
        access: Access,
    ) -> Result<Self::Pages, DeviceError> {
        let frames = self.shared.machine.frames();
        if self.holds == Holds::Pins {
            let pin = mm.pin(cx, range, access)?;
            let ids =
                range.iter_pages().map(|page| frames.id(pin.pfn(page).expect("softmm knows its frames")));
            return Ok(SoftPages { range, access, frames: ids.collect(), pin: Some(pin) });
        }
        let mut ids = Vec::new();
        for page in range.iter_pages() {
            ids.push(loop {
                mm.fault_in(cx, Range::page(page), access)?;
                let identity = mm.page_identity(cx, page).expect("softmm knows its frames");
                let usable = access == Access::Read || identity.writable == Some(true);
                if let Some(pfn) = identity.pfn.filter(|_| usable) {
                    break frames.id(pfn);
                }
            });
        }
        Ok(SoftPages { range, access, frames: ids, pin: None })
    }

    fn put_pages(&self, cx: &mut MaySleep<'_>, pages: Self::Pages, written: bool) {
        self.shared.state.lock(cx).released.push((pages.range, written));
        match pages.pin {
            Some(pin) => pin.unpin(cx, written),
            None if written => {
                for frame in pages.frames {
                    let marked = self.shared.machine.frames().mark_dirty(frame);
                    marked.expect("pages were given back after they were freed");
                }
            }
            None => {}
        }
    }

    fn map(
        &self,
        cx: &mut MaySleep<'_>,
        pages: Self::Pages,
        at: Option<DeviceAddr>,
    ) -> Result<Self::Mapping, (DeviceError, Self::Pages)> {
        let mut state = self.shared.state.lock(cx);
        let at = at.map_or(state.next, |at| at.0);
        state.next = state.next.max(at + pages.range.len() + PAGE_SIZE);
        for (page, frame) in (at / PAGE_SIZE..).zip(&pages.frames) {
            assert!(state.table.insert(page, (*frame, pages.access)).is_none(), "{page:#x} is mapped twice");
        }
        Ok(SoftMapping { at, pages })
    }

    fn address(&self, mapping: &Self::Mapping) -> DeviceAddr {
        DeviceAddr(mapping.at)
    }

    fn wait_idle(&self, _: &mut MaySleep<'_>, _: &Self::Mapping) {}

    fn unmap(&self, cx: &mut MaySleep<'_>, mapping: Self::Mapping) -> Self::Pages {
        let mut state = self.shared.state.lock(cx);
        for (page, _) in (mapping.at / PAGE_SIZE..).zip(&mapping.pages.frames) {
            state.table.remove(&page);
        }
        mapping.pages
    }
}

pub(crate) struct SoftFence {
    device: SoftDevice,
    ticket: u64,
}

impl Fence for SoftFence {
    fn is_signaled(&self) -> bool {
        MaySleep::enter(|cx| self.device.shared.state.lock(cx).done > self.ticket)
    }

    fn wait(&self, cx: &mut MaySleep<'_>) -> Result<(), FenceError> {
        let shared = &self.device.shared;
        let mut state = shared.state.lock(cx);
        while state.done <= self.ticket {
            state = shared.changed.wait(cx, state);
        }
        state.faults.get(&self.ticket).map_or(Ok(()), |fault| Err((*fault).into()))
    }

    /// Patience begins anew whenever something happens.
    fn wait_interruptible(&self, cx: &mut MaySleep<'_>, timeout: Option<Duration>) -> Result<(), WaitError> {
        let timeout = timeout.unwrap_or(Duration::MAX);
        let shared = &self.device.shared;
        let mut state = shared.state.lock(cx);
        while state.done <= self.ticket {
            let (after, woken) = shared.changed.wait_timeout(cx, state, timeout);
            if !woken && after.done <= self.ticket {
                return Err(WaitError::TimedOut(timeout));
            }
            state = after;
        }
        Ok(())
    }
}

// SAFETY: it accesses frames of softmm through its table alone, and no memory of the program's.
unsafe impl Engine for SoftDevice {
    type Fence = SoftFence;

    unsafe fn submit(&self, cx: &mut MaySleep<'_>, batch: &[Command]) -> Result<SoftFence, SubmitError> {
        batch.iter().try_for_each(Command::check)?;
        let mut state = self.shared.state.lock(cx);
        let ticket = state.submitted;
        state.submitted += 1;
        if self.when == When::Told {
            state.queue.push_back(batch.to_vec());
        } else {
            for (command, what) in batch.iter().enumerate() {
                if let Err((addr, access)) = self.execute(&state, what) {
                    state.faults.insert(ticket, Fault { command, addr: DeviceAddr(addr), access });
                    break;
                }
            }
            state.done += 1;
        }
        self.shared.changed.wake_all();
        Ok(SoftFence { device: self.clone(), ticket })
    }
}
