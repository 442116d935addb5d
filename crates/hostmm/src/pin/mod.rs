// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pinned pages: io_uring fixed buffers, the one device that every Linux has.
//!
//! A pin holds page frames, not addresses. Whatever happens to the mapping afterwards (munmap, MADV_DONTNEED, an
//! overlay, a hole punched into the file), the device goes on using the frames of the moment of pinning, and the
//! kernel checks a request against the *addresses* of that moment. That makes a pin the negative control for every
//! notifier source, and [`Pin::read_through`] the exact oracle for staleness: it returns the bytes that the device sees.
//! Copy-on-write breaks in the device's favour: fork copies a pinned anonymous page for the child at once.
//!
//! Invariants: a bit of `used` is set from before its slot is filled until after it is cleared; a slot whose clearing
//! failed stays set for ever. The pages of a slot live until the slot is cleared or the last descriptor of the ring is
//! closed: a forked child holds the pages of its parent until it closes the ring or execs.
//!
//! Lock order: `pin_device` is a leaf. Pinning and unpinning take no lock of ours; the kernel takes the ring's
//! `uring_lock` and then the `mmap_lock`.

mod error;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use interleave::{AtomicU64, LockClass, MaySleep, Mutex, Ordering, might_sleep};
use io_uring::IoUring;
use mmu_notifier::{Access, GupError, Range};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::sys::uring::{self, Transfer};
use crate::sys::wipe::MmMark;

pub use error::PinError;

/// The longest range that one pin can hold, in bytes (io_uring: 1 GiB a slot).
pub const MAX_PIN: u64 = 1 << 30;
/// The most slots that a table can have (Linux 5.13: 16384).
pub const MAX_SLOTS: u32 = 1 << 14;

/// How often a pin is tried that fails for no reason that can be found afterwards.
const ATTEMPTS: u32 = 8;

/// Bytes per request: bounds what the scratch file holds.
const CHUNK: usize = 1 << 20;

static PIN_DEVICE: LockClass = LockClass::new("pin_device");

/// A table of pins. Cheap to clone; the clones share the table.
#[derive(Debug, Clone)]
pub struct Pinner(Arc<Inner>);

struct Inner {
    /// The mm that made it, and whose pages are pinned.
    mm: MmMark,
    /// The ring whose table it is.
    ring: OwnedFd,
    /// The first slot of the table that is ours.
    first: u32,
    slots: u32,
    /// One bit a slot.
    used: Box<[AtomicU64]>,
    pinned: AtomicU64,
    /// Absent for a ring of somebody else.
    device: Option<Mutex<Device>>,
}

/// The submission side of our own ring.
struct Device {
    ring: IoUring,
    /// The memfd that the device writes to and reads from.
    scratch: File,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinner")
            .field("ring", &self.ring.as_raw_fd())
            .field("slots", &self.slots)
            .field("pinned", &self.pinned.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl Pinner {
    /// A ring of our own with a table of `slots` (1 to [`MAX_SLOTS`]). May sleep.
    ///
    /// # Errors
    /// [`PinError::NoRing`] with what to do about it. Needs Linux 5.19.
    pub fn new(slots: u32) -> Result<Pinner, PinError> {
        might_sleep();
        let ring = uring::with_table(2, slots).map_err(error::no_ring)?;
        let fd = uring::descriptor(&ring).map_err(error::no_ring)?;
        let scratch =
            memfd_create("pin device", MemfdFlags::CLOEXEC).map_err(|e| error::no_ring(e.into()))?;
        let device = Device { ring, scratch: scratch.into() };
        Pinner::make(fd, 0, slots, Some(Mutex::new(&PIN_DEVICE, device)))
    }

    /// A ring with room for `entries` requests, with a table of `slots` (1 to [`MAX_SLOTS`]) that is all ours, for
    /// whoever submits requests himself. May sleep.
    ///
    /// # Errors
    /// [`PinError::NoRing`]. Needs Linux 5.19.
    pub fn with_ring(entries: u32, slots: u32) -> Result<(Pinner, IoUring), PinError> {
        might_sleep();
        let ring = uring::with_table(entries, slots).map_err(error::no_ring)?;
        let fd = uring::descriptor(&ring).map_err(error::no_ring)?;
        Ok((Pinner::make(fd, 0, slots, None)?, ring))
    }

    /// The table of somebody else's ring, which has registered a (sparse) table that holds the empty slots
    /// `[first, first + slots)` and leaves them to us. Requests go to that ring, by [`Pin::slot`]; keep the pin alive
    /// until they have completed if the pages must not be given back (the kernel itself holds them for requests in flight).
    ///
    /// # Errors
    /// [`PinError::NoTable`] if no table has such slots; [`PinError::NoRing`] if a page of bookkeeping cannot be had.
    pub fn on_ring(ring: OwnedFd, first: u32, slots: u32) -> Result<Pinner, PinError> {
        if first.checked_add(slots).is_none_or(|end| end > MAX_SLOTS) {
            return Err(PinError::NoTable { first, slots });
        }
        Pinner::make(ring, first, slots, None)
    }

    fn make(
        ring: OwnedFd,
        first: u32,
        slots: u32,
        device: Option<Mutex<Device>>,
    ) -> Result<Pinner, PinError> {
        let used = (0..slots.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let mm = MmMark::new().map_err(error::no_ring)?;
        Ok(Pinner(Arc::new(Inner { mm, ring, first, slots, used, pinned: AtomicU64::new(0), device })))
    }

    /// Pin the pages of `range`: fault them in, break copy-on-write, hold them. May sleep.
    ///
    /// # Errors
    /// Any [`PinError`] about the range, the table or the limits.
    pub fn pin(&self, range: Range) -> Result<Pin, PinError> {
        might_sleep();
        let inner = &self.0;
        inner.check_owner()?;
        if range.len() > MAX_PIN {
            return Err(PinError::TooLong(range));
        }
        let slot = inner.take_slot().ok_or(PinError::NoSlot { slots: inner.slots })?;
        if let Err(e) = uring::update_slot(inner.ring.as_fd(), inner.first + slot, Some(range)) {
            inner.release_slot(slot);
            return Err(error::explain(range, e));
        }
        inner.pinned.fetch_add(range.len(), Ordering::Relaxed);
        Ok(Pin { inner: Arc::clone(inner), slot, range, held: true })
    }

    /// As [`Pinner::pin`], in the words of a primary MMU, and once more where the kernel met a hole that was mapped
    /// again when we looked for it: no sequence moves by that, so the caller would not know to try again.
    ///
    /// # Errors
    /// [`GupError`].
    pub fn pin_for(&self, range: Range, access: Access) -> Result<Pin, GupError> {
        let mut more = 1..ATTEMPTS;
        loop {
            match self.pin(range) {
                Err(PinError::Refused { source, .. })
                    if source.raw_os_error() == Some(libc::EFAULT) && more.next().is_some() => {}
                other => return other.map_err(|e| e.about(range, access)),
            }
        }
    }

    /// Is this the process whose pages the table holds? A load.
    ///
    /// # Errors
    /// [`PinError::Forked`].
    #[inline]
    pub fn check_owner(&self) -> Result<(), PinError> {
        self.0.check_owner()
    }

    /// How many bytes are pinned through this table, freed memory included.
    #[must_use]
    pub fn pinned_bytes(&self) -> u64 {
        self.0.pinned.load(Ordering::Relaxed)
    }
}

impl Inner {
    fn check_owner(&self) -> Result<(), PinError> {
        if self.mm.is_here() { Ok(()) } else { Err(PinError::Forked) }
    }

    fn take_slot(&self) -> Option<u32> {
        for (index, word) in self.used.iter().enumerate() {
            let base = index as u32 * 64;
            let mut seen = word.load(Ordering::Relaxed);
            // A word whose free bits lie past the table's end is full.
            while seen.trailing_ones() < (self.slots - base).min(64) {
                let bit = seen.trailing_ones();
                // Acquire: the slot's last owner has cleared it before it released the bit.
                let before = word.fetch_or(1 << bit, Ordering::Acquire);
                if before & (1 << bit) == 0 {
                    return Some(base + bit);
                }
                seen = before;
            }
        }
        None
    }

    fn release_slot(&self, slot: u32) {
        self.used[slot as usize / 64].fetch_and(!(1 << (slot % 64)), Ordering::Release);
    }
}

/// Pinned pages. Dropping it unpins them.
///
/// It keeps the table alive, so it may outlive its [`Pinner`].
#[derive(Debug)]
pub struct Pin {
    inner: Arc<Inner>,
    /// Within the table's part that is ours.
    slot: u32,
    range: Range,
    held: bool,
}

impl Pin {
    /// The addresses at which the pages were when they were pinned.
    #[must_use]
    pub fn range(&self) -> Range {
        self.range
    }

    /// The index of the buffer in the ring's table (`buf_index` of a request).
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.inner.first + self.slot
    }

    /// Is it in the table of `pinner`?
    #[must_use]
    pub fn is_of(&self, pinner: &Pinner) -> bool {
        Arc::ptr_eq(&self.inner, &pinner.0)
    }

    /// The ring in whose table it is.
    #[must_use]
    pub fn ring(&self) -> BorrowedFd<'_> {
        self.inner.ring.as_fd()
    }

    /// Copy out the bytes that the device sees, from `off` bytes into the range. Sleeps; 8 us or more.
    ///
    /// # Errors
    /// [`PinError::Forked`], [`PinError::OutOfRange`], [`PinError::NoDevice`], [`PinError::Device`].
    pub fn read_through(&self, off: u64, buf: &mut [u8]) -> Result<(), PinError> {
        self.check(off, buf.len() as u64)?;
        self.with_device(|device| {
            for (n, part) in buf.chunks_mut(CHUNK).enumerate() {
                let addr = self.range.start() + off + (n * CHUNK) as u64;
                let len = part.len() as u32;
                // SAFETY: the device reads the pages and writes its own memfd.
                let moved = unsafe { device.transfer(Transfer::FromPages, self.slot, addr, len) };
                full(moved, len).and_then(|()| device.scratch.read_exact_at(part, 0)).map_err(|source| {
                    PinError::Device { off, len: u64::from(len), range: self.range, source }
                })?;
            }
            Ok(())
        })
    }

    /// Let the device write `bytes` into the pages, `off` bytes into the range. Sleeps; 8 us or more.
    ///
    /// # Errors
    /// As for [`Pin::read_through`].
    ///
    /// # Safety
    /// No reference to the bytes may exist, through any mapping of the pages. After munmap of the range the pages are
    /// nobody's, unless they are mapped elsewhere too.
    pub unsafe fn write_through(&self, off: u64, bytes: &[u8]) -> Result<(), PinError> {
        self.check(off, bytes.len() as u64)?;
        self.with_device(|device| {
            for (n, part) in bytes.chunks(CHUNK).enumerate() {
                let addr = self.range.start() + off + (n * CHUNK) as u64;
                let len = part.len() as u32;
                let moved = device.scratch.write_all_at(part, 0).and_then(|()| {
                    // SAFETY: the caller answers for the pages.
                    unsafe { device.transfer(Transfer::ToPages, self.slot, addr, len) }
                });
                full(moved, len).map_err(|source| PinError::Device {
                    off,
                    len: u64::from(len),
                    range: self.range,
                    source,
                })?;
            }
            Ok(())
        })
    }

    /// Give the pages back, and say if that failed. (The slot is then never used again.)
    ///
    /// # Errors
    /// [`PinError::Forked`]; [`PinError::Device`].
    pub fn unpin(mut self) -> Result<(), PinError> {
        self.release()
    }

    fn release(&mut self) -> Result<(), PinError> {
        if !std::mem::take(&mut self.held) {
            return Ok(());
        }
        // A child that cleared the slot would unpin its parent's pages under the parent's requests.
        self.inner.check_owner()?;
        let (range, slot) = (self.range, self.slot);
        uring::update_slot(self.inner.ring.as_fd(), self.inner.first + slot, None)
            .map_err(|source| PinError::Device { off: 0, len: range.len(), range, source })?;
        self.inner.pinned.fetch_sub(range.len(), Ordering::Relaxed);
        self.inner.release_slot(slot);
        Ok(())
    }

    fn check(&self, off: u64, len: u64) -> Result<(), PinError> {
        self.inner.check_owner()?;
        match off.checked_add(len) {
            Some(end) if end <= self.range.len() => Ok(()),
            _ => Err(PinError::OutOfRange { off, len, range: self.range }),
        }
    }

    fn with_device<T>(&self, f: impl FnOnce(&mut Device) -> Result<T, PinError>) -> Result<T, PinError> {
        let device = self.inner.device.as_ref().ok_or(PinError::NoDevice)?;
        MaySleep::try_enter(|cx| f(&mut device.lock(cx)))?
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        match self.release() {
            Ok(()) | Err(PinError::Forked) => {}
            Err(e) => tracing::error!(range = %self.range, "pages stay pinned until the ring closes: {e}"),
        }
    }
}

impl Device {
    /// # Safety
    /// As for [`uring::transfer`].
    unsafe fn transfer(&mut self, way: Transfer, slot: u32, addr: u64, len: u32) -> std::io::Result<u32> {
        // MAX_SLOTS fits: a table of our own has no slot past it.
        // SAFETY: the caller's promise.
        unsafe { uring::transfer(&mut self.ring, way, &self.scratch, slot as u16, addr, len) }
    }
}

fn full(moved: std::io::Result<u32>, len: u32) -> std::io::Result<()> {
    match moved? {
        n if n == len => Ok(()),
        _ => Err(std::io::ErrorKind::WriteZero.into()),
    }
}
