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

#[test]
fn every_command_does_what_it_says() {
    live("every_command_does_what_it_says", Polling::default(), |cx, _, context| {
        let memory = Memory::new(16);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let bytes = pattern(2 * PAGE, 7);
        memory.write(100, &bytes);
        run(
            cx,
            context,
            &[Command::Copy { dst: memory.at(5 * PAGE + 3), src: memory.at(100), len: 2 * PAGE as u64 }],
        )
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
        // The first byte that is not there, also in the middle of an access.
        let end = memory.at(4 * PAGE);
        let sum = Command::Checksum { src: memory.at(0), len: 100, result: memory.at(4 * PAGE - 3) };
        assert_eq!(fault(cx, &[sum]), Fault { command: 0, addr: end, access: Access::Write });
        let sum = Command::Checksum { src: memory.at(3 * PAGE + 1), len: 5000, result: memory.at(0) };
        assert_eq!(fault(cx, &[sum]), Fault { command: 0, addr: end, access: Access::Read });
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

fn store(memory: &Memory, offset: usize, value: u32) -> Command {
    Command::StoreDword { dst: memory.at(offset), value }
}

#[test]
fn a_hung_batch_is_killed_and_the_others_go_on() {
    live("a_hung_batch_is_killed_and_the_others_go_on", Polling::default(), |cx, device, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let other = KvmContext::new(cx, device).unwrap();
        other.map_range(cx, memory.range(), Access::Write, None).unwrap();
        for round in 1..20 {
            let hung = context.submit_wait(cx, memory.at(0), 1).unwrap();
            let queued = submit(cx, context, &[store(&memory, 8, round)]);
            let doomed = submit(cx, &other, &[store(&memory, 16, 1), store(&memory, 20, 1)]);
            let later = submit(cx, &other, &[store(&memory, 24, round)]);
            assert!(matches!(hung.wait_interruptible(cx, Some(SOON)), Err(WaitError::TimedOut(SOON))));
            assert!(!queued.is_signaled());
            doomed.kill(cx, "not wanted");
            assert!(matches!(doomed.wait_interruptible(cx, Some(SOON)), Err(WaitError::TimedOut(_))));
            hung.kill(cx, "hung");
            assert!(matches!(hung.wait(cx), Err(FenceError::Killed { why }) if why == "hung"));
            queued.wait(cx).unwrap();
            assert!(matches!(doomed.wait(cx), Err(FenceError::Killed { why }) if why == "not wanted"));
            later.kill(cx, "too late, or not");
            let _ = later.wait(cx);
            run(cx, &other, &[store(&memory, 28, round)]).unwrap();
            assert_eq!(memory.word(8), round.into());
            assert_eq!(memory.word(16), 0);
            assert_eq!(memory.word(24) >> 32, round.into());
        }
    });
}

#[test]
fn a_semaphore_that_is_signaled_lets_go() {
    live("a_semaphore_that_is_signaled_lets_go", Polling::Never, |cx, _, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let held = context.submit_wait(cx, memory.at(0), 0x0403_0201).unwrap();
        let after = submit(cx, context, &[store(&memory, 8, 1)]);
        assert!(matches!(after.wait_interruptible(cx, Some(SOON)), Err(WaitError::TimedOut(_))));
        assert_eq!(memory.word(8), 0);
        memory.write(0, &[1, 2, 3, 4]);
        held.wait(cx).unwrap();
        after.wait(cx).unwrap();
        assert_eq!(memory.word(8), 1);
    });
}

#[test]
fn closing_a_context_ends_what_hangs_in_it() {
    live("closing_a_context_ends_what_hangs_in_it", Polling::default(), |cx, device, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let other = KvmContext::new(cx, device).unwrap();
        other.map_range(cx, memory.range(), Access::Read, None).unwrap();
        let hung = other.submit_wait(cx, memory.at(0), 1).unwrap();
        let behind = submit(cx, context, &[store(&memory, 8, 1)]);
        drop(other);
        assert!(matches!(hung.wait(cx), Err(FenceError::Killed { .. })));
        behind.wait(cx).unwrap();
        // The device ends with its last user, however busy.
        let hung = context.submit_wait(cx, memory.at(0), 1).unwrap();
        hung.kill(cx, "done");
        assert!(hung.wait(cx).is_err());
    });
}

#[test]
fn a_signal_interrupts_a_wait() {
    extern "C" fn nothing(_: i32) {}
    live("a_signal_interrupts_a_wait", Polling::default(), |cx, _, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let hung = context.submit_wait(cx, memory.at(0), 1).unwrap();
        let handler: extern "C" fn(i32) = nothing;
        // SAFETY: the handler does nothing; `signal` asks for SA_RESTART, under which many waits are not interrupted.
        unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        let (waiter, done) = (signal::thread_id(), AtomicBool::new(false));
        interleave::scope(cx, |scope, cx| {
            scope.spawn("signals", |cx| {
                while !done.load(interleave::Ordering::SeqCst) {
                    interleave::time::sleep(cx, SOON);
                    // SAFETY: the thread waits for this one, so its id is its own.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), waiter, libc::SIGUSR1) };
                }
            });
            assert!(matches!(hung.wait_interruptible(cx, None), Err(WaitError::Interrupted)));
            hung.kill(cx, "enough");
            // Signals go on; this wait is not for them.
            assert!(matches!(hung.wait(cx), Err(FenceError::Killed { .. })));
            done.store(true, interleave::Ordering::SeqCst);
        });
    });
}

#[test]
fn contexts_have_address_spaces_of_their_own() {
    live("contexts_have_address_spaces_of_their_own", Polling::default(), |cx, device, one| {
        let two = KvmContext::new(cx, device).unwrap();
        let (first, second, result) = (Memory::new(1), Memory::new(1), Memory::new(1));
        let at = DeviceAddr(0x7000_0000);
        one.map_range(cx, first.range(), Access::Write, Some(at)).unwrap();
        two.map_range(cx, second.range(), Access::Write, Some(at)).unwrap();
        for context in [one, &two] {
            context.map_range(cx, result.range(), Access::Write, None).unwrap();
        }
        for round in 0..200_u64 {
            first.write(0, &(2 * round).to_le_bytes());
            second.write(0, &(2 * round + 1).to_le_bytes());
            let load = [Command::Copy { dst: result.at(0), src: at, len: 8 }];
            run(cx, one, &load).unwrap();
            assert_eq!(result.word(0), 2 * round);
            run(cx, &two, &load).unwrap();
            assert_eq!(result.word(0), 2 * round + 1);
        }
        drop(two);
        run(cx, one, &[Command::Copy { dst: result.at(0), src: at, len: 8 }]).unwrap();
        assert_eq!(result.word(0), first.word(0));
    });
}

#[test]
fn what_was_unmapped_is_never_reached_again() {
    live("what_was_unmapped_is_never_reached_again", Polling::default(), |cx, device, context| {
        let result = Memory::new(1);
        context.map_range(cx, result.range(), Access::Write, None).unwrap();
        // Large pages in the middle, small ones at both ends, and all of them small.
        let pages = 3 * 512 + 100;
        let (one, two) = (Memory::new(pages), Memory::new(pages));
        one.write(1000 * PAGE, &1_u64.to_le_bytes());
        two.write(1000 * PAGE, &2_u64.to_le_bytes());
        let other = KvmContext::new(cx, device).unwrap();
        for round in 0..60_u64 {
            let like = |memory: &Memory| memory.at(0).0 % (2 << 20);
            let (memory, value) = if round % 2 == 0 { (&one, 1) } else { (&two, 2) };
            let skew = if round % 3 == 0 { 4096 } else { 0 };
            let at = DeviceAddr((1 << 40) + like(memory) + skew);
            let mapping = context.map_range(cx, memory.range(), Access::Read, Some(at)).unwrap();
            let load =
                [Command::Copy { dst: result.at(0), src: DeviceAddr(at.0 + (1000 * PAGE) as u64), len: 8 }];
            run(cx, context, &load).unwrap();
            assert_eq!(result.word(0), value, "round {round}");
            if round % 5 == 0 {
                run(cx, &other, &[]).unwrap();
            }
            context.unmap_range(cx, mapping);
            match run(cx, context, &load) {
                Err(FenceError::Fault(fault)) => assert_eq!(fault.access, Access::Read),
                other => panic!("round {round}: {other:?}"),
            }
        }
    });
}

#[test]
fn a_batch_may_be_longer_than_the_ring() {
    live("a_batch_may_be_longer_than_the_ring", Polling::default(), |cx, _, context| {
        const COMMANDS: usize = 20_000;
        let memory = Memory::new(COMMANDS * 4 / PAGE + 1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let mut batch: Vec<Command> = (0..COMMANDS).map(|n| store(&memory, n * 4, n as u32 + 1)).collect();
        run(cx, context, &batch).unwrap();
        let stored =
            |memory: &Memory, n: usize| u32::from_le_bytes(memory.read(n * 4, 4).try_into().unwrap());
        assert!((0..COMMANDS).all(|n| stored(&memory, n) == n as u32 + 1));
        batch.iter_mut().enumerate().for_each(|(n, command)| *command = store(&memory, n * 4, 0));
        for bad in [0, 1023, 1024, 5000, COMMANDS - 1] {
            let mut batch = batch.clone();
            batch[bad] = Command::StoreDword { dst: DeviceAddr(0x5000), value: 0 };
            match run(cx, context, &batch) {
                Err(FenceError::Fault(fault)) => assert_eq!(fault.command, bad),
                other => panic!("{other:?}"),
            }
            assert!((0..bad).all(|n| stored(&memory, n) == 0));
            assert!(bad + 1 == COMMANDS || stored(&memory, bad + 1) != 0);
        }
    });
}

#[test]
fn threads_share_the_device() {
    live("threads_share_the_device", Polling::default(), |cx, device, _| {
        interleave::scope(cx, |scope, _| {
            for _ in 0..4 {
                scope.spawn("submitter", |cx| {
                    let context = KvmContext::new(cx, device).unwrap();
                    let memory = Memory::new(2);
                    let mapping = context.map_range(cx, memory.range(), Access::Write, None).unwrap();
                    for round in 0..300_u32 {
                        let batch = [
                            store(&memory, 0, round),
                            Command::Copy { dst: memory.at(PAGE), src: memory.at(0), len: 8 },
                        ];
                        run(cx, &context, &batch).unwrap();
                        assert_eq!(memory.word(PAGE), round.into());
                    }
                    context.unmap_range(cx, mapping);
                });
            }
        });
    });
}

#[test]
fn mappings_have_their_own_addresses_or_none_of_anothers() {
    live("mappings_have_their_own_addresses_or_none_of_anothers", Polling::default(), |cx, _, context| {
        let memory = Memory::new(4);
        let own = context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        assert_eq!(own.address(), memory.at(0));
        let again = context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        assert_ne!(again.address(), memory.at(0));
        run(cx, context, &[Command::StoreDword { dst: again.address(), value: 5 }]).unwrap();
        assert_eq!(memory.word(0), 5);
        let refused = |cx: &mut MaySleep<'_>, at: u64| {
            let at = Some(DeviceAddr(at));
            let got = context.map_range(cx, memory.range(), Access::Write, at);
            assert!(matches!(got, Err(crate::device::DeviceError::Address { .. })), "{at:?}: {got:?}");
        };
        for at in [memory.at(PAGE).0, 4097, SYSTEM, SYSTEM - 4096, 1 << 47, (1 << 47) - 4096, u64::MAX - 4095]
        {
            refused(cx, at);
        }
        context.unmap_range(cx, again);
        context.unmap_range(cx, own);
        let own = context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        assert_eq!(own.address(), memory.at(0));
    });
}

#[test]
fn a_forked_child_is_refused() {
    live("a_forked_child_is_refused", Polling::default(), |cx, device, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        // SAFETY: the child only asks and leaves.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: nothing is written, since it is refused.
            let submit = unsafe { context.submit(cx, &[store(&memory, 0, 1)]) };
            let refused = matches!(submit, Err(crate::device::SubmitError::Forked))
                && matches!(KvmContext::new(cx, device), Err(KvmError::Forked));
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!refused)) };
        }
        let mut status = 0;
        // SAFETY: our child.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
        run(cx, context, &[store(&memory, 0, 1)]).unwrap();
        assert_eq!(memory.word(0), 1);
    });
}

/// Puts a poison marker at a page, as a hardware error would: whoever touches it gets SIGBUS. `false`: this kernel has
/// no such thing.
fn poison(memory: &Memory, page: usize) -> bool {
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
    const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
    const UFFDIO_POISON: libc::Ioctl = 0xc020_aa08_u32 as libc::Ioctl;
    const FEATURE_POISON: u64 = 1 << 14;
    let at = memory.at(page * PAGE).0;
    // SAFETY: each request gets the structure that it is about; the descriptor is left open for the process's life.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
        let ioctl = |request, words: &mut [u64]| libc::ioctl(fd, request, words.as_mut_ptr()) == 0;
        fd >= 0
            && ioctl(UFFDIO_API, &mut [0xaa, FEATURE_POISON, 0])
            && ioctl(UFFDIO_REGISTER, &mut [at, PAGE as u64, 1, 0])
            && ioctl(UFFDIO_POISON, &mut [at, PAGE as u64, 0, 0])
    }
}

#[test]
fn a_page_that_the_hardware_lost_faults() {
    live("a_page_that_the_hardware_lost_faults", Polling::default(), |cx, _, context| {
        let memory = Memory::new(4);
        memory.write(0, &[1]);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        if !poison(&memory, 2) {
            testing::skip(Capability::Userfaultfd, "no UFFDIO_POISON");
            return;
        }
        let copy = Command::Copy { dst: memory.at(0), src: memory.at(2 * PAGE - 100), len: 1000 };
        match run(cx, context, &[copy]) {
            Err(FenceError::Fault(fault)) => {
                assert_eq!(fault, Fault { command: 0, addr: memory.at(2 * PAGE), access: Access::Read });
            }
            other => panic!("{other:?}"),
        }
        match run(cx, context, &[store(&memory, 2 * PAGE + 8, 1)]) {
            Err(FenceError::Fault(fault)) => {
                assert_eq!(fault, Fault { command: 0, addr: memory.at(2 * PAGE + 8), access: Access::Write });
            }
            other => panic!("{other:?}"),
        }
        run(cx, context, &[store(&memory, 8, 1)]).unwrap();
    });
}

#[test]
fn a_borrowed_batch_keeps_to_its_bytes() {
    live("a_borrowed_batch_keeps_to_its_bytes", Polling::default(), |_, _, context| {
        let mut all = vec![7_u8; 3 * PAGE];
        let (before, rest) = all.split_at_mut(100);
        let (target, after) = rest.split_at_mut(5000);
        let from = pattern(5000, 9);
        let mut batch = context.batch();
        let (src, dst) = (batch.source(&from).unwrap(), batch.target(target).unwrap());
        for bad in [
            Command::Fill { dst, len: 5001, byte: 0 },
            Command::Fill { dst: DeviceAddr(dst.0 - 1), len: 2, byte: 0 },
            Command::Fill { dst: src, len: 1, byte: 0 },
            Command::Copy { dst, src: DeviceAddr(src.0 + 1), len: 5000 },
            Command::Checksum { src, len: 5000, result: DeviceAddr(dst.0 + 4993) },
        ] {
            assert!(matches!(batch.push(bad), Err(BatchError::NotBorrowed { .. })), "{bad:?}");
        }
        batch.push(Command::Copy { dst, src, len: 5000 }).unwrap();
        batch.run().unwrap();
        assert_eq!(target, from);
        assert!(before.iter().chain(after.iter()).all(|byte| *byte == 7));
        // The addresses are free again, and two buffers may share a page.
        let (left, right) = target.split_at_mut(50);
        let mut batch = context.batch();
        assert_eq!(batch.target(left).unwrap(), dst);
        let dst = batch.target(right).unwrap();
        batch.push(Command::Fill { dst, len: 10, byte: 1 }).unwrap();
        batch.run().unwrap();
        assert_eq!(
            (left.to_vec(), &right[..11]),
            (from[..50].to_vec(), &[[1; 10].as_slice(), &[from[60]]].concat()[..])
        );
        let mut batch = context.batch();
        assert!(matches!(batch.source(&[]), Err(BatchError::Range(_))));
        batch.run().unwrap();
    });
}

#[test]
fn polling_can_be_ended_and_begun() {
    live("polling_can_be_ended_and_begun", Polling::Always, |cx, device, context| {
        let queue = &device.inner.shared.queue;
        for polling in [Polling::Never, Polling::For(SOON), Polling::Never] {
            device.set_polling(Polling::Always);
            run(cx, context, &[]).unwrap();
            assert!(!queue.is_idle());
            device.set_polling(polling);
            while !queue.is_idle() {
                interleave::time::sleep(cx, Duration::from_millis(1));
            }
            run(cx, context, &[]).unwrap();
        }
    });
}

#[test]
fn killing_a_context_leaves_the_updates_of_others() {
    live("killing_a_context_leaves_the_updates_of_others", Polling::default(), |cx, device, context| {
        let memory = Memory::new(2);
        let other = KvmContext::new(cx, device).unwrap();
        other.map_range(cx, memory.range(), Access::Read, None).unwrap();
        let hung = other.submit_wait(cx, memory.at(0), 1).unwrap();
        let range = memory.range();
        interleave::scope(cx, |scope, cx| {
            // The update waits behind it, in whichever address space is loaded: the other's.
            let mapper = scope.spawn("mapper", |cx| {
                context.map_range(cx, range, Access::Write, None).unwrap();
            });
            while device.inner.shared.queue.lock(cx).jobs.len() < 2 {
                interleave::time::sleep(cx, Duration::from_millis(1));
            }
            other.kill(cx, "it hangs");
            mapper.join(cx).unwrap();
        });
        assert!(matches!(hung.wait(cx), Err(FenceError::Killed { .. })));
        run(cx, context, &[store(&memory, PAGE, 7)]).unwrap();
        assert_eq!(memory.word(PAGE), 7);
    });
}

#[test]
fn tables_are_found_again_or_missed_in_words() {
    live("tables_are_found_again_or_missed_in_words", Polling::default(), |cx, device, context| {
        let memory = Memory::new(1);
        memory.write(0, &42_u64.to_le_bytes());
        let result = Memory::new(1);
        context.map_range(cx, result.range(), Access::Write, None).unwrap();
        // Three levels below the top for the first of these, one more table for each of the others.
        device.inner.pool.lock(cx).shrink(2 + 8);
        let at = |n: u64| DeviceAddr((1 << 40) + n * (2 << 20));
        let map =
            |cx: &mut MaySleep<'_>, n: u64| context.map_range(cx, memory.range(), Access::Read, Some(at(n)));
        for n in 0..100 {
            let mapping = map(cx, n).unwrap();
            run(cx, context, &[Command::Copy { dst: result.at(0), src: at(n), len: 8 }]).unwrap();
            assert_eq!(result.word(0), 42);
            result.write(0, &[0; 8]);
            context.unmap_range(cx, mapping);
            assert!(run(cx, context, &[Command::Copy { dst: result.at(0), src: at(n), len: 8 }]).is_err());
        }
        let mut mappings: Vec<KvmMapping> = (0..8).map(|n| map(cx, n).unwrap()).collect();
        assert!(matches!(map(cx, 8), Err(crate::device::DeviceError::Full { .. })));
        context.unmap_range(cx, mappings.swap_remove(3));
        let mapping = map(cx, 8).unwrap();
        run(cx, context, &[Command::Copy { dst: result.at(0), src: at(8), len: 8 }]).unwrap();
        assert_eq!(result.word(0), 42);
        context.unmap_range(cx, mapping);
    });
}

#[test]
fn memory_may_lie_anywhere() {
    live("memory_may_lie_anywhere", Polling::default(), |cx, _, context| {
        let result = Memory::new(1);
        context.map_range(cx, result.range(), Access::Write, None).unwrap();
        let mut look = |range: Range, offset: u64| {
            let mapping = context.map_range(cx, range, Access::Read, None).unwrap();
            let src = DeviceAddr(mapping.address().0 + offset);
            run(cx, context, &[Command::Copy { dst: result.at(0), src, len: 8 }]).unwrap();
            context.unmap_range(cx, mapping);
            result.word(0)
        };
        // Across a window's end.
        let reserved = Memory::new((2 << 30) / PAGE);
        let end = (reserved.at(0).0 | ((1 << 30) - 1)) + 1;
        let across = (end - reserved.at(0).0) as usize;
        reserved.write(across - 4, &0x1122_3344_5566_7788_u64.to_le_bytes());
        let range = Range::new(end - PAGE as u64, 2 * PAGE as u64).unwrap();
        assert_eq!(look(range, PAGE as u64 - 4), 0x1122_3344_5566_7788);
        // What the kernel put there: the main thread's stack, in the last window, code, and the vdso.
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let of = |name: &str| {
            let line = maps.lines().find(|line| line.ends_with(name)).unwrap();
            let (start, rest) = line.split_once('-').unwrap();
            let end = rest.split_once(' ').unwrap().0;
            let hex = |text| u64::from_str_radix(text, 16).unwrap();
            Range::new(hex(start), hex(end) - hex(start)).unwrap()
        };
        let program = std::env::current_exe().unwrap();
        for name in ["[stack]", "[vdso]", program.to_str().unwrap()] {
            let range = of(name);
            // SAFETY: mapped and readable; the first page of a program or vdso is never written, nor is the far end of
            // a stack that is not in use.
            let cpu = unsafe { (range.start() as *const u64).read_volatile() };
            assert_eq!(look(range, 0), cpu, "{name}");
        }
    });
}
