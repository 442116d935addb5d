// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device against live memory. Each test makes it in a child process of its own.

mod commands;
mod faults;
mod hangs;
mod spaces;

use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::testing;
use interleave::MaySleep;
use mmu_notifier::{Access, Range};

use super::*;
use crate::device::{Command, DeviceAddr, Engine, Fault, Fence, FenceError, WaitError, checksum};

const PAGE: usize = 4096;

/// Anonymous memory, by address: the device writes it, so no reference to it exists.
struct Memory(*mut u8, usize);

impl Memory {
    fn new(pages: usize) -> Memory {
        let len = pages * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel picks a free range.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        Memory(at.cast(), len)
    }

    fn range(&self) -> Range {
        Range::new(self.0.addr() as u64, self.1 as u64).unwrap()
    }

    fn at(&self, offset: usize) -> DeviceAddr {
        DeviceAddr((self.0.addr() + offset) as u64)
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.1);
        for (n, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping.
            unsafe { self.0.add(offset + n).write_volatile(*byte) };
        }
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.1);
        // SAFETY: inside the mapping.
        (0..len).map(|n| unsafe { self.0.add(offset + n).read_volatile() }).collect()
    }

    fn word(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.read(offset, 8).try_into().unwrap())
    }

    fn unmap(&self, page: usize, pages: usize) {
        // SAFETY: the range is ours; the test does not touch it afterwards.
        assert_eq!(unsafe { libc::munmap(self.0.add(page * PAGE).cast(), pages * PAGE) }, 0);
    }

    fn protect(&self, page: usize, prot: i32) {
        // SAFETY: the range is ours, without references to it.
        assert_eq!(unsafe { libc::mprotect(self.0.add(page * PAGE).cast(), PAGE, prot) }, 0);
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| (n as u8).wrapping_mul(31).wrapping_add((n >> 8) as u8) ^ seed).collect()
}

/// Runs `body` in a child, with a device and a context.
fn live(name: &str, polling: Polling, body: impl FnOnce(&mut MaySleep<'_>, &KvmDevice, &KvmContext)) {
    if !testing::require(Capability::DevKvm) {
        return;
    }
    testing::in_child(&format!("device::kvm::tests::{name}"), Duration::from_secs(60), || {
        MaySleep::enter(|cx| {
            let device = KvmDevice::open(polling).unwrap();
            let context = KvmContext::new(cx, &device).unwrap();
            body(cx, &device, &context);
        });
    });
}

const SOON: Duration = Duration::from_millis(50);

fn submit(cx: &mut MaySleep<'_>, context: &KvmContext, batch: &[Command]) -> KvmFence {
    // SAFETY: the memory of these tests is used through pointers only, and what a batch writes not while it runs.
    unsafe { context.submit(cx, batch) }.unwrap()
}

fn run(cx: &mut MaySleep<'_>, context: &KvmContext, batch: &[Command]) -> Result<(), FenceError> {
    submit(cx, context, batch).wait(cx)
}

fn store(memory: &Memory, offset: usize, value: u32) -> Command {
    Command::StoreDword { dst: memory.at(offset), value }
}
