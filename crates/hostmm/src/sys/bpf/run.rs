// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs what [`asm`](super::asm) makes, for tests: the kernel runs no tracepoint program for the asking.

use super::asm::Insn;

/// Where a program finds its context, and the one value of its map.
const CONTEXT: u64 = 1 << 32;
const MAP: u64 = 2 << 32;
/// Instructions after which a program does not end.
const PATIENCE: u32 = 1 << 20;

/// Runs `code` on `context` and on the words of the map, and returns R0.
///
/// # Panics
/// Where the verifier would have refused the program, and at a call.
pub(crate) fn run(code: &[Insn], context: &[u64], map: &mut [u64]) -> u64 {
    let mut regs = [0_u64; 10];
    regs[1] = CONTEXT;
    let mut at = 0_usize;
    for _ in 0..PATIENCE {
        let insn = code[at];
        at += 1;
        let (dst, src) = (usize::from(insn.regs & 15), usize::from(insn.regs >> 4));
        let (imm, value) = (i64::from(insn.imm) as u64, regs[src]);
        let jump = |taken: bool| if taken { at.wrapping_add_signed(insn.off.into()) } else { at };
        let place = |base: u64| base.wrapping_add_signed(insn.off.into());
        match insn.op {
            0x07 => regs[dst] = regs[dst].wrapping_add(imm),
            0x0f => regs[dst] = regs[dst].wrapping_add(value),
            0x1f => regs[dst] = regs[dst].wrapping_sub(value),
            0x57 => regs[dst] &= imm,
            0x67 => regs[dst] <<= imm,
            0x77 => regs[dst] >>= imm,
            0xb7 => regs[dst] = imm,
            0xbf => regs[dst] = value,
            0x18 => {
                let high = i64::from(code[at].imm) as u64;
                at += 1;
                regs[dst] = if src == 2 { MAP + high } else { imm & 0xffff_ffff | high << 32 };
            }
            0x79 => regs[dst] = context[word(place(value), CONTEXT)],
            0xdb => map[word(place(regs[dst]), MAP)] += value,
            0x05 => at = jump(true),
            0x15 => at = jump(regs[dst] == imm),
            0x35 => at = jump(regs[dst] >= imm),
            0x3d => at = jump(regs[dst] >= value),
            0xa5 => at = jump(regs[dst] < imm),
            0xad => at = jump(regs[dst] < value),
            0xbd => at = jump(regs[dst] <= value),
            0x95 => return regs[0],
            op => panic!("instruction {op:#x}"),
        }
    }
    panic!("the program does not end");
}

fn word(address: u64, base: u64) -> usize {
    let offset = address.checked_sub(base).expect("a pointer to what it was given");
    assert!(offset.is_multiple_of(8));
    (offset / 8) as usize
}
