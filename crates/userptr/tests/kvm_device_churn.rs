// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kvm device copies while the memory that it reads comes and goes: it faults where there is nothing, and after each
//! change it sees what the program sees, and the program what it wrote. It is told of no change.
//!
//! Two seconds long; `USERPTR_CHURN_SECONDS=60 cargo test -p userptr --test kvm_device_churn` makes it a minute.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::testing::{in_child, require};
use interleave::{AtomicBool, AtomicU64, MaySleep, time};
use mmu_notifier::{Access, PAGE_SIZE, Range};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use userptr::device::kvm::{KvmContext, KvmDevice, Polling};
use userptr::device::{Command, DeviceAddr, Engine, Fence, FenceError};

const PAGE: usize = PAGE_SIZE as usize;
/// Pages that come and go: 8 MiB.
const PAGES: usize = 2048;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Memory by address; nothing refers to it.
#[derive(Clone, Copy)]
struct Memory {
    start: usize,
    pages: usize,
}

impl Memory {
    fn new(pages: usize) -> Memory {
        // SAFETY: the kernel picks a free range.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, RW, ANON, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Memory { start: at.addr(), pages }
    }

    fn part(self, first: usize, pages: usize) -> Memory {
        assert!(first + pages <= self.pages);
        Memory { start: self.start + first * PAGE, pages }
    }

    fn range(self) -> Range {
        Range::new(self.start as u64, (self.pages * PAGE) as u64).unwrap()
    }

    fn at(self) -> *mut libc::c_void {
        self.start as *mut libc::c_void
    }

    fn len(self) -> usize {
        self.pages * PAGE
    }

    fn map(self, fd: i32, flags: i32, offset: i64) {
        // SAFETY: over memory of the test's own, to which nothing refers.
        let at = unsafe { libc::mmap(self.at(), self.len(), RW, flags | libc::MAP_FIXED, fd, offset) };
        assert_eq!(at, self.at());
    }

    fn advise(self, advice: i32) -> bool {
        // SAFETY: memory of the test's own, to which nothing refers.
        unsafe { libc::madvise(self.at(), self.len(), advice) == 0 }
    }

    fn protect(self, prot: i32) {
        // SAFETY: as above.
        assert_eq!(unsafe { libc::mprotect(self.at(), self.len(), prot) }, 0);
    }

    fn word(self, page: usize) -> *mut u64 {
        assert!(page < self.pages);
        (self.start + page * PAGE) as *mut u64
    }
}

struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// What the memory allows after a change.
#[derive(PartialEq)]
enum Now {
    ReadWrite,
    Read,
    Nothing,
}

/// One change of `part`, done when this returns.
fn change(numbers: &mut Numbers, part: Memory, file: &File, offset: usize) -> Now {
    match numbers.below(11) {
        0 => {
            // SAFETY: memory of the test's own, to which nothing refers; it is mapped again before anybody else runs that
            // could map something here, or MAP_FIXED_NOREPLACE would tell.
            unsafe { libc::munmap(part.at(), part.len()) };
            part.map(-1, ANON | libc::MAP_FIXED_NOREPLACE, 0);
        }
        1 => part.map(-1, ANON, 0),
        2 => part.map(file.as_raw_fd(), libc::MAP_SHARED, offset as i64),
        3 => assert!(part.advise(libc::MADV_DONTNEED)),
        4 => {
            let _ = part.advise(libc::MADV_FREE) || part.advise(libc::MADV_PAGEOUT);
        }
        5 => {
            part.protect(libc::PROT_NONE);
            return Now::Nothing;
        }
        6 => {
            part.protect(libc::PROT_READ);
            return Now::Read;
        }
        7 => {
            let to = Memory::new(part.pages);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: both are the test's own, to which nothing refers; back it goes at once.
            unsafe {
                assert_eq!(libc::mremap(part.at(), part.len(), part.len(), flags, to.at()), to.at());
                assert_eq!(libc::mremap(to.at(), part.len(), part.len(), flags, part.at()), part.at());
            }
        }
        8 => {
            // SAFETY: the child does nothing and leaves.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: ends the child without the parent's exit handlers.
                unsafe { libc::_exit(0) };
            }
            for page in 0..part.pages {
                // SAFETY: mapped and writable; it breaks copy-on-write, with the child still there or not.
                unsafe { part.word(page).write_volatile(1) };
            }
            // SAFETY: our child.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        }
        9 => {
            let _ = part.advise(libc::MADV_COLLAPSE);
        }
        _ => {
            let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, mode, offset as u64, part.len() as u64).unwrap();
        }
    }
    Now::ReadWrite
}

fn run(cx: &mut MaySleep<'_>, context: &KvmContext, command: Command) -> Result<(), FenceError> {
    // SAFETY: nothing refers to what it writes.
    unsafe { context.submit(cx, &[command]) }.unwrap().wait(cx)
}

/// Copies one word of each page of `from` to `to`.
fn words(to: (DeviceAddr, usize), from: (DeviceAddr, usize), pages: usize) -> Command {
    Command::Blit2d {
        dst: to.0,
        dst_pitch: to.1 as u64,
        src: from.0,
        src_pitch: from.1 as u64,
        width: 8,
        height: pages as u64,
    }
}

/// The device and the program see the same in `part`, both ways, with `stamp` new to it.
fn check(cx: &mut MaySleep<'_>, context: &KvmContext, part: Memory, list: Memory, stamp: u64, now: &Now) {
    let device = |memory: Memory| DeviceAddr(memory.start as u64);
    let read = words((device(list), 8), (device(part), PAGE), part.pages);
    let write = words((device(part), PAGE), (device(list), 8), part.pages);
    let fault = |got: Result<(), FenceError>, access| match got {
        Err(FenceError::Fault(fault)) => {
            assert_eq!((fault.addr, fault.access), (device(part), access));
        }
        other => panic!("{other:?}, with no right to {access:?}"),
    };
    // SAFETY: `list` is mapped and nobody else's; `part` is the changer's, with the rights that `now` says.
    unsafe {
        let value = |page: usize| stamp << 16 | page as u64;
        match now {
            Now::Nothing => {
                fault(run(cx, context, read), Access::Read);
                part.protect(RW);
            }
            Now::Read => {
                (0..part.pages).for_each(|n| (list.start as *mut u64).add(n).write_volatile(0xdead));
                fault(run(cx, context, write), Access::Write);
                let spoilt = (0..part.pages).find(|n| part.word(*n).read_volatile() == 0xdead);
                assert_eq!(spoilt, None, "written without the right to");
                part.protect(RW);
            }
            Now::ReadWrite => {}
        }
        (0..part.pages).for_each(|n| part.word(n).write_volatile(value(n)));
        // The submission is a fence: the device reads later than these were written.
        run(cx, context, read).unwrap();
        for n in 0..part.pages {
            assert_eq!(
                (list.start as *const u64).add(n).read_volatile(),
                value(n),
                "the device read page {n}"
            );
            (list.start as *mut u64).add(n).write_volatile(!value(n));
        }
        run(cx, context, write).unwrap();
        for n in 0..part.pages {
            assert_eq!(part.word(n).read_volatile(), !value(n), "the device wrote page {n}");
        }
    }
}

/// Copies `memory` again and again, a piece at a time; faults of the source are expected, nothing else.
fn hammer(cx: &mut MaySleep<'_>, device: &KvmDevice, memory: Memory, stop: &AtomicBool) -> [u64; 2] {
    let context = KvmContext::new(cx, device).unwrap();
    let to = Memory::new(PAGES);
    let src = context.map_range(cx, memory.range(), Access::Read, None).unwrap().address();
    let dst = context.map_range(cx, to.range(), Access::Write, None).unwrap().address();
    let mut counts = [0; 2];
    let piece = (memory.len() / 8) as u64;
    for n in 0_u64.. {
        if stop.load(SeqCst) {
            break;
        }
        let offset = n % 8 * piece;
        let (src, dst) = (DeviceAddr(src.0 + offset), DeviceAddr(dst.0 + offset));
        match run(cx, &context, Command::Copy { dst, src, len: piece }) {
            Ok(()) => counts[0] += 1,
            Err(FenceError::Fault(fault)) => {
                assert_eq!(fault.access, Access::Read);
                assert!((src.0..src.0 + piece).contains(&fault.addr.0), "{fault}");
                counts[1] += 1;
            }
            Err(e) => panic!("{e}"),
        }
    }
    counts
}

#[test]
fn the_device_keeps_up_with_churn() {
    if !require(Capability::DevKvm) {
        return;
    }
    let seconds = std::env::var("USERPTR_CHURN_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2);
    let length = Duration::from_secs(seconds);
    in_child("the_device_keeps_up_with_churn", length + Duration::from_secs(60), || {
        let file = File::from(memfd_create("churn", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, (PAGES * PAGE) as u64).unwrap();
        let (memory, list) = (Memory::new(PAGES), Memory::new(1));
        let (stop, changes) = (AtomicBool::new(false), AtomicU64::new(0));
        MaySleep::enter(|cx| {
            let device = KvmDevice::open(Polling::default()).unwrap();
            let context = KvmContext::new(cx, &device).unwrap();
            context.map_range(cx, memory.range(), Access::Write, None).unwrap();
            context.map_range(cx, list.range(), Access::Write, None).unwrap();
            interleave::scope(cx, |scope, cx| {
                let copier = scope.spawn("copier", |cx| hammer(cx, &device, memory, &stop));
                let start = time::now();
                let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
                while start.elapsed() < length {
                    let pages = 1 + numbers.below(64);
                    let part = memory.part(numbers.below(PAGES - pages), pages);
                    let now = change(&mut numbers, part, &file, part.start - memory.start);
                    let stamp = changes.fetch_add(1, SeqCst) + 1;
                    check(cx, &context, part, list, stamp, &now);
                }
                stop.store(true, SeqCst);
                let [copies, faults] = copier.join(cx).unwrap();
                println!("{} changes, {copies} copies of 1 MiB, {faults} faults", changes.load(SeqCst));
                assert!(changes.load(SeqCst) > 10 && copies + faults > 0, "nothing was tried");
            });
        });
    });
}
