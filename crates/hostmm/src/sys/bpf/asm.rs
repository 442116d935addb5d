// SPDX-License-Identifier: MIT OR Apache-2.0
//! An assembler of the few BPF instructions that our programs are made of (Documentation/bpf/standardization).
//!
//! Instructions are named by what they do, in C. Jumps name a [`Label`], which is placed before or after them.

use std::os::fd::{AsRawFd, BorrowedFd};

/// One instruction, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Insn {
    pub(super) op: u8,
    /// Destination in the low half, source in the high half.
    pub(super) regs: u8,
    pub(super) off: i16,
    pub(super) imm: i32,
}

/// A register: R0 is the result, R1 to R5 are arguments and lost in a call, R6 to R9 survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
}

/// A condition of a jump, on unsigned 64-bit values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cond {
    Eq,
    Ge,
    Lt,
    Le,
}

impl Cond {
    fn bits(self) -> u8 {
        match self {
            Cond::Eq => 0x10,
            Cond::Ge => 0x30,
            Cond::Lt => 0xa0,
            Cond::Le => 0xb0,
        }
    }
}

/// A helper function of the kernel that a program may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Helper {
    /// bpf_ktime_get_ns: CLOCK_MONOTONIC (any licence since Linux 5.8).
    KtimeGetNs = 5,
    /// bpf_get_smp_processor_id.
    GetSmpProcessorId = 8,
    /// bpf_get_current_pid_tgid: of the initial pid namespace.
    GetCurrentPidTgid = 14,
    /// bpf_get_current_comm(buffer, size).
    GetCurrentComm = 16,
    /// bpf_get_stack(context, buffer, size, flags): the bytes written. GPL-compatible programs only.
    GetStack = 67,
    /// bpf_probe_read_user(buffer, size, address) (Linux 5.5). GPL-compatible programs only.
    ProbeReadUser = 112,
    /// bpf_ringbuf_reserve(map, size, flags): null when full.
    RingbufReserve = 131,
    /// bpf_ringbuf_submit(record, flags).
    RingbufSubmit = 132,
    /// bpf_get_current_task_btf (Linux 5.11). GPL-compatible programs only.
    GetCurrentTaskBtf = 158,
    /// bpf_task_pt_regs(task) (Linux 5.15). GPL-compatible programs only.
    TaskPtRegs = 175,
}

/// A place in the code that jumps can name before it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// An assembler: push instructions, place labels, then [`Asm::finish`].
#[derive(Debug, Default)]
pub(crate) struct Asm {
    code: Vec<Insn>,
    labels: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

impl Asm {
    fn push(&mut self, op: u8, dst: Reg, src: u8, off: i16, imm: i32) {
        self.code.push(Insn { op, regs: dst as u8 | (src << 4), off, imm });
    }

    /// A label that is not placed yet.
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Places `label` before the next instruction.
    pub(crate) fn place(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    /// `dst = src`
    pub(crate) fn mov(&mut self, dst: Reg, src: Reg) {
        self.push(0xbf, dst, src as u8, 0, 0);
    }

    /// `dst = imm`
    pub(crate) fn mov_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0xb7, dst, 0, 0, imm);
    }

    /// `dst = imm`, all 64 bits
    pub(crate) fn load_imm64(&mut self, dst: Reg, imm: u64) {
        self.push(0x18, dst, 0, 0, imm as u32 as i32);
        self.code.push(Insn { op: 0, regs: 0, off: 0, imm: (imm >> 32) as i32 });
    }

    /// `dst = map` (BPF_PSEUDO_MAP_FD)
    pub(crate) fn load_map(&mut self, dst: Reg, map: BorrowedFd<'_>) {
        self.push(0x18, dst, 1, 0, map.as_raw_fd());
        self.code.push(Insn { op: 0, regs: 0, off: 0, imm: 0 });
    }

    /// `dst = &map[0] + offset` (BPF_PSEUDO_MAP_VALUE)
    pub(crate) fn load_map_value(&mut self, dst: Reg, map: BorrowedFd<'_>, offset: u32) {
        self.push(0x18, dst, 2, 0, map.as_raw_fd());
        self.code.push(Insn { op: 0, regs: 0, off: 0, imm: offset as i32 });
    }

    /// `dst = *(u64 *)(src + off)`
    pub(crate) fn load(&mut self, dst: Reg, src: Reg, off: i16) {
        self.push(0x79, dst, src as u8, off, 0);
    }

    /// `*(u64 *)(dst + off) = src`
    pub(crate) fn store(&mut self, dst: Reg, off: i16, src: Reg) {
        self.push(0x7b, dst, src as u8, off, 0);
    }

    /// `*(u64 *)(dst + off) += src`, atomically. Without BPF_FETCH: `lock add` on x86, every kernel since 3.19.
    pub(crate) fn atomic_add(&mut self, dst: Reg, off: i16, src: Reg) {
        self.push(0xdb, dst, src as u8, off, 0);
    }

    /// `dst += src`
    pub(crate) fn add(&mut self, dst: Reg, src: Reg) {
        self.push(0x0f, dst, src as u8, 0, 0);
    }

    /// `dst += imm`
    pub(crate) fn add_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0x07, dst, 0, 0, imm);
    }

    /// `dst -= src`
    pub(crate) fn sub(&mut self, dst: Reg, src: Reg) {
        self.push(0x1f, dst, src as u8, 0, 0);
    }

    /// `dst &= imm`, the immediate extended with its sign
    pub(crate) fn and_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0x57, dst, 0, 0, imm);
    }

    /// `dst <<= imm`
    pub(crate) fn shl_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0x67, dst, 0, 0, imm);
    }

    /// `dst >>= imm`, unsigned
    pub(crate) fn shr_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0x77, dst, 0, 0, imm);
    }

    /// `goto label`
    pub(crate) fn jump(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(0x05, Reg::R0, 0, 0, 0);
    }

    /// `if (dst cond src) goto label`
    pub(crate) fn jump_if(&mut self, dst: Reg, cond: Cond, src: Reg, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(0x05 | 0x08 | cond.bits(), dst, src as u8, 0, 0);
    }

    /// `if (dst cond imm) goto label`, the immediate extended with its sign
    pub(crate) fn jump_if_imm(&mut self, dst: Reg, cond: Cond, imm: i32, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(0x05 | cond.bits(), dst, 0, 0, imm);
    }

    /// `R0 = helper(R1, ..., R5)`
    pub(crate) fn call(&mut self, helper: Helper) {
        self.push(0x85, Reg::R0, 0, 0, helper as i32);
    }

    /// `return R0`
    pub(crate) fn exit(&mut self) {
        self.push(0x95, Reg::R0, 0, 0, 0);
    }

    /// The code, with its jumps resolved. `None` if a label was never placed or a jump is too far.
    pub(crate) fn finish(mut self) -> Option<Vec<Insn>> {
        for (at, label) in self.jumps {
            let target = self.labels[label.0]? as i64;
            self.code[at].off = i16::try_from(target - at as i64 - 1).ok()?;
        }
        Some(self.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_count_from_the_instruction_after_them() {
        let mut asm = Asm::default();
        let (top, out) = (asm.label(), asm.label());
        asm.place(top);
        asm.mov_imm(Reg::R0, 1);
        asm.jump_if_imm(Reg::R0, Cond::Eq, 1, out);
        asm.jump(top);
        asm.place(out);
        asm.exit();
        let code = asm.finish().unwrap();
        assert_eq!(code[1].off, 1);
        assert_eq!(code[2].off, -3);
        assert_eq!(code[1].op, 0x15);
    }

    #[test]
    fn a_label_that_was_never_placed_is_refused() {
        let mut asm = Asm::default();
        let out = asm.label();
        asm.jump(out);
        assert!(asm.finish().is_none());
    }

    #[test]
    fn a_64_bit_immediate_takes_two_slots() {
        let mut asm = Asm::default();
        asm.load_imm64(Reg::R3, 0x1122_3344_5566_7788);
        let code = asm.finish().unwrap();
        assert_eq!((code[0].imm, code[1].imm), (0x5566_7788, 0x1122_3344));
        assert_eq!(size_of::<Insn>(), 8);
    }
}
