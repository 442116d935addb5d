// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kvm device and the cpu device do the same with any batch: the same bytes, or the same fault.
//!
//! `PROPTEST_CASES` says how many are tried.

use std::cell::Cell;
use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::primary::{HostMm, Source};
use hostmm::testing::{in_child, require};
use hostmm::uffd::{self, UffdSource};
use interleave::MaySleep;
use mmu_notifier::{Access, PAGE_SIZE, Range};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};
use userptr::device::cpu::Cpu;
use userptr::device::kvm::{KvmContext, KvmDevice, Polling};
use userptr::device::{Command, Device, DeviceAddr, Engine, Fault, Fence, FenceError};

const PAGE: usize = PAGE_SIZE as usize;
/// Where both devices have the memory.
const BASE: u64 = 1 << 40;
const PAGES: usize = 12;
/// First page, pages, access. Page 4 is not mapped.
const MAPPINGS: [(usize, usize, Access); 4] =
    [(0, 4, Access::Write), (5, 2, Access::Read), (7, 1, Access::Write), (8, 4, Access::Write)];
/// Mapped in the devices, and taken from the program afterwards.
const GONE: usize = 7;

/// The memory of one device, by address.
struct Memory(*mut u8);

impl Memory {
    fn new() -> Memory {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel picks a free range.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGES * PAGE, prot, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Memory(at.cast())
    }

    fn range(&self, first: usize, pages: usize) -> Range {
        Range::new((self.0.addr() + first * PAGE) as u64, (pages * PAGE) as u64).unwrap()
    }

    /// Maps it into `device`.
    fn bind<S: Source, D: Device<HostMm<S>>>(&self, cx: &mut MaySleep<'_>, mm: &HostMm<S>, device: &D) {
        for (first, pages, access) in MAPPINGS {
            let got = device.get_pages(cx, mm, self.range(first, pages), access).unwrap();
            let at = DeviceAddr(BASE + (first * PAGE) as u64);
            assert!(device.map(cx, got, Some(at)).is_ok());
        }
        // SAFETY: the page is this test's, and nothing refers to it.
        assert_eq!(unsafe { libc::mprotect(self.0.add(GONE * PAGE).cast(), PAGE, libc::PROT_NONE) }, 0);
    }

    fn fill(&self, bytes: &[u8]) {
        for page in (0..PAGES).filter(|page| *page != GONE) {
            let from = &bytes[page * PAGE..][..PAGE];
            // SAFETY: inside the memory and writable, and no device is at work.
            unsafe { self.0.add(page * PAGE).copy_from_nonoverlapping(from.as_ptr(), PAGE) };
        }
    }

    /// What is in it; the page that is gone reads as zeroes.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; PAGES * PAGE];
        for page in (0..PAGES).filter(|page| *page != GONE) {
            let to = &mut bytes[page * PAGE..][..PAGE];
            // SAFETY: inside the memory and readable, and no device is at work.
            unsafe { self.0.add(page * PAGE).copy_to_nonoverlapping(to.as_mut_ptr(), PAGE) };
        }
        bytes
    }
}

/// Runs of equal bytes, so that comparing gets somewhere.
fn content(seed: u8) -> Vec<u8> {
    (0..PAGES * PAGE).map(|n| ((n >> 9) as u8).wrapping_mul(seed) ^ u8::from(n % 1021 == 0)).collect()
}

fn address() -> impl Strategy<Value = DeviceAddr> {
    let edge = (0..=PAGES as i64, -40..40_i64).prop_map(|(page, off)| page * PAGE as i64 + off);
    let inside = (any::<bool>(), 0..(3 * PAGE) as i64)
        .prop_map(|(high, n)| n + if high { 8 * PAGE as i64 } else { 0 });
    prop_oneof![1 => edge, 1 => 0..(PAGES * PAGE) as i64, 14 => inside]
        .prop_map(|offset| DeviceAddr(BASE.wrapping_add_signed(offset)))
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..=64_u64, 4 => 0..=5000_u64, 1 => Just(PAGE_SIZE), 1 => 0..=13_000_u64]
}

fn command() -> impl Strategy<Value = Command> {
    let result = address;
    prop_oneof![
        (address(), address(), length()).prop_map(|(dst, src, len)| Command::Copy { dst, src, len }),
        (address(), length(), any::<u8>()).prop_map(|(dst, len, byte)| Command::Fill { dst, len, byte }),
        (address(), length(), result()).prop_map(|(src, len, result)| Command::Checksum { src, len, result }),
        (address(), address(), length(), result()).prop_map(|(a, b, len, result)| Command::Compare {
            a,
            b,
            len,
            result
        }),
        (address(), address(), 0..200_u64, 0..300_u64, 0..300_u64, 0..12_u64).prop_map(
            |(dst, src, width, dst_gap, src_gap, height)| Command::Blit2d {
                dst,
                dst_pitch: width + dst_gap,
                src,
                src_pitch: width + src_gap,
                width,
                height,
            }
        ),
        (address(), any::<u32>())
            .prop_map(|(dst, value)| Command::StoreDword { dst: DeviceAddr(dst.0 & !3), value }),
    ]
}

/// The device addresses that it may have written in part when it faults.
fn written(command: &Command) -> std::ops::Range<u64> {
    let span = |at: DeviceAddr, len: u64| at.0..at.0 + len;
    match *command {
        Command::Copy { dst, len, .. } | Command::Fill { dst, len, .. } => span(dst, len),
        Command::Checksum { result, .. } | Command::Compare { result, .. } => span(result, 8),
        Command::Blit2d { dst, dst_pitch, height, .. } => span(dst, dst_pitch * height),
        Command::StoreDword { dst, .. } => span(dst, 4),
    }
}

fn run(cx: &mut MaySleep<'_>, engine: &impl Engine, batch: &[Command]) -> Result<(), Fault> {
    // SAFETY: nothing refers to the memory behind.
    match unsafe { engine.submit(cx, batch) }.unwrap().wait(cx) {
        Ok(()) => Ok(()),
        Err(FenceError::Fault(fault)) => Err(fault),
        Err(e) => panic!("{e}"),
    }
}

fn agree() {
    let mm = HostMm::new(UffdSource::open(&uffd::Options::default()).unwrap(), 8).unwrap();
    let cpu = Cpu::new();
    let (ours, theirs) = (Memory::new(), Memory::new());
    let (device, kvm) = MaySleep::enter(|cx| {
        let device = KvmDevice::open(Polling::default()).unwrap();
        let kvm = KvmContext::new(cx, &device).unwrap();
        ours.bind(cx, &mm, &kvm);
        theirs.bind(cx, &mm, &cpu);
        (device, kvm)
    });
    let config = Config { failure_persistence: None, ..Config::default() };
    let batches = (any::<u8>(), prop::collection::vec(command(), 1..12));
    let (faults, done) = (Cell::new(0), Cell::new(0));
    let outcome = TestRunner::new(config).run(&batches, |(seed, mut batch)| {
        batch.retain(|command| command.check().is_ok());
        let before = content(seed);
        ours.fill(&before);
        theirs.fill(&before);
        let (got, wanted) = MaySleep::enter(|cx| (run(cx, &kvm, &batch), run(cx, &cpu, &batch)));
        prop_assert_eq!(got, wanted, "kvm, cpu, of {:?}", batch);
        let spoilt = got.map_or_else(|fault| written(&batch[fault.command]), |()| 0..0);
        let (ours, theirs) = (ours.bytes(), theirs.bytes());
        let differs = |n: &usize| ours[*n] != theirs[*n] && !spoilt.contains(&(BASE + *n as u64));
        let differs = (0..ours.len()).find(differs);
        prop_assert_eq!(differs, None, "first offset that differs, kvm, cpu, of {:?}", batch);
        let count = if got.is_ok() { &done } else { &faults };
        count.set(count.get() + 1);
        Ok(())
    });
    match outcome {
        Ok(()) => println!("{} batches done, {} faulted", done.get(), faults.get()),
        Err(TestError::Fail(why, (seed, batch))) => panic!("{why}\nseed {seed}, {batch:#x?}"),
        Err(e) => panic!("{e}"),
    }
    assert!(faults.get() > 0 && done.get() > 0, "one kind was never tried");
    drop(device);
}

#[test]
fn any_batch_has_the_same_outcome() {
    if !require(Capability::DevKvm) || !require(Capability::Userfaultfd) {
        return;
    }
    in_child("any_batch_has_the_same_outcome", Duration::from_secs(120), agree);
}
