// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kvm device costs: `cargo bench -p userptr --bench kvm_device`; `-- latency` for that alone.
//!
//! Machines are noisy, and what others do to a run only ever adds to it: printed are the fastest tenth and the median.
//! A polled figure needs a core of its own. Copies of the device and of the host alternate, and are compared by the
//! processor time that this process was given, guest included, because other programs share the cores.

use std::error::Error;
use std::time::{Duration, Instant};

use interleave::MaySleep;
use mmu_notifier::{Access, Range};
use userptr::device::kvm::{KvmContext, KvmDevice, KvmMapping, Polling};
use userptr::device::{Command, DeviceAddr, Engine, Fence};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Anonymous memory, by address.
struct Memory(*mut u8, usize);

impl Memory {
    fn new(len: usize, huge: bool) -> Memory {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: the kernel picks a free range, which is then ours.
        unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                len + 2 * MIB,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            let at = at.byte_add(at.align_offset(2 * MIB));
            libc::madvise(at, len, advice);
            at.cast::<u8>().write_bytes(1, len);
            Memory(at.cast(), len)
        }
    }

    fn range(&self) -> Range {
        Range::new(self.0.addr() as u64, self.1 as u64).expect("mapped")
    }

    fn map(&self, cx: &mut MaySleep<'_>, context: &KvmContext) -> Outcome<KvmMapping> {
        Ok(context.map_range(cx, self.range(), Access::Write, None)?)
    }
}

fn host_copy(dst: &Memory, src: &Memory) {
    // SAFETY: both are ours, of one length, and apart.
    unsafe {
        std::arch::asm!("rep movsb", inout("rdi") dst.0 => _, inout("rsi") src.0 => _, inout("rcx") dst.1 => _);
    }
}

fn run(cx: &mut MaySleep<'_>, context: &KvmContext, batch: &[Command]) -> Outcome<()> {
    // SAFETY: nobody uses the memory of these measurements meanwhile.
    Ok(unsafe { context.submit(cx, batch) }?.wait(cx)?)
}

/// Processor time of this process so far.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// The fastest tenth and the median.
fn measure(times: usize, mut one: impl FnMut() -> Outcome<()>) -> Outcome<(Duration, Duration)> {
    let mut took = Vec::new();
    for _ in 0..times {
        let start = Instant::now();
        one()?;
        took.push(start.elapsed());
    }
    took.sort();
    Ok((took[times / 10], took[times / 2]))
}

fn print(what: &str, (fast, median): (Duration, Duration)) {
    println!("{what:<58} {:>10.2} us {:>10.2} us", fast.as_secs_f64() * 1e6, median.as_secs_f64() * 1e6);
}

fn latency(cx: &mut MaySleep<'_>) -> Outcome<()> {
    for (name, polling) in [("polled, needs a core", Polling::Always), ("not polled", Polling::Never)] {
        let device = KvmDevice::open(polling)?;
        let context = KvmContext::new(cx, &device)?;
        let times = if polling == Polling::Always { 20_000 } else { 1000 };
        print(&format!("empty command, {name}"), measure(times, || run(cx, &context, &[]))?);
        let other = KvmContext::new(cx, &device)?;
        let switch = measure(times / 50, || {
            run(cx, &context, &[])?;
            run(cx, &other, &[])
        })?;
        print(&format!("two of different address spaces, {name}"), switch);
    }
    Ok(())
}

fn copies(cx: &mut MaySleep<'_>, huge: bool) -> Outcome<()> {
    // A waiter that spins would count as the device's work.
    let device = KvmDevice::open(Polling::Never)?;
    let context = KvmContext::new(cx, &device)?;
    let (dst, src) = (Memory::new(64 * MIB, huge), Memory::new(64 * MIB, huge));
    let name = if huge { "huge pages" } else { "4 KiB pages" };
    let start = Instant::now();
    let (to, from) = (dst.map(cx, &context)?, src.map(cx, &context)?);
    let mapped = start.elapsed();
    print(&format!("map 2 x 64 MiB, {name}"), (mapped, mapped));
    let batch = [Command::Copy { dst: to.address(), src: from.address(), len: dst.1 as u64 }];
    let start = Instant::now();
    run(cx, &context, &batch)?;
    let first = start.elapsed();
    print(&format!("copy 64 MiB for the first time, {name}"), (first, first));
    let (mut device_took, mut host_took) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        let start = cpu_time();
        run(cx, &context, &batch)?;
        device_took.push(cpu_time() - start);
        let start = cpu_time();
        host_copy(&dst, &src);
        host_took.push(cpu_time() - start);
    }
    device_took.sort();
    host_took.sort();
    print(&format!("copy 64 MiB, device, {name}, processor time"), (device_took[6], device_took[30]));
    print(&format!("copy 64 MiB, host rep movsb, {name}, processor time"), (host_took[6], host_took[30]));
    let ratio = |at: usize| host_took[at].as_secs_f64() / device_took[at].as_secs_f64();
    println!(
        "{:<58} {:>10.2} x  {:>10.2} x",
        "    the device's speed in terms of the host's",
        ratio(6),
        ratio(30)
    );
    let result = Memory::new(PAGE, false);
    let at = result.map(cx, &context)?.address();
    let sum = [Command::Checksum { src: from.address(), len: src.1 as u64, result: at }];
    print(&format!("checksum 64 MiB, {name}"), measure(10, || run(cx, &context, &sum))?);
    let fill = [Command::Fill { dst: to.address(), len: dst.1 as u64, byte: 1 }];
    print(&format!("fill 64 MiB, {name}"), measure(10, || run(cx, &context, &fill))?);
    let compare = [Command::Compare { a: to.address(), b: from.address(), len: dst.1 as u64, result: at }];
    print(&format!("compare 64 MiB, {name}"), measure(10, || run(cx, &context, &compare))?);
    let start = Instant::now();
    context.unmap_range(cx, to);
    context.unmap_range(cx, from);
    let unmapped = start.elapsed();
    print(&format!("unmap 2 x 64 MiB, {name}"), (unmapped, unmapped));
    Ok(())
}

fn small(cx: &mut MaySleep<'_>) -> Outcome<()> {
    let device = KvmDevice::open(Polling::Always)?;
    let context = KvmContext::new(cx, &device)?;
    let (dst, src) = (Memory::new(PAGE, false), Memory::new(PAGE, false));
    // Until it has been loaded, an address space needs no flush.
    run(cx, &context, &[])?;
    let both = measure(300, || {
        let mapping = dst.map(cx, &context)?;
        context.unmap_range(cx, mapping);
        Ok(())
    })?;
    print("map and unmap 4 KiB, polled", both);
    let (to, from) = (dst.map(cx, &context)?, src.map(cx, &context)?);
    let copy = [Command::Copy { dst: to.address(), src: from.address(), len: PAGE as u64 }];
    print("copy 4 KiB, polled", measure(5000, || run(cx, &context, &copy))?);
    let host = measure(5000, || {
        host_copy(&dst, &src);
        Ok(())
    })?;
    print("copy 4 KiB, host rep movsb", host);
    let nowhere = [Command::StoreDword { dst: DeviceAddr(0x1000), value: 0 }];
    let fault = measure(200, || match run(cx, &context, &nowhere) {
        Err(_) => Ok(()),
        Ok(()) => Err("it did not fault".into()),
    })?;
    print("a fault: submit to report", fault);
    Ok(())
}

fn main() -> Outcome<()> {
    println!("{:<58} {:>13} {:>13}", "", "fastest tenth", "median");
    MaySleep::enter(|cx| {
        latency(cx)?;
        if std::env::args().any(|arg| arg == "latency") {
            return Ok(());
        }
        copies(cx, false)?;
        copies(cx, true)?;
        small(cx)
    })
}
