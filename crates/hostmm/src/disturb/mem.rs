// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that a scene owns, and the system calls on it through libc or through the bare instruction.
//!
//! Invariant: a [`Region`] is made by mapping memory and names addresses that belong to the scene until its undo is
//! over: nobody else holds a reference into them, and while a scene leaves a hole there nobody relies on it. This is
//! what makes every call below sound, so nothing outside this module can make a region of foreign memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use interleave::{AtomicU64, MaySleep, Ordering, time};
use mmu_notifier::{PAGE_SIZE, Range};

use crate::page::{Frame, Pagemap, Pfn, PidOrSelf};

use super::scene::Undo;
use super::{DisturbError, Via, raw};

pub(super) const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
pub(super) const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
/// Bytes mapped by one PMD entry.
pub(super) const PMD_SIZE: u64 = 2 << 20;

/// Where the next scene maps.
///
/// Far below the addresses that the kernel hands out: mmap without a wish takes the highest gap that fits, so a hole
/// that a scene leaves here is nobody else's next mapping.
static NEXT: AtomicU64 = AtomicU64::const_new(0x1000_0000_0000);
/// Left free between two mappings, so that they neither merge nor grow into each other.
const GAP: u64 = 16 * PAGE_SIZE;

/// Addresses that a scene owns; see the module. Whole pages, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    addr: u64,
    len: u64,
}

fn check(ret: i64) -> io::Result<u64> {
    if ret == -1 { Err(io::Error::last_os_error()) } else { Ok(ret as u64) }
}

impl Region {
    /// Map `pages` fresh pages away from everybody else; `undo` unmaps whatever is there in the end.
    pub(super) fn map(
        undo: &mut Undo,
        pages: u64,
        prot: i32,
        flags: i32,
        fd: Option<&OwnedFd>,
    ) -> Result<Region, DisturbError> {
        let len = pages * PAGE_SIZE;
        let fd = fd.map_or(-1, AsRawFd::as_raw_fd);
        let wish = NEXT.fetch_add(len + GAP, Ordering::Relaxed) as *mut libc::c_void;
        // SAFETY: without MAP_FIXED the address is a wish: the kernel picks addresses that nobody uses.
        let addr = check(unsafe { libc::mmap(wish, len as usize, prot, flags, fd, 0) } as i64)
            .map_err(|source| DisturbError::Call { what: "mmap", range: None, source })?;
        let region = Region { addr, len };
        undo.own(region);
        Ok(region)
    }

    /// Private anonymous read-write pages, each filled with `stamp`.
    pub(super) fn stamped(undo: &mut Undo, pages: u64, stamp: u64) -> Result<Region, DisturbError> {
        let region = Region::map(undo, pages, RW, PRIVATE, None)?;
        region.fill(stamp);
        Ok(region)
    }

    /// A whole number of huge pages, aligned to one; not populated.
    pub(super) fn huge(undo: &mut Undo, pmds: u64) -> Result<Region, DisturbError> {
        let whole = Region::map(undo, (pmds + 1) * (PMD_SIZE / PAGE_SIZE), RW, PRIVATE, None)?;
        let skip = (whole.addr.next_multiple_of(PMD_SIZE) - whole.addr) / PAGE_SIZE;
        Ok(whole.part(skip, pmds * (PMD_SIZE / PAGE_SIZE)))
    }

    /// Memory that somebody else mapped for this scene alone (a chunk of malloc, a grown break, a shmat): page
    /// aligned, not empty.
    ///
    /// # Safety
    /// The addresses belong to the scene as the module demands.
    pub(super) unsafe fn adopt(addr: u64, len: u64) -> Region {
        Region { addr, len }
    }

    /// `pages` pages from page number `first` of the region on.
    pub(super) fn part(self, first: u64, pages: u64) -> Region {
        debug_assert!((first + pages) * PAGE_SIZE <= self.len);
        Region { addr: self.addr + first * PAGE_SIZE, len: pages * PAGE_SIZE }
    }

    pub(super) fn page(self, n: u64) -> Region {
        self.part(n, 1)
    }

    /// What is left of it without `hole`: the part before and the part behind.
    pub(super) fn without(self, hole: Region) -> impl Iterator<Item = Region> {
        let (end, hole_end) = (self.addr + self.len, hole.addr + hole.len);
        let before = (self.addr, hole.addr.min(end));
        let behind = (hole_end.max(self.addr), end);
        [before, behind]
            .into_iter()
            .filter(|(start, end)| start < end)
            .map(|(addr, end)| Region { addr, len: end - addr })
    }

    pub(super) fn addr(self) -> u64 {
        self.addr
    }

    pub(super) fn range(self) -> Range {
        // A region is a mapping of whole pages in user space, which is what a Range is.
        Range::new(self.addr, self.len).unwrap_or(Range::ALL)
    }

    pub(super) fn failed(self, what: &'static str) -> impl FnOnce(io::Error) -> DisturbError {
        move |source| DisturbError::Call { what, range: Some(self.range()), source }
    }

    /// CPU stores: every eight bytes of every page become `stamp`. The region must be mapped writable.
    pub(super) fn fill(self, stamp: u64) {
        for at in (self.addr..self.addr + self.len).step_by(8) {
            // SAFETY: the scene's own mapped memory, aligned; volatile because others map the same page.
            unsafe { std::ptr::write_volatile(at as *mut u64, stamp) };
        }
    }

    /// A CPU load from the first page, which must be mapped readable.
    pub(super) fn load(self) -> u64 {
        // SAFETY: the scene's own mapped memory, aligned.
        unsafe { std::ptr::read_volatile(self.addr as *const u64) }
    }

    /// The page frame at the first page; `None` if nothing is present there.
    pub(super) fn pfn(self) -> Result<Option<Pfn>, DisturbError> {
        match Pagemap::open(PidOrSelf::Myself)?.entries(self.page(0).range())?[0].frame() {
            Frame::Present(pfn) => Ok(Some(pfn)),
            Frame::Hidden => Err(DisturbError::HiddenFrames),
            Frame::None | Frame::Swapped(_) | Frame::Guard => Ok(None),
        }
    }

    /// A call about this region: what the module promises is what makes it allowed.
    fn call(self, via: Via, nr: i64, args: [u64; 6], libc: impl FnOnce() -> i64) -> io::Result<u64> {
        debug_assert_eq!(args[usize::from(nr == libc::SYS_shmat)], self.addr);
        // SAFETY: every caller below passes memory of its region, which is the scene's to change.
        unsafe { call(via, nr, args, libc) }
    }

    fn ptr(self) -> *mut libc::c_void {
        self.addr as *mut libc::c_void
    }

    pub(super) fn munmap(self, via: Via) -> io::Result<u64> {
        // SAFETY: the scene's own memory.
        self.call(via, libc::SYS_munmap, [self.addr, self.len, 0, 0, 0, 0], || unsafe {
            libc::munmap(self.ptr(), self.len as usize).into()
        })
    }

    /// mmap at this very address; `flags` says whether over what is there (`MAP_FIXED`) or only into a hole
    /// (`MAP_FIXED_NOREPLACE`).
    pub(super) fn mmap(self, via: Via, prot: i32, flags: i32, fd: Option<&OwnedFd>) -> io::Result<u64> {
        let fd = fd.map_or(-1, AsRawFd::as_raw_fd);
        let args = [self.addr, self.len, prot as u64, flags as u64, i64::from(fd) as u64, 0];
        // SAFETY: the scene's own addresses.
        let got = self.call(via, libc::SYS_mmap, args, || unsafe {
            libc::mmap(self.ptr(), self.len as usize, prot, flags, fd, 0) as i64
        })?;
        if got == self.addr { Ok(got) } else { Err(io::Error::from_raw_os_error(libc::EEXIST)) }
    }

    /// mremap to `len` bytes; `to` with `MREMAP_FIXED`. Returns the new place, whose unmapping is the caller's.
    pub(super) fn mremap(self, via: Via, len: u64, flags: i32, to: Option<Region>) -> io::Result<Region> {
        let to = to.map_or(0, Region::addr);
        let args = [self.addr, self.len, len, flags as u64, to, 0];
        // SAFETY: the scene's own memory, onto the scene's own addresses.
        let addr = self.call(via, libc::SYS_mremap, args, || unsafe {
            libc::mremap(self.ptr(), self.len as usize, len as usize, flags, to as *mut libc::c_void) as i64
        })?;
        Ok(Region { addr, len })
    }

    pub(super) fn madvise(self, via: Via, advice: i32) -> io::Result<u64> {
        let args = [self.addr, self.len, advice as u64, 0, 0, 0];
        // SAFETY: the scene's own memory.
        self.call(via, libc::SYS_madvise, args, || unsafe {
            libc::madvise(self.ptr(), self.len as usize, advice).into()
        })
    }

    pub(super) fn mprotect(self, via: Via, prot: i32) -> io::Result<u64> {
        let args = [self.addr, self.len, prot as u64, 0, 0, 0];
        // SAFETY: the scene's own memory.
        self.call(via, libc::SYS_mprotect, args, || unsafe {
            libc::mprotect(self.ptr(), self.len as usize, prot).into()
        })
    }

    pub(super) fn mlock(self) -> io::Result<u64> {
        // SAFETY: locking changes no content.
        check((unsafe { libc::mlock(self.ptr(), self.len as usize) }).into())
    }

    pub(super) fn remap_file_pages(self, via: Via, pgoff: u64) -> io::Result<u64> {
        // SAFETY: the scene's own memory.
        self.call(via, libc::SYS_remap_file_pages, [self.addr, self.len, 0, pgoff, 0, 0], || unsafe {
            libc::remap_file_pages(self.ptr(), self.len as usize, 0, pgoff as usize, 0).into()
        })
    }

    /// shmat at this address with `flags`.
    pub(super) fn shmat(self, via: Via, id: i32, flags: i32) -> io::Result<u64> {
        // SAFETY: the scene's own addresses.
        self.call(via, libc::SYS_shmat, [id as u64, self.addr, flags as u64, 0, 0, 0], || unsafe {
            libc::shmat(id, self.ptr(), flags) as i64
        })
    }

    pub(super) fn shmdt(self, via: Via) -> io::Result<u64> {
        // SAFETY: the scene's own memory.
        self.call(via, libc::SYS_shmdt, [self.addr, 0, 0, 0, 0, 0], || unsafe {
            libc::shmdt(self.ptr()).into()
        })
    }
}

/// A system call, through libc (by `libc`) or by the instruction itself. Whether it is one or the other is all that
/// `via` decides.
///
/// # Safety
/// What system call `nr` with `args` does to memory must be allowed.
pub(super) unsafe fn call(via: Via, nr: i64, args: [u64; 6], libc: impl FnOnce() -> i64) -> io::Result<u64> {
    match via {
        // SAFETY: the caller's promise.
        Via::RawSyscall => unsafe { raw::syscall(nr, args) },
        _ => check(libc()),
    }
}

/// Freed frames that are put to another use, so that the next fault cannot get the old frame back by accident.
///
/// The page allocator hands the frame that was freed last to the next fault on the same CPU, and a device that kept
/// its number would look right.
pub(super) struct Plug;

impl Plug {
    /// Keep the frame behind `page` from being freed before the scene is undone: a pipe refers to it.
    ///
    /// For changes of shared memory that an observer sees: it may fault a fresh page in before
    /// [`frames`](Self::frames) has taken the old one. A plain reference does not stop truncation, nor is it a pin.
    pub(super) fn hold(undo: &mut Undo, page: Region) -> Result<(), DisturbError> {
        let mut ends = [-1; 2];
        // SAFETY: room for two descriptors, which are new and ours.
        let [read, write] = unsafe {
            check(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC).into()).map_err(page.failed("pipe2"))?;
            ends.map(|fd| OwnedFd::from_raw_fd(fd))
        };
        let part = libc::iovec { iov_base: page.addr() as *mut libc::c_void, iov_len: PAGE_SIZE as usize };
        // SAFETY: the kernel checks the address; nobody ever reads the pipe.
        let held = unsafe { libc::vmsplice(write.as_raw_fd(), &raw const part, 1, 0) };
        check(held as i64).map_err(page.failed("vmsplice"))?;
        undo.keep((read, write));
        Ok(())
    }

    /// Take the frames that were just freed on this CPU until the scene is undone.
    pub(super) fn frames(undo: &mut Undo) -> Result<(), DisturbError> {
        // A page that was locked, or was on its way to the LRU lists, is freed only when this CPU's batches are
        // drained; zapping any page does that.
        let spare = Region::map(undo, 1, RW, PRIVATE | libc::MAP_POPULATE, None)?;
        spare.madvise(Via::Libc, libc::MADV_DONTNEED).map_err(spare.failed("MADV_DONTNEED"))?;
        Region::map(undo, 64, RW, PRIVATE | libc::MAP_POPULATE, None).map(drop)
    }
}

/// A memfd of `pages` pages, each filled with `stamp`.
pub(super) fn memfd(pages: u64, stamp: u64) -> Result<OwnedFd, DisturbError> {
    let failed = |source| DisturbError::Call { what: "memfd_create", range: None, source };
    // SAFETY: the name is a C string; the descriptor is new and ours.
    let file = unsafe {
        let fd = libc::memfd_create(c"userptr-disturb".as_ptr(), libc::MFD_CLOEXEC);
        check(fd.into()).map_err(failed)?;
        File::from_raw_fd(fd)
    };
    let page: Vec<u8> = stamp.to_ne_bytes().repeat((PAGE_SIZE / 8) as usize);
    for n in 0..pages {
        file.write_all_at(&page, n * PAGE_SIZE).map_err(failed)?;
    }
    Ok(file.into())
}

/// Ask again and again for up to `limit` whether `done`; `false` if the time ran out.
pub(super) fn wait_for(
    limit: Duration,
    pause: Duration,
    mut done: impl FnMut() -> Result<bool, DisturbError>,
) -> Result<bool, DisturbError> {
    let start = Instant::now();
    loop {
        if done()? {
            return Ok(true);
        }
        if start.elapsed() > limit {
            return Ok(false);
        }
        pause_for(pause);
    }
}

/// Sleep, to let a thread of the kernel get on.
pub(super) fn pause_for(duration: Duration) {
    MaySleep::enter(|cx| time::sleep(cx, duration));
}
