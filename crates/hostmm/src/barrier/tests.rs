// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each operation with a page-table walk of some ten milliseconds, and another thread that pins in it: without the
//! barrier the pin is stale for good (the control), with it the pin is the program's page.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::time::Duration;

use interleave::MaySleep;
use mmu_notifier::{PAGE_SIZE, Range};

use super::*;
use crate::capability::Capability;
use crate::pin::Pinner;
use crate::sys::test_memory::{Memory, RW};
use crate::testing;

/// The zap of this much memory takes long enough to be met in the middle, on any machine.
const WIDE: u64 = 512 << 20;

#[derive(Clone, Copy, Debug)]
enum Operation {
    DontNeed,
    Munmap,
    PunchHole,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Got {
    /// The device sees what the program sees.
    Same,
    /// The device kept a page that the program has lost.
    Stale,
    /// The kernel refused to pin: nothing is mapped.
    Nothing,
}

/// Resident pages: falls while a zap goes on, and asking takes no lock that a zap holds.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn memfd(bytes: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("wide", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

/// Pin the last page while `op` works on it and all pages before it. `None`: not in the middle of it.
fn pin_in_the_middle(op: Operation, barrier: Option<&MmBarrier>) -> Option<Got> {
    let file = memfd(WIDE);
    let flags = if matches!(op, Operation::PunchHole) { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let memory = match op {
        Operation::PunchHole => Memory::file(&file, WIDE, flags),
        _ => Memory::anon(WIDE),
    };
    memory.madvise(libc::MADV_NOHUGEPAGE).unwrap();
    memory.touch();
    let last = Range::page(memory.range.last_page());
    memory.write(last.start() - memory.range.start(), b"old");
    let pinner = Pinner::new(1).unwrap();
    let mut files = Files::default();
    let full = resident();
    let (done, is_done) = mpsc::channel::<()>();
    let range = memory.range;
    let mut memory = Some(memory);
    let (pin, in_the_middle) = std::thread::scope(|threads| {
        threads.spawn(|| {
            match op {
                Operation::DontNeed => memory.as_ref().unwrap().madvise(libc::MADV_DONTNEED).unwrap(),
                Operation::Munmap => drop(memory.take()),
                // SAFETY: a call on a file of our own.
                Operation::PunchHole => assert_eq!(0, unsafe {
                    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                    libc::fallocate(file.as_raw_fd(), mode, 0, WIDE as i64)
                }),
            }
            done.send(()).unwrap();
        });
        while full - resident().min(full) < range.pages() / 64 && is_done.try_recv().is_err() {}
        if let Some(barrier) = barrier {
            let before = is_done.try_recv().is_err();
            MaySleep::enter(|cx| barrier.wait(cx, last, Some(&mut files))).unwrap();
            (pinner.pin(last), before)
        } else {
            let pin = pinner.pin(last);
            (pin, is_done.try_recv().is_err())
        }
    });
    if !in_the_middle {
        return None;
    }
    let Some(memory) = memory else {
        // Somebody else's memory at the same address.
        let _new = Memory::map(Some(range.start()), WIDE, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
            .unwrap();
        return Some(match pin {
            Ok(_) => Got::Stale,
            Err(_) => Got::Nothing,
        });
    };
    let mut device = [0; 3];
    pin.unwrap().read_through(0, &mut device).unwrap();
    let cpu = memory.read(last.start() - range.start(), 3);
    Some(if device == cpu[..] { Got::Same } else { Got::Stale })
}

fn check(name: &str, op: Operation, with_barrier: Got) {
    if !testing::require(Capability::IoUring) {
        return;
    }
    testing::in_child(name, Duration::from_secs(600), || {
        // A pin that comes too late for the old page is the program's own.
        let control = testing::until(|| pin_in_the_middle(op, None).filter(|got| *got == Got::Stale));
        assert!(control.is_some(), "the control has teeth");
        let barrier = MmBarrier::open().unwrap();
        for _ in 0..3 {
            assert_eq!(testing::until(|| pin_in_the_middle(op, Some(&barrier))), Some(with_barrier));
        }
    });
}

#[test]
fn dontneed_is_over_after_the_barrier() {
    check("barrier::tests::dontneed_is_over_after_the_barrier", Operation::DontNeed, Got::Same);
}

#[test]
fn munmap_is_over_after_the_barrier() {
    check("barrier::tests::munmap_is_over_after_the_barrier", Operation::Munmap, Got::Nothing);
}

#[test]
fn a_hole_punch_is_over_after_the_barrier() {
    check("barrier::tests::a_hole_punch_is_over_after_the_barrier", Operation::PunchHole, Got::Same);
}

#[test]
fn a_memory_policy_and_the_dump_flag_survive_the_barrier() {
    let memory = Memory::anon(16 * PAGE_SIZE);
    let barrier = MmBarrier::open().unwrap();
    let dumped = |page| !barrier.maps.vm_flags(page).unwrap().contains(VmFlags::DD);
    let part = Range::new(memory.range.start() + 4 * PAGE_SIZE, 4 * PAGE_SIZE).unwrap();
    for dump in [true, false] {
        mm::set_dump(memory.range, dump).unwrap();
        // MPOL_BIND to node 0.
        let nodes: libc::c_ulong = 1;
        // SAFETY: the mask is ours and lives across the call; no page moves.
        let bound = unsafe {
            libc::syscall(libc::SYS_mbind, part.start(), part.len(), 2, &raw const nodes, 64usize, 0u32)
        };
        if bound != 0 {
            // A kernel without NUMA has no policies to lose; the fallback is what runs there.
            testing::skip(Capability::Numa, "mbind is not in this kernel");
        } else {
            assert!(!mm::has_default_policy(part.first_page()).unwrap());
        }
        MaySleep::enter(|cx| barrier.wait(cx, memory.range, None)).unwrap();
        assert!(bound != 0 || !mm::has_default_policy(part.first_page()).unwrap());
        for page in memory.range.iter_pages() {
            assert_eq!(dumped(page), dump);
        }
        mm::mbind_default(part).unwrap();
    }
}

#[test]
fn a_range_without_mappings_has_a_barrier_too() {
    let memory = Memory::anon(4 * PAGE_SIZE);
    let range = memory.range;
    memory.munmap();
    let barrier = MmBarrier::open().unwrap();
    MaySleep::enter(|cx| barrier.wait(cx, range, None)).unwrap();
}
