// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fixed buffers of an io_uring: the device that every Linux has.
//!
//! A mapping is a slot of the ring's buffer table: pinned pages, which requests name by the slot and by the addresses
//! that they had. The kernel checks requests against those addresses and never looks at what is mapped there now.
//! Pinning breaks copy-on-write and wants memory that can be written, so each mapping allows both.
//!
//! On a ring of our own, [`IoUring::scope`] moves data between files and leased memory; it is safe because it does
//! not return before the kernel is done. On a ring of the program's own this only keeps the slots; requests are the
//! program's business.
//!
//! Lock order: `userptr_ring` is a leaf, held while requests are in flight.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use hostmm::pin::{MAX_PIN, Pin, PinError, Pinner};
use hostmm::primary::{HostMm, Source};
use interleave::{LockClass, MaySleep, Mutex, yield_now};
use io_uring::{opcode, squeue, types::Fd};
use mmu_notifier::{Access, Range};
use rustix::fs::{MemfdFlags, memfd_create};

use super::view::differs;
use super::{Device, DeviceAddr, DeviceError, Hold, Limits, View, cpu};
use crate::cache::{Lease, LeaseMut};

static RING: LockClass = LockClass::new("userptr_ring");

/// Bytes that are compared at a time, where it is asked what the device sees.
const VIEW: usize = 1 << 20;
/// Requests in flight at a time.
const DEPTH: u32 = 64;

/// A buffer table, with its ring if it is ours.
pub struct IoUring {
    pinner: Pinner,
    slots: u32,
    /// Submission and completion of our own ring.
    ring: Option<Mutex<io_uring::IoUring>>,
}

impl std::fmt::Debug for IoUring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoUring").field("pinner", &self.pinner).finish_non_exhaustive()
    }
}

impl IoUring {
    /// A ring of our own, with `slots` buffers (at most [`MAX_SLOTS`](hostmm::pin::MAX_SLOTS)). Linux 5.19.
    ///
    /// # Errors
    /// [`PinError::NoRing`], with what to do about it.
    pub fn new(slots: u32) -> Result<IoUring, PinError> {
        let (pinner, ring) = Pinner::with_ring(DEPTH, slots)?;
        Ok(IoUring { pinner, slots, ring: Some(Mutex::new(&RING, ring)) })
    }

    /// Slots `[first, first + slots)` of the (sparse) table of a ring of the program's own, which leaves them to us.
    /// Requests name [`Buffer::slot`]; keep the lease until they have completed.
    ///
    /// # Errors
    /// [`PinError::NoTable`], [`PinError::NoRing`].
    pub fn on_ring(ring: OwnedFd, first: u32, slots: u32) -> Result<IoUring, PinError> {
        Ok(IoUring { pinner: Pinner::on_ring(ring, first, slots)?, slots, ring: None })
    }

    /// Bytes pinned through the table now.
    pub fn pinned_bytes(&self) -> u64 {
        self.pinner.pinned_bytes()
    }

    /// Moves data between files and leased memory: `f` says what, and when this returns all of it has been done. One
    /// result for each transfer, in the order asked for: bytes moved, or the error, as of read(2) and write(2); a signal can
    /// interrupt one before it has begun.
    ///
    /// Transfers begin while `f` runs, and run beside each other in any order. Sleeps. One scope at a time, and none within
    /// another.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] on a ring of the program's own, or where the caller must not sleep;
    /// [`io::ErrorKind::PermissionDenied`] in a forked child.
    pub fn scope<'env>(&'env self, f: impl FnOnce(&mut Io<'_, 'env>)) -> io::Result<Vec<io::Result<usize>>> {
        let ring = self.ring.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        // In a child the slots hold the pages of its parent, and so may somebody the lock.
        self.pinner.check_owner().map_err(|e| io::Error::new(io::ErrorKind::PermissionDenied, e))?;
        let done = MaySleep::try_enter(|cx| {
            let mut ring = ring.lock(cx);
            let mut io =
                Io { ring: &mut ring, device: self, results: Vec::new(), in_flight: 0, env: PhantomData };
            f(&mut io);
            io.drain(0);
            std::mem::take(&mut io.results)
        });
        done.map_err(|atomic| io::Error::new(io::ErrorKind::Unsupported, atomic.to_string()))
    }

    /// Reads from `file` at `offset` into leased memory; fewer bytes at the end of the file. Sleeps.
    ///
    /// # Errors
    /// As of pread(2), and those of [`IoUring::scope`].
    pub fn read_at<S: Source>(
        &self,
        file: &impl AsFd,
        offset: u64,
        into: &mut impl LeaseMut<HostMm<S>, IoUring>,
    ) -> io::Result<usize> {
        one(|| self.scope(|io| io.read(file.as_fd(), offset, into)))
    }

    /// Writes leased memory to `file` at `offset`. Sleeps.
    ///
    /// # Errors
    /// As of pwrite(2), and those of [`IoUring::scope`].
    pub fn write_at<S: Source>(
        &self,
        file: &impl AsFd,
        offset: u64,
        from: &Lease<'_, HostMm<S>, IoUring>,
    ) -> io::Result<usize> {
        one(|| self.scope(|io| io.write(file.as_fd(), offset, from)))
    }
}

/// One transfer, again if a signal came before a byte was moved.
fn one(mut transfer: impl FnMut() -> io::Result<Vec<io::Result<usize>>>) -> io::Result<usize> {
    loop {
        match transfer()?.pop() {
            Some(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Some(result) => return result,
            None => return Err(io::ErrorKind::Other.into()),
        }
    }
}

/// Transfers of one [`IoUring::scope`]. What they use outlives `'env`, and so the scope.
pub struct Io<'r, 'env> {
    ring: &'r mut io_uring::IoUring,
    device: &'r IoUring,
    results: Vec<io::Result<usize>>,
    in_flight: u32,
    env: PhantomData<&'env mut &'env ()>,
}

impl<'env> Io<'_, 'env> {
    /// Reads from `file` at `offset` into leased memory.
    pub fn read<S: Source + 'env>(
        &mut self,
        file: BorrowedFd<'env>,
        offset: u64,
        into: &'env mut impl LeaseMut<HostMm<S>, IoUring>,
    ) {
        // The device writes by this borrow, which lasts longer than the scope.
        into.bytes_mut().as_mut_ptr().expose_provenance();
        // SAFETY: the bytes are mutably borrowed for as long as `into` is, which is longer than the scope.
        unsafe { self.read_raw(file, offset, into.lease()) }
    }

    /// Reads from `file` at `offset` into memory that is leased by address.
    ///
    /// # Safety
    /// Until the scope ends no reference to the lease's bytes may be used, and they stay mapped where they are
    /// (or the old pages are written, which may be mapped elsewhere).
    pub unsafe fn read_raw<S: Source>(
        &mut self,
        file: BorrowedFd<'env>,
        offset: u64,
        into: &'env Lease<'_, HostMm<S>, IoUring>,
    ) {
        let (addr, len) = (into.addr() as *mut u8, Self::len(into));
        if let Some(slot) = self.slot(into) {
            self.push(opcode::ReadFixed::new(Fd(file.as_raw_fd()), addr, len, slot).offset(offset).build());
        }
    }

    /// Writes leased memory to `file` at `offset`. The device only reads, so nothing need be borrowed: what it sees of
    /// bytes that somebody writes meanwhile is anybody's guess.
    pub fn write<S: Source>(
        &mut self,
        file: BorrowedFd<'env>,
        offset: u64,
        from: &'env Lease<'_, HostMm<S>, IoUring>,
    ) {
        let (addr, len) = (from.addr() as *const u8, Self::len(from));
        if let Some(slot) = self.slot(from) {
            self.push(opcode::WriteFixed::new(Fd(file.as_raw_fd()), addr, len, slot).offset(offset).build());
        }
    }

    fn len<S: Source>(lease: &Lease<'_, HostMm<S>, IoUring>) -> u32 {
        // A slot holds at most 1 GiB.
        lease.len() as u32
    }

    /// The slot, if the lease is of this ring: another ring's slot is another buffer here.
    fn slot<S: Source>(&mut self, lease: &Lease<'_, HostMm<S>, IoUring>) -> Option<u16> {
        let buffer = lease.mapping();
        if buffer.0.is_of(&self.device.pinner) {
            return Some(buffer.slot());
        }
        self.results.push(Err(io::Error::new(io::ErrorKind::InvalidInput, "a lease of another device")));
        None
    }

    fn push(&mut self, entry: squeue::Entry) {
        let entry = entry.user_data(self.results.len() as u64);
        if self.in_flight == DEPTH {
            self.drain(DEPTH - 1);
        }
        // SAFETY: what the request names is pinned in its slot for as long as the lease lives; that, the memory and the
        // file outlive 'env, and the scope does not end before the request has.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "as many entries as may be in flight");
        self.results.push(Err(io::ErrorKind::Other.into()));
        self.in_flight += u32::from(pushed.is_ok());
    }

    /// Waits until no more than `rest` are in flight, come what may: the memory is not ours before that.
    fn drain(&mut self, rest: u32) {
        while self.in_flight > rest {
            // EINTR, EAGAIN, EBUSY: submitted or not, the requests are in the ring and will be done.
            if self.ring.submit_and_wait(1).is_err() {
                yield_now();
            }
            for done in self.ring.completion() {
                self.in_flight -= 1;
                let result = done.result();
                self.results[done.user_data() as usize] =
                    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            }
        }
    }
}

impl Drop for Io<'_, '_> {
    fn drop(&mut self) {
        self.drain(0);
    }
}

/// A slot of the buffer table, filled.
#[derive(Debug)]
pub struct Buffer(Pin);

impl Buffer {
    /// Its index in the ring's table (`buf_index` of a request).
    pub fn slot(&self) -> u16 {
        // A table has at most 2^14 slots.
        self.0.slot() as u16
    }

    /// The pin.
    pub fn pin(&self) -> &Pin {
        &self.0
    }
}

impl<S: Source> Device<HostMm<S>> for IoUring {
    type Pages = Buffer;
    type Mapping = Buffer;
    const HOLD: Hold = Hold::Pinned;

    fn limits(&self) -> Limits {
        Limits { mappings: self.slots, bytes: MAX_PIN }
    }

    fn rights(&self, _: Access) -> Access {
        Access::Write
    }

    fn get_pages(
        &self,
        _: &mut MaySleep<'_>,
        _: &HostMm<S>,
        range: Range,
        access: Access,
    ) -> Result<Buffer, DeviceError> {
        if range.len() > MAX_PIN {
            return Err(DeviceError::TooLong { range, limit: MAX_PIN });
        }
        Ok(Buffer(self.pinner.pin_for(range, access)?))
    }

    /// The kernel marks every page dirty, written or not.
    fn put_pages(&self, _: &mut MaySleep<'_>, pages: Buffer, _: bool) {
        drop(pages);
    }

    /// The slot is filled already: pages and mapping are one.
    fn map(
        &self,
        _: &mut MaySleep<'_>,
        pages: Buffer,
        at: Option<DeviceAddr>,
    ) -> Result<Buffer, (DeviceError, Buffer)> {
        let range = pages.0.range();
        match at {
            Some(at) if at.0 != range.start() => {
                let why = "a fixed buffer has the program's addresses".to_owned();
                Err((DeviceError::Address { range, at, why }, pages))
            }
            _ => Ok(pages),
        }
    }

    fn address(&self, mapping: &Buffer) -> DeviceAddr {
        DeviceAddr(mapping.0.range().start())
    }

    /// The device writes the bytes to a file of ours, and the kernel reads the program's beside it.
    fn view(&self, cx: &mut MaySleep<'_>, _: &HostMm<S>, mapping: &Buffer, addr: u64, len: u64) -> View {
        let Some(ring) = &self.ring else {
            return View::Unknown { why: "the ring is the program's own" };
        };
        // A scope of this very thread may hold it.
        let Some(mut ring) = ring.try_lock(cx) else {
            return View::Unknown { why: "the ring is busy" };
        };
        let Ok(seen) = memfd_create("view", MemfdFlags::CLOEXEC).map(File::from) else {
            return View::Unknown { why: "there is no file to read through" };
        };
        for off in (0..len).step_by(VIEW) {
            let (at, part) = (addr + off, (len - off).min(VIEW as u64));
            let found = differs(part as usize, |device, program| {
                let mut io =
                    Io { ring: &mut ring, device: self, results: Vec::new(), in_flight: 0, env: PhantomData };
                let request = opcode::WriteFixed::new(
                    Fd(seen.as_raw_fd()),
                    at as *const u8,
                    part as u32,
                    mapping.slot(),
                );
                io.push(request.offset(0).build());
                io.drain(0);
                let written = io.results.pop().is_some_and(|r| r.is_ok_and(|n| n as u64 == part));
                if !written || seen.read_exact_at(device, 0).is_err() {
                    return Err(View::Unknown { why: "the ring failed" });
                }
                cpu::read(at, program).map_err(|n| View::Other { at: at + n as u64 })
            });
            match found {
                Ok(None) => {}
                Ok(Some(n)) => return View::Other { at: at + n as u64 },
                Err(view) => return view,
            }
        }
        View::Same
    }

    /// Requests in flight hold the pages by themselves, and who submits them a lease.
    fn wait_idle(&self, _: &mut MaySleep<'_>, _: &Buffer) {}

    fn unmap(&self, _: &mut MaySleep<'_>, mapping: Buffer) -> Buffer {
        mapping
    }
}
