// SPDX-License-Identifier: MIT OR Apache-2.0
//! The BPF program that says of each range who changes it, by which system call, and from where.
//!
//! It runs where [`super::program`] does and with the same caveats, but counts nothing: every range of every process
//! with a VM goes to the ring. Which of them are wanted is known only outside, because the tracepoint has no mm.
//!
//! The registers of the task at its entry to the kernel tell the system call (`orig_ax`; -1 where it came by a page
//! fault or an interrupt) and its third argument, which is what madvise(2) is told to do. A task that faults inside a
//! system call (a copy on write in read(2)) shows that call. A kernel thread has no such registers: what is there
//! means nothing, and its reader must know it by its empty stack.
//!
//! The stack comes twice: return addresses as far as frame pointers lead, which most libraries do not keep, and the words
//! at its top with the registers that point to it, for whoever has the unwind tables.
//!
//! Licence: bpf_get_current_task_btf, bpf_task_pt_regs (Linux 5.15), bpf_probe_read_user and bpf_get_stack are for GPL-compatible programs;
//! the program says "Dual MIT/GPL". SPDX of the program: MIT OR GPL-2.0-only.

use crate::sys::bpf::asm::{Asm, Cond, Helper, Insn, Reg};
use std::os::fd::BorrowedFd;

/// Return addresses kept of the user-space stack, the innermost first.
pub const STACK_DEPTH: usize = 12;
/// Words kept of the top of the user-space stack.
pub const TOP_WORDS: usize = 64;

/// Where in a record the stack begins, after: kind and CPU, start, end, pid_tgid, ktime, orig_ax, third argument, bytes
/// of stack.
pub(super) const STACK: usize = 8;
/// The task's command, two words.
pub(super) const COMM: usize = STACK + STACK_DEPTH;
/// Stack pointer and frame pointer.
pub(super) const POINTERS: usize = COMM + 2;
/// The top of the stack.
pub(super) const TOP: usize = POINTERS + 2;
/// Words of a record.
pub(super) const WORDS: usize = TOP + TOP_WORDS;

/// Offsets in struct pt_regs of x86-64.
const BP: i16 = 32;
const DX: i16 = 96;
const ORIG_AX: i16 = 120;
const SP: i16 = 152;
/// bpf_get_stack: of user space.
const BPF_F_USER_STACK: i32 = 1 << 8;

/// Assembles the program. `start` and `end` are the offsets in the tracepoint's record.
pub(super) fn assemble(
    start: u32,
    end: u32,
    ring: BorrowedFd<'_>,
    lost: BorrowedFd<'_>,
) -> Option<Vec<Insn>> {
    use Reg::{R0, R1, R2, R3, R4, R6, R8, R9};
    let mut asm = Asm::default();
    let (full, out) = (asm.label(), asm.label());
    asm.mov(R6, R1);
    asm.load_map(R1, ring);
    asm.mov_imm(R2, 8 * WORDS as i32);
    asm.mov_imm(R3, 0);
    asm.call(Helper::RingbufReserve);
    asm.jump_if_imm(R0, Cond::Eq, 0, full);
    asm.mov(R9, R0);
    asm.load(R1, R6, i16::try_from(start).ok()?);
    asm.store(R9, 8, R1);
    asm.load(R1, R6, i16::try_from(end).ok()?);
    asm.store(R9, 16, R1);
    asm.call(Helper::GetSmpProcessorId);
    asm.store(R9, 0, R0);
    asm.call(Helper::GetCurrentPidTgid);
    asm.store(R9, 24, R0);
    asm.call(Helper::KtimeGetNs);
    asm.store(R9, 32, R0);
    asm.call(Helper::GetCurrentTaskBtf);
    asm.mov(R1, R0);
    asm.call(Helper::TaskPtRegs);
    asm.mov(R8, R0);
    asm.load(R1, R8, ORIG_AX);
    asm.store(R9, 40, R1);
    asm.load(R1, R8, DX);
    asm.store(R9, 48, R1);
    asm.mov(R1, R6);
    asm.mov(R2, R9);
    asm.add_imm(R2, 8 * STACK as i32);
    asm.mov_imm(R3, 8 * STACK_DEPTH as i32);
    asm.mov_imm(R4, BPF_F_USER_STACK);
    asm.call(Helper::GetStack);
    asm.store(R9, 56, R0);
    asm.mov(R1, R9);
    asm.add_imm(R1, 8 * COMM as i32);
    asm.mov_imm(R2, 16);
    asm.call(Helper::GetCurrentComm);
    asm.load(R3, R8, BP);
    asm.store(R9, (8 * (POINTERS + 1)) as i16, R3);
    asm.load(R3, R8, SP);
    asm.store(R9, (8 * POINTERS) as i16, R3);
    asm.mov(R1, R9);
    asm.add_imm(R1, 8 * TOP as i32);
    asm.mov_imm(R2, 8 * TOP_WORDS as i32);
    // What cannot be read becomes zeroes.
    asm.call(Helper::ProbeReadUser);
    asm.mov(R1, R9);
    asm.mov_imm(R2, 0);
    asm.call(Helper::RingbufSubmit);
    asm.jump(out);
    asm.place(full);
    asm.load_map_value(R8, lost, 0);
    asm.mov_imm(R1, 1);
    asm.atomic_add(R8, 0, R1);
    asm.place(out);
    asm.mov_imm(R0, 1);
    asm.exit();
    asm.finish()
}
