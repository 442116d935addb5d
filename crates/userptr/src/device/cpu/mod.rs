// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device for hosts without any: the calling CPU, which executes the commands through the kernel.
//!
//! Every access goes by process_vm_readv(2) and process_vm_writev(2) on this very process, so that it meets the page
//! tables of the moment: a mapping is never out of date ([`Hold::Coherent`]), and what is not mapped faults the command
//! and not the program. To map costs nothing but faulting the pages in.
//!
//! Invariant: mappings do not overlap in device addresses, so that one address means one byte. They are at the program's
//! own addresses where these are free, and else above all of the program's.
//!
//! Lock order: `userptr_cpu_engine`, held while a batch is executed, before `userptr_cpu_space`.

mod memory;

use std::collections::BTreeMap;
use std::time::Duration;

use interleave::{LockClass, MaySleep, Mutex, RwLock};
use mmu_notifier::primary::PrimaryMmu;
use mmu_notifier::{Access, Range};

use super::command::{self, Fence, FenceError, WaitError};
use super::{Command, Device, DeviceAddr, DeviceError, Engine, Fault, Hold, Limits, SubmitError};
use memory::Bounce;
pub(super) use memory::read;

static ENGINE: LockClass = LockClass::new("userptr_cpu_engine");
static SPACE: LockClass = LockClass::new("userptr_cpu_space");

/// Bytes moved at a time.
const CHUNK: usize = 64 << 10;

/// What is at a device address.
#[derive(Debug, Clone, Copy)]
struct Window {
    end: u64,
    /// Added to a device address, wrapping: the program's.
    delta: u64,
    access: Access,
}

#[derive(Debug)]
struct Space {
    /// By the first device address.
    windows: BTreeMap<u64, Window>,
    /// Where nothing was mapped so far, nor any higher.
    next: u64,
}

/// Above all addresses of a program.
const ABOVE: u64 = 1 << 56;

impl Space {
    fn is_free(&self, at: u64, end: u64) -> bool {
        self.windows.range(..end).next_back().is_none_or(|(_, window)| window.end <= at)
    }
}

/// See the [module](self).
#[derive(Debug)]
pub struct Cpu {
    process: u32,
    space: RwLock<Space>,
    /// Held for a batch: batches are executed one after the other.
    engine: Mutex<Bounce>,
}

impl Default for Cpu {
    fn default() -> Cpu {
        Cpu::new()
    }
}

/// Pages that were present.
#[derive(Debug, Clone, Copy)]
pub struct Present {
    range: Range,
    access: Access,
}

/// A part of the device's address space.
#[derive(Debug)]
pub struct Bound {
    at: DeviceAddr,
    pages: Present,
}

impl Cpu {
    /// An engine with an empty address space.
    #[must_use]
    pub fn new() -> Cpu {
        Cpu {
            process: std::process::id(),
            space: RwLock::new(&SPACE, Space { windows: BTreeMap::new(), next: ABOVE }),
            engine: Mutex::new(&ENGINE, Bounce::new(CHUNK)),
        }
    }

    /// Where the program has the byte at `at`, and how many bytes from there on are of the same mapping.
    fn translate(&self, cx: &mut MaySleep<'_>, at: u64, access: Access) -> Option<(u64, u64)> {
        let space = self.space.read(cx);
        let (_, window) = space.windows.range(..=at).next_back()?;
        let allowed = access == Access::Read || window.access == Access::Write;
        (at < window.end && allowed).then(|| (at.wrapping_add(window.delta), window.end - at))
    }

    /// Reads `into` from device addresses. The address that could not be read, if any.
    fn read(&self, cx: &mut MaySleep<'_>, mut at: u64, mut into: &mut [u8]) -> Result<(), (u64, Access)> {
        while !into.is_empty() {
            let (host, len) = self.translate(cx, at, Access::Read).ok_or((at, Access::Read))?;
            let part = into.len().min(usize::try_from(len).unwrap_or(usize::MAX));
            let (now, rest) = into.split_at_mut(part);
            memory::read(host, now).map_err(|done| (at + done as u64, Access::Read))?;
            (at, into) = (at + part as u64, rest);
        }
        Ok(())
    }

    /// # Safety
    /// Nobody has a reference to the program's memory at these device addresses.
    unsafe fn write(&self, cx: &mut MaySleep<'_>, mut at: u64, mut from: &[u8]) -> Result<(), (u64, Access)> {
        while !from.is_empty() {
            let (host, len) = self.translate(cx, at, Access::Write).ok_or((at, Access::Write))?;
            let part = from.len().min(usize::try_from(len).unwrap_or(usize::MAX));
            let (now, rest) = from.split_at(part);
            // SAFETY: the caller's promise.
            unsafe { memory::write(host, now) }.map_err(|done| (at + done as u64, Access::Write))?;
            (at, from) = (at + part as u64, rest);
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Engine::submit`].
    unsafe fn execute(
        &self,
        cx: &mut MaySleep<'_>,
        command: &Command,
        bounce: &mut Bounce,
    ) -> Result<(), (u64, Access)> {
        match *command {
            // SAFETY: the caller's promise, here and below.
            Command::Copy { dst, src, len } => unsafe { self.copy(cx, dst.0, src.0, len, bounce) },
            Command::Fill { dst, len, byte } => {
                let (bytes, _) = bounce.halves(len);
                bytes.fill(byte);
                for (at, part) in chunks(dst.0, len) {
                    // SAFETY: see above.
                    unsafe { self.write(cx, at, &bytes[..part])? };
                }
                Ok(())
            }
            Command::Checksum { src, len, result } => {
                let (bytes, _) = bounce.halves(len);
                let mut sum = 0_u64;
                for (at, part) in chunks(src.0, len) {
                    self.read(cx, at, &mut bytes[..part])?;
                    sum = sum.wrapping_add(command::checksum(&bytes[..part]));
                }
                // SAFETY: see above.
                unsafe { self.write(cx, result.0, &sum.to_le_bytes()) }
            }
            Command::Compare { a, b, len, result } => {
                let (left, right) = bounce.halves(len);
                let mut first = len;
                for (n, (at, part)) in chunks(a.0, len).enumerate() {
                    let done = n as u64 * CHUNK as u64;
                    let lefts = self.read(cx, at, &mut left[..part]);
                    let rights = self.read(cx, b.0 + done, &mut right[..part]);
                    let (l, r) = (got(lefts, at, part), got(rights, b.0 + done, part));
                    if let Some(at) = (0..l.min(r)).find(|i| left[*i] != right[*i]) {
                        first = done + at as u64;
                        break;
                    }
                    // Whichever comes first, and of two at the same offset the left one.
                    if r < l { rights? } else { lefts? }
                }
                // SAFETY: see above.
                unsafe { self.write(cx, result.0, &first.to_le_bytes()) }
            }
            Command::Blit2d { dst, dst_pitch, src, src_pitch, width, height } => {
                for row in 0..height {
                    let (dst, src) = (dst.0 + row * dst_pitch, src.0 + row * src_pitch);
                    // SAFETY: see above.
                    unsafe { self.copy(cx, dst, src, width, bounce)? };
                }
                Ok(())
            }
            // SAFETY: see above.
            Command::StoreDword { dst, value } => unsafe { self.write(cx, dst.0, &value.to_le_bytes()) },
        }
    }

    /// # Safety
    /// As for [`Engine::submit`].
    unsafe fn copy(
        &self,
        cx: &mut MaySleep<'_>,
        dst: u64,
        src: u64,
        len: u64,
        bounce: &mut Bounce,
    ) -> Result<(), (u64, Access)> {
        let (bytes, _) = bounce.halves(len);
        for (n, (at, part)) in chunks(src, len).enumerate() {
            let read = self.read(cx, at, &mut bytes[..part]);
            // What comes before the byte that could not be read may fault, too.
            let bytes = &bytes[..got(read, at, part)];
            // SAFETY: the caller's promise.
            unsafe { self.write(cx, dst + n as u64 * CHUNK as u64, bytes)? };
            read?;
        }
        Ok(())
    }
}

/// How many bytes a read of `part` bytes from `at` on got.
fn got(read: Result<(), (u64, Access)>, at: u64, part: usize) -> usize {
    read.map_or_else(|(fault, _)| (fault - at) as usize, |()| part)
}

/// Bytes `[at, at + len)` in parts of at most [`CHUNK`].
fn chunks(at: u64, len: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..len).step_by(CHUNK).map(move |off| (at + off, (len - off).min(CHUNK as u64) as usize))
}

impl<M: PrimaryMmu> Device<M> for Cpu {
    type Pages = Present;
    type Mapping = Bound;
    const HOLD: Hold = Hold::Coherent;

    fn limits(&self) -> Limits {
        Limits { mappings: u32::MAX, bytes: u64::MAX }
    }

    fn get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &M,
        range: Range,
        access: Access,
    ) -> Result<Present, DeviceError> {
        mm.fault_in(cx, range, access)?;
        Ok(Present { range, access })
    }

    fn put_pages(&self, _: &mut MaySleep<'_>, _: Present, _: bool) {}

    fn map(
        &self,
        cx: &mut MaySleep<'_>,
        pages: Present,
        at: Option<DeviceAddr>,
    ) -> Result<Bound, (DeviceError, Present)> {
        let Present { range, access } = pages;
        let mut space = self.space.write(cx);
        let at = match at {
            Some(at) => at,
            None if space.is_free(range.start(), range.end()) => DeviceAddr(range.start()),
            None => DeviceAddr(space.next),
        };
        let refuse = |why: &str| Err((DeviceError::Address { range, at, why: why.to_owned() }, pages));
        let Some(end) = at.0.checked_add(range.len()) else { return refuse("past the last address") };
        if !space.is_free(at.0, end) {
            return refuse("something is mapped there");
        }
        space.next = space.next.max(end);
        space.windows.insert(at.0, Window { end, delta: range.start().wrapping_sub(at.0), access });
        Ok(Bound { at, pages })
    }

    fn address(&self, mapping: &Bound) -> DeviceAddr {
        mapping.at
    }

    fn wait_idle(&self, cx: &mut MaySleep<'_>, _: &Bound) {
        drop(self.engine.lock(cx));
    }

    fn unmap(&self, cx: &mut MaySleep<'_>, mapping: Bound) -> Present {
        self.space.write(cx).windows.remove(&mapping.at.0);
        drop(self.engine.lock(cx));
        mapping.pages
    }
}

/// A batch that is done: the CPU does it at submission.
#[derive(Debug)]
pub struct Done(Result<(), Fault>);

impl Fence for Done {
    fn is_signaled(&self) -> bool {
        true
    }

    fn wait(&self, _: &mut MaySleep<'_>) -> Result<(), FenceError> {
        Ok(self.0?)
    }

    fn wait_interruptible(&self, _: &mut MaySleep<'_>, _: Option<Duration>) -> Result<(), WaitError> {
        Ok(())
    }
}

// SAFETY: every address goes through `translate`, which knows mappings alone; the batch is done when `submit` returns.
unsafe impl Engine for Cpu {
    type Fence = Done;

    unsafe fn submit(&self, cx: &mut MaySleep<'_>, batch: &[Command]) -> Result<Done, SubmitError> {
        if std::process::id() != self.process {
            return Err(SubmitError::Forked);
        }
        batch.iter().try_for_each(Command::check)?;
        let mut bounce = self.engine.lock(cx);
        MaySleep::enter(|cx| {
            for (n, command) in batch.iter().enumerate() {
                // SAFETY: the caller's promise.
                let done = unsafe { self.execute(cx, command, &mut bounce) };
                if let Err((addr, access)) = done {
                    return Ok(Done(Err(Fault { command: n, addr: DeviceAddr(addr), access })));
                }
            }
            Ok(Done(Ok(())))
        })
    }
}
