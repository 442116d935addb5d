// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cpu device against the words of the command set, on real memory.

mod common;

use common::memory::Memory;
use common::{DEADLINE, NoNotifier};
use hostmm::capability::Capability;
use hostmm::primary::HostMm;
use hostmm::testing;
use interleave::MaySleep;
use mmu_notifier::{Access, PAGE_SIZE};
use userptr::device::cpu::Cpu;
use userptr::device::{
    Command, CommandError, Device, DeviceAddr, Engine, Fault, Fence, FenceError, SubmitError, checksum,
};

const PAGES: u64 = 40;
const BYTES: usize = (PAGES * PAGE_SIZE) as usize;
const BASE: u64 = 0x7000_0000;

/// What the batch does to a copy of the memory, byte by byte.
fn model(memory: &mut [u8], command: &Command) {
    let at = |addr: DeviceAddr| (addr.0 - BASE) as usize;
    match *command {
        Command::Copy { dst, src, len } => memory.copy_within(at(src)..at(src) + len as usize, at(dst)),
        Command::Fill { dst, len, byte } => memory[at(dst)..][..len as usize].fill(byte),
        Command::Checksum { src, len, result } => {
            let sum = checksum(&memory[at(src)..][..len as usize]);
            memory[at(result)..][..8].copy_from_slice(&sum.to_le_bytes());
        }
        Command::Compare { a, b, len, result } => {
            let same = (0..len as usize).take_while(|i| memory[at(a) + i] == memory[at(b) + i]).count();
            memory[at(result)..][..8].copy_from_slice(&(same as u64).to_le_bytes());
        }
        Command::Blit2d { dst, dst_pitch, src, src_pitch, width, height } => {
            for row in 0..height {
                let from = at(src) + (row * src_pitch) as usize;
                memory.copy_within(from..from + width as usize, at(dst) + (row * dst_pitch) as usize);
            }
        }
        Command::StoreDword { dst, value } => {
            memory[at(dst)..][..4].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// A command somewhere in the memory; many are refused.
fn command(seed: u64) -> Command {
    let pick = |n: u64, below: u64| interleave::mix(seed, n) % below;
    let addr = |n| DeviceAddr(BASE + pick(n, BYTES as u64 / 2));
    let len = pick(9, 70 << 10);
    match pick(0, 6) {
        0 => Command::Copy { dst: addr(1), src: addr(2), len },
        1 => Command::Fill { dst: addr(1), len, byte: seed as u8 },
        2 => Command::Checksum { src: addr(1), len, result: addr(2) },
        3 => Command::Compare { a: addr(1), b: addr(2), len, result: addr(3) },
        4 => {
            let (width, height) = (1 + pick(3, 500), pick(4, 60));
            let pitch = |n| width + pick(n, 200);
            Command::Blit2d {
                dst: addr(1),
                dst_pitch: pitch(5),
                src: addr(2),
                src_pitch: pitch(6),
                width,
                height,
            }
        }
        _ => Command::StoreDword { dst: DeviceAddr(addr(1).0 & !3), value: seed as u32 },
    }
}

#[test]
fn random_batches_do_what_the_words_say() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    testing::in_child("random_batches_do_what_the_words_say", DEADLINE, || {
        let (mm, cpu) = (HostMm::new(NoNotifier, 1).unwrap(), Cpu::new());
        let memory = Memory::stamped(PAGES, 0x0123_4567_89ab_cdef);
        MaySleep::enter(|cx| {
            let pages = cpu.get_pages(cx, &mm, memory.0, Access::Write).unwrap();
            let mapping = Device::<HostMm<NoNotifier>>::map(&cpu, cx, pages, Some(DeviceAddr(BASE))).unwrap();
            let mut expected = memory.bytes();
            let mut refused = 0;
            for seed in 0..600 {
                let batch: Vec<Command> = (0..4).map(|n| command(seed * 4 + n)).collect();
                // SAFETY: the memory is the test's, and used by address.
                match unsafe { cpu.submit(cx, &batch) } {
                    Ok(fence) => {
                        assert!(fence.is_signaled());
                        fence.wait(cx).unwrap();
                        batch.iter().for_each(|command| model(&mut expected, command));
                        assert!(memory.bytes() == expected, "{batch:x?}");
                    }
                    Err(e) => {
                        assert!(matches!(e, SubmitError::Command(CommandError::Overlap { .. })), "{e}");
                        refused += 1;
                    }
                }
            }
            assert!((50..550).contains(&refused), "{refused} of 600 batches");
            Device::<HostMm<NoNotifier>>::unmap(&cpu, cx, mapping);
        });
    });
}

#[test]
fn what_is_not_mapped_faults_at_its_address() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    testing::in_child("what_is_not_mapped_faults_at_its_address", DEADLINE, || {
        let (mm, cpu) = (HostMm::new(NoNotifier, 1).unwrap(), Cpu::new());
        let memory = Memory::stamped(4, 1);
        MaySleep::enter(|cx| {
            let map = |cx: &mut MaySleep<'_>, at, access| {
                let pages = cpu.get_pages(cx, &mm, memory.0, access).unwrap();
                Device::<HostMm<NoNotifier>>::map(&cpu, cx, pages, at).map_err(|(error, _)| error)
            };
            map(cx, Some(DeviceAddr(BASE)), Access::Write).unwrap();
            map(cx, Some(DeviceAddr(BASE + 4 * PAGE_SIZE)), Access::Read).unwrap();
            assert!(map(cx, Some(DeviceAddr(BASE + PAGE_SIZE)), Access::Read).is_err(), "it is taken");
            assert!(map(cx, Some(DeviceAddr(u64::MAX - 4095)), Access::Read).is_err(), "past the end");
            let fault = |cx: &mut MaySleep<'_>, dst: u64, len| {
                let fill = |dst, len| Command::Fill { dst: DeviceAddr(dst), len, byte: 7 };
                // SAFETY: the memory is the test's, and used by address.
                let fence = unsafe { cpu.submit(cx, &[fill(BASE, 1), fill(dst, len)]) }.unwrap();
                match fence.wait(cx) {
                    Err(FenceError::Fault(Fault { command: 1, addr, access: Access::Write })) => Some(addr.0),
                    other => panic!("{other:?}"),
                }
            };
            assert_eq!(fault(cx, BASE - 1, 1), Some(BASE - 1), "nothing there");
            assert_eq!(
                fault(cx, BASE + 3 * PAGE_SIZE, 2 * PAGE_SIZE),
                Some(BASE + 4 * PAGE_SIZE),
                "read only"
            );
            drop(Memory(memory.page(2)));
            let hole = BASE + 2 * PAGE_SIZE;
            assert_eq!(fault(cx, BASE + 100, 4 * PAGE_SIZE - 100), Some(hole), "no longer mapped");
        });
    });
}
