// SPDX-License-Identifier: MIT OR Apache-2.0
//! The thread that runs the guest, and what it does each time the guest comes out.
//!
//! | the guest comes out because | then |
//! |---|---|
//! | the ring is empty | sleep until the doorbell rings |
//! | somebody sleeps for a position that it passed | wake |
//! | #PF: the page tables have nothing there, or not the right | the batch fails with that address |
//! | EFAULT: the page tables have it, the program has not | the batch fails with the address, if it is still so |
//! | the page is lost to a hardware error | the batch fails with the address |
//! | a kick | kill what is to be killed; or end |
//! | anything else | the device is lost |
//!
//! A batch that fails is skipped to its end, the registers are set anew, and the next one goes on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use interleave::{AtomicBool, AtomicU32, MaySleep};
use kvm_bindings::kvm_regs;
use kvm_ioctls::{VcpuExit, VcpuFd};
use mmu_notifier::Access;

use super::blob::blob;
use super::job::{Batch, Failure};
use super::layout::{BLOB, LAST, Op, PAGE, PORT_IDLE, PORT_WAKE, STACK_TOP, SYSTEM, SYSTEM_END, slot};
use super::ppgtt;
use super::queue::Queue;
use super::signal::{self, Stopped};
use super::vm;
use super::window::Windows;
use crate::device::{DeviceAddr, Fault};

/// How often an access is tried that fails though the program could do it. Memory that comes and goes lets the guest
/// get on in between, and that starts the count anew.
const REPLAYS: u32 = 256;

/// What the thread shares with the rest of the device.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) queue: Queue,
    pub(super) windows: Windows,
    pub(super) stop: AtomicBool,
    /// The thread's id; 0 before it runs and after it has ended.
    pub(super) tid: AtomicU32,
}

impl Shared {
    /// Stops the guest, so that the thread looks at what is to be done.
    pub(super) fn kick(&self) {
        let tid = self.tid.load(interleave::Ordering::SeqCst);
        if tid != 0 {
            signal::kick(tid);
        }
        self.queue.call();
    }
}

/// Runs the guest until the device is stopped or lost.
pub(super) fn run(cx: &mut MaySleep<'_>, shared: &Shared, vcpu: VcpuFd) {
    let why = match signal::prepare(&vcpu) {
        Err(e) => format!("the thread's signals: {e}"),
        Ok(()) => {
            shared.tid.store(signal::thread_id(), interleave::Ordering::SeqCst);
            Processor { shared, vcpu, replays: (0, [0; 4]) }.run(cx)
        }
    };
    shared.tid.store(0, interleave::Ordering::SeqCst);
    let mut state = shared.queue.lock(cx);
    let position = shared.queue.position();
    for job in state.jobs.drain(..).filter(|job| job.end > position) {
        job.batch.fail(cx, Failure::Lost(why.clone()));
    }
    state.lost = Some(why);
    drop(state);
    shared.queue.wake();
}

struct Processor<'a> {
    shared: &'a Shared,
    vcpu: VcpuFd,
    /// How often the guest has been put back to an access, with these registers.
    replays: (u32, [u64; 4]),
}

/// Why the guest came out.
enum Exit {
    Idle,
    Wake,
    Halt,
    HostFault,
    Signal,
    Again,
    Lost(String),
}

impl Processor<'_> {
    /// Returns why the device is lost.
    fn run(&mut self, cx: &mut MaySleep<'_>) -> String {
        let stop = || self.shared.stop.load(interleave::Ordering::SeqCst);
        while !stop() {
            let done = match self.enter() {
                Exit::Idle => {
                    self.shared.queue.sleep_while_idle(stop);
                    Ok(())
                }
                Exit::Wake => {
                    self.shared.queue.wake();
                    Ok(())
                }
                Exit::Halt => self.guest_fault(cx),
                Exit::HostFault => self.host_fault(cx, None),
                Exit::Signal => match signal::take() {
                    Some(Stopped::Poison(addr)) => self.host_fault(cx, Some(addr)),
                    Some(Stopped::Kick) | None => self.kicked(cx),
                },
                Exit::Again => Ok(()),
                Exit::Lost(why) => Err(why),
            };
            if let Err(why) = done {
                return why;
            }
        }
        "it was closed".to_owned()
    }

    fn enter(&mut self) -> Exit {
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PORT_IDLE) => Exit::Idle,
            Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PORT_WAKE) => Exit::Wake,
            Ok(VcpuExit::Hlt) => Exit::Halt,
            Ok(VcpuExit::MemoryFault { .. }) => Exit::HostFault,
            Ok(other) => Exit::Lost(format!("the guest came out with {other:?}")),
            Err(e) => match e.errno() {
                libc::EFAULT | libc::EHWPOISON => Exit::HostFault,
                libc::EINTR => Exit::Signal,
                libc::EAGAIN => Exit::Again,
                _ => Exit::Lost(format!("KVM_RUN: {e}")),
            },
        }
    }

    fn regs(&self) -> Result<kvm_regs, String> {
        self.vcpu.get_regs().map_err(|e| format!("KVM_GET_REGS: {e}"))
    }

    /// The guest's own handler stopped: nothing is mapped there, or not for that access.
    fn guest_fault(&mut self, cx: &mut MaySleep<'_>) -> Result<(), String> {
        let regs = self.regs()?;
        let sregs = self.vcpu.get_sregs().map_err(|e| format!("KVM_GET_SREGS: {e}"))?;
        let at = regs.rip.wrapping_sub(SYSTEM + BLOB);
        let blob = blob();
        let stack = regs.rsp.wrapping_sub(SYSTEM);
        if !(blob.fault..blob.other).contains(&at) || stack >= STACK_TOP || !stack.is_multiple_of(8) {
            return Err(format!("the command processor raised an exception: {regs:x?}"));
        }
        if (SYSTEM..SYSTEM_END).contains(&sregs.cr2) {
            return Err(format!("the command processor faulted at {:#x}: {regs:x?}", sregs.cr2));
        }
        let code = self.shared.queue.memory.word(stack).load(Ordering::Relaxed);
        let access = if code & 2 != 0 { Access::Write } else { Access::Read };
        self.fault(cx, regs.r14, sregs.cr2, access)
    }

    /// The page tables have it, the program has not: which address?
    fn host_fault(&mut self, cx: &mut MaySleep<'_>, poison: Option<u64>) -> Result<(), String> {
        let regs = self.regs()?;
        let queue = &self.shared.queue;
        let word = queue.slot_word(regs.r14, slot::OP).load(Ordering::Relaxed);
        let op = Op::from_word(word).unwrap_or(Op::Nop);
        let (reads, writes) = op.accesses();
        // Compare reads at rdi too, until that is where its result goes.
        let result = queue.slot_word(regs.r14, slot::A).load(Ordering::Relaxed);
        let second = if op == Op::Compare && regs.rdi != result { Access::Read } else { Access::Write };
        let root = self.root_at(cx, regs.r14)?;
        let suspects = [(reads, regs.rsi, Access::Read), (writes, regs.rdi, second)];
        let suspects = suspects.into_iter().filter(|(is, ..)| *is).flat_map(|(_, va, access)| {
            // An access of up to eight bytes can reach into the next page.
            let next = (va | (PAGE - 1)) + 1;
            [(va, access), (next, access)]
                .into_iter()
                .take(1 + usize::from(next - va < 8 && access == Access::Write))
        });
        let suspects: Vec<(u64, Access)> = suspects.collect();
        for (va, access) in &suspects {
            let Some(host) =
                ppgtt::translate(&queue.memory, root, *va).and_then(|gpa| self.shared.windows.host(cx, gpa))
            else {
                continue;
            };
            let is_bad = match poison {
                Some(addr) => addr / PAGE == host / PAGE,
                None => !self.shared.windows.is_accessible(host, *access),
            };
            if is_bad {
                return self.fault(cx, regs.r14, *va, *access);
            }
        }
        let place = [regs.r14, regs.rip, regs.rsi, regs.rdi];
        if self.replays.1 != place {
            self.replays = (0, place);
        }
        self.replays.0 += 1;
        match suspects.first() {
            Some((va, access)) if self.replays.0 > REPLAYS => self.fault(cx, regs.r14, *va, *access),
            Some(_) => Ok(()),
            None => Err(format!("the command processor cannot reach its own memory: {regs:x?}")),
        }
    }

    fn root_at(&self, cx: &mut MaySleep<'_>, position: u64) -> Result<u64, String> {
        let state = self.shared.queue.lock(cx);
        let job = state.jobs.iter().find(|job| (job.start..job.end).contains(&position));
        job.map(|job| job.root).ok_or_else(|| format!("nothing was submitted at position {position}"))
    }

    /// The batch at `position` fails.
    fn fault(&mut self, cx: &mut MaySleep<'_>, position: u64, va: u64, access: Access) -> Result<(), String> {
        let failure = {
            let state = self.shared.queue.lock(cx);
            let job = state.jobs.iter().find(|job| (job.first..job.end).contains(&position));
            let job = job.ok_or_else(|| format!("a fault at {va:#x}, in no command"))?;
            let command = job.index + (position - job.first) as usize;
            (Arc::clone(&job.batch), Failure::Fault(Fault { command, addr: DeviceAddr(va), access }))
        };
        self.give_up(cx, position, &[failure])
    }

    fn kicked(&mut self, cx: &mut MaySleep<'_>) -> Result<(), String> {
        let kills = std::mem::take(&mut self.shared.queue.lock(cx).kills);
        if kills.is_empty() {
            return Ok(());
        }
        let kills: Vec<(Arc<Batch>, Failure)> =
            kills.into_iter().map(|(batch, why)| (batch, Failure::Killed(why))).collect();
        let regs = self.regs()?;
        self.give_up(cx, regs.r14, &kills)
    }

    /// With the guest stopped at `position`: these batches fail. The job that runs is left at its end, those that
    /// wait become empty.
    fn give_up(
        &mut self,
        cx: &mut MaySleep<'_>,
        position: u64,
        failures: &[(Arc<Batch>, Failure)],
    ) -> Result<(), String> {
        let queue = &self.shared.queue;
        let state = queue.lock(cx);
        let mut running = None;
        for job in state.jobs.iter().filter(|job| job.end > position) {
            let Some((batch, failure)) = failures.iter().find(|(batch, _)| Arc::ptr_eq(batch, &job.batch))
            else {
                continue;
            };
            batch.fail(cx, failure.clone());
            if job.start <= position {
                running = Some((job.end, job.root));
            } else {
                for position in job.first..job.end {
                    let op = queue.slot_word(position, slot::OP);
                    op.store(Op::Nop as u64 | op.load(Ordering::Relaxed) & LAST << 8, Ordering::Relaxed);
                }
            }
        }
        if let Some((end, root)) = running {
            vm::restart(&self.vcpu, end, root).map_err(|e| format!("setting the registers: {e}"))?;
            queue.set_position(end);
        }
        drop(state);
        queue.wake();
        Ok(())
    }
}
