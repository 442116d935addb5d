// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device against live memory. Each test makes it in a child process of its own.

use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::testing;
use interleave::MaySleep;
use mmu_notifier::{Access, Range};

use super::*;
use crate::device::{Command, DeviceAddr, Engine, Fault, Fence, FenceError, checksum};

const PAGE: usize = 4096;

/// Anonymous memory, by address: the device writes it, so no reference to it exists.
struct Memory(*mut u8, usize);

impl Memory {
    fn new(pages: usize) -> Memory {
        let len = pages * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel picks a free range.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
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

fn run(cx: &mut MaySleep<'_>, context: &KvmContext, batch: &[Command]) -> Result<(), FenceError> {
    // SAFETY: the memory of these tests is used through pointers only, and not while a batch runs.
    unsafe { context.submit(cx, batch) }.unwrap().wait(cx)
}

#[test]
fn every_command_does_what_it_says() {
    live("every_command_does_what_it_says", Polling::default(), |cx, _, context| {
        let memory = Memory::new(16);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let bytes = pattern(2 * PAGE, 7);
        memory.write(100, &bytes);
        run(cx, context, &[Command::Copy { dst: memory.at(5 * PAGE + 3), src: memory.at(100), len: 2 * PAGE as u64 }])
            .unwrap();
        assert_eq!(memory.read(5 * PAGE + 3, 2 * PAGE), bytes);
        assert_eq!(memory.read(5 * PAGE, 3), [0; 3]);
        assert_eq!(memory.read(7 * PAGE + 3, 1), [0]);
        run(
            cx,
            context,
            &[
                Command::Fill { dst: memory.at(8 * PAGE + 1), len: 5000, byte: 0xa5 },
                Command::Checksum { src: memory.at(101), len: 8111, result: memory.at(12 * PAGE) },
                Command::Compare {
                    a: memory.at(100),
                    b: memory.at(5 * PAGE + 3),
                    len: 8192,
                    result: memory.at(12 * PAGE + 8),
                },
                Command::StoreDword { dst: memory.at(5 * PAGE + 5000), value: 0x1234_5678 },
                Command::Compare {
                    a: memory.at(100),
                    b: memory.at(5 * PAGE + 3),
                    len: 8192,
                    result: memory.at(12 * PAGE + 16),
                },
                Command::Blit2d {
                    dst: memory.at(10 * PAGE),
                    dst_pitch: 50,
                    src: memory.at(100),
                    src_pitch: 100,
                    width: 20,
                    height: 3,
                },
            ],
        )
        .unwrap();
        assert_eq!(memory.read(8 * PAGE, 5002), [vec![0], vec![0xa5; 5000], vec![0]].concat());
        assert_eq!(memory.word(12 * PAGE), checksum(&bytes[1..8112]));
        assert_eq!(memory.word(12 * PAGE + 8), 8192);
        assert_eq!(memory.word(12 * PAGE + 16), 4997);
        for row in 0..3 {
            assert_eq!(memory.read(10 * PAGE + row * 50, 20), bytes[row * 100..][..20]);
            assert_eq!(memory.read(10 * PAGE + row * 50 + 20, 30), [0; 30]);
        }
    });
}

#[test]
fn what_is_not_mapped_faults_with_its_address() {
    live("what_is_not_mapped_faults_with_its_address", Polling::default(), |cx, _, context| {
        let memory = Memory::new(4);
        let read_only = Memory::new(1);
        memory.write(0, &pattern(4 * PAGE, 1));
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        context.map_range(cx, read_only.range(), Access::Read, None).unwrap();
        let fault = |cx: &mut MaySleep<'_>, batch: &[Command]| match run(cx, context, batch) {
            Err(FenceError::Fault(fault)) => fault,
            other => panic!("{other:?}"),
        };
        let nop = Command::Fill { dst: memory.at(0), len: 0, byte: 0 };
        let copy = |dst, src| Command::Copy { dst, src, len: 8192 };
        let far = DeviceAddr(0x1234_5000);
        let got = fault(cx, &[nop, copy(far, memory.at(0))]);
        assert_eq!(got, Fault { command: 1, addr: far, access: Access::Write });
        let got = fault(cx, &[copy(memory.at(0), far)]);
        assert_eq!(got, Fault { command: 0, addr: far, access: Access::Read });
        let store = Command::StoreDword { dst: read_only.at(8), value: 1 };
        let got = fault(cx, &[nop, nop, store, nop]);
        assert_eq!(got, Fault { command: 2, addr: read_only.at(8), access: Access::Write });
        // The system's own addresses, and those that no processor has.
        for at in [SYSTEM, SYSTEM + 0x8000, 1 << 47, u64::MAX - 9000] {
            let got = fault(cx, &[nop, copy(DeviceAddr(at), memory.at(0))]);
            assert_eq!(got, Fault { command: 1, addr: DeviceAddr(at), access: Access::Write });
        }
        run(cx, context, &[nop]).unwrap();
        assert_eq!(memory.read(0, 4 * PAGE), pattern(4 * PAGE, 1));
        assert_eq!(read_only.read(0, PAGE), [0; PAGE]);
    });
}

#[test]
fn what_the_program_has_not_faults_with_its_address() {
    live("what_the_program_has_not_faults_with_its_address", Polling::default(), |cx, _, context| {
        let memory = Memory::new(8);
        memory.write(0, &pattern(8 * PAGE, 1));
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let fault = |cx: &mut MaySleep<'_>, batch: &[Command]| match run(cx, context, batch) {
            Err(FenceError::Fault(fault)) => fault,
            other => panic!("{other:?}"),
        };
        let copy = Command::Copy { dst: memory.at(10), src: memory.at(4 * PAGE + 5), len: 2 * PAGE as u64 };
        run(cx, context, &[copy]).unwrap();
        memory.unmap(5, 1);
        assert_eq!(fault(cx, &[copy]), Fault { command: 0, addr: memory.at(5 * PAGE), access: Access::Read });
        memory.protect(1, libc::PROT_READ);
        let copy = Command::Copy { dst: memory.at(10), src: memory.at(2 * PAGE + 5), len: 8000 };
        assert_eq!(fault(cx, &[copy]), Fault { command: 0, addr: memory.at(PAGE), access: Access::Write });
        memory.protect(1, libc::PROT_READ | libc::PROT_WRITE);
        run(cx, context, &[copy]).unwrap();
    });
}
