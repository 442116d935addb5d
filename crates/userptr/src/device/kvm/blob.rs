// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command processor: what runs in the guest.
//!
//! It runs at CPL 3, natively. CPL 0 has three handlers of a few instructions: under nested virtualisation without
//! hardware support (PVM) each of those is emulated, at most of a microsecond.
//!
//! Registers, for as long as it runs: `r15` the ring, `r14` the position, `r13` the mailbox, `r12` the slot. Commands
//! read at `rsi` and write at `rdi` (compare reads at both until it writes its result) and move them along, so
//! that they tell what a command was about to access when it is stopped. To be started anew it needs `r13` to
//! `r15` and nothing else.
//!
//! A command is over once POSITION has moved beyond it. Stores are seen in program order on x86, those of a string
//! instruction before any that follows it: whoever sees the position sees what the command wrote.
//!
//! Loads of 16 bytes stop at each page's end, of either operand. So accesses fault byte by byte, in order, and
//! a fault is at the first byte that cannot be accessed.

use std::arch::global_asm;

use super::layout::{LAST, PORT_IDLE, PORT_WAKE, RING_SLOTS, mailbox, slot};

global_asm!(
    ".pushsection .rodata.userptr_kvm_device, \"a\"",
    ".balign 64",
    "userptr_kvm_device_start:",
    // Spin on the ticket: the slot's line is the only one that a submission has to move to this core.
    ".Lukd_next:",
    "mov eax, r14d",
    "and eax, {ring_mask}",
    "shl eax, 6",
    "lea r12, [r15 + rax]",
    "lea rbx, [r14 + 1]",
    "mov r11, [r13 + {spins}]",
    ".Lukd_spin:",
    "cmp [r12 + {ticket}], rbx",
    "je .Lukd_execute",
    "sub r11, 1",
    "jc .Lukd_idle",
    "pause",
    "jmp .Lukd_spin",
    ".Lukd_idle:",
    "out {port_idle}, al",
    "jmp .Lukd_next",
    ".Lukd_execute:",
    "movzx eax, byte ptr [r12 + {op}]",
    "mov rdi, [r12 + {dst}]",
    "mov rsi, [r12 + {src}]",
    "mov rdx, [r12 + {len}]",
    "lea rcx, [rip + .Lukd_table]",
    "movsxd rax, dword ptr [rcx + rax * 4]",
    "add rax, rcx",
    "jmp rax",
    // The exchange is a barrier: the position is out before AWAITED is read. Whoever goes to sleep writes AWAITED, then
    // reads the position.
    ".Lukd_done:",
    "inc r14",
    "test byte ptr [r12 + {op} + 1], {last}",
    "jnz .Lukd_last",
    "mov [r13 + {position}], r14",
    "jmp .Lukd_next",
    ".Lukd_last:",
    "mov rax, r14",
    "xchg [r13 + {position}], rax",
    "cmp r14, [r13 + {awaited}]",
    "jb .Lukd_next",
    "out {port_wake}, al",
    "jmp .Lukd_next",
    // The handler of #UD does it, at CPL 0.
    ".Lukd_switch:",
    "mov rax, rdi",
    "ud2",
    "jmp .Lukd_done",
    ".Lukd_entries:",
    "mov rcx, [r12 + {a}]",
    ".Lukd_entry:",
    "test rdx, rdx",
    "jz .Lukd_done",
    "mov [rdi], rsi",
    "add rdi, 8",
    "add rsi, rcx",
    "dec rdx",
    "jmp .Lukd_entry",
    ".Lukd_copy:",
    "mov rcx, rdx",
    "rep movsb",
    "jmp .Lukd_done",
    ".Lukd_fill:",
    "mov rax, rsi",
    "mov rcx, rdx",
    "rep stosb",
    "jmp .Lukd_done",
    // xmm0 and xmm1 add up; what is left over is gathered byte by byte in rax.
    ".Lukd_checksum:",
    "pxor xmm0, xmm0",
    "pxor xmm1, xmm1",
    "xor r8d, r8d",
    ".Lukd_checksum_page:",
    "mov ecx, esi",
    "or ecx, -4096",
    "neg ecx",
    "cmp rcx, rdx",
    "cmova rcx, rdx",
    // Words must begin where the first one does, so a page's end that cuts one is taken byte by byte.
    "mov r9, rcx",
    "and r9, -32",
    "jz .Lukd_checksum_word",
    "sub rdx, r9",
    ".Lukd_checksum_wide:",
    "movdqu xmm2, [rsi]",
    "movdqu xmm3, [rsi + 16]",
    "paddq xmm0, xmm2",
    "paddq xmm1, xmm3",
    "add rsi, 32",
    "sub r9, 32",
    "jnz .Lukd_checksum_wide",
    "jmp .Lukd_checksum_page",
    ".Lukd_checksum_word:",
    "test rdx, rdx",
    "jz .Lukd_checksum_store",
    "xor ecx, ecx",
    ".Lukd_checksum_byte:",
    "movzx eax, byte ptr [rsi]",
    "shl rax, cl",
    "add r8, rax",
    "inc rsi",
    "dec rdx",
    "jz .Lukd_checksum_store",
    "add ecx, 8",
    "cmp ecx, 64",
    "jb .Lukd_checksum_byte",
    "jmp .Lukd_checksum_page",
    ".Lukd_checksum_store:",
    "paddq xmm0, xmm1",
    "movq rax, xmm0",
    "add r8, rax",
    "psrldq xmm0, 8",
    "movq rax, xmm0",
    "add r8, rax",
    "mov [rdi], r8",
    "jmp .Lukd_done",
    // r8 counts down to the end, rcx to the nearer page's end.
    ".Lukd_compare:",
    "mov r8, rdx",
    ".Lukd_compare_page:",
    "mov ecx, esi",
    "or ecx, -4096",
    "neg ecx",
    "mov eax, edi",
    "or eax, -4096",
    "neg eax",
    "cmp ecx, eax",
    "cmova ecx, eax",
    "cmp rcx, r8",
    "cmova rcx, r8",
    "test rcx, rcx",
    "jz .Lukd_compare_store",
    "sub r8, rcx",
    ".Lukd_compare_wide:",
    "cmp rcx, 16",
    "jb .Lukd_compare_byte",
    "movdqu xmm0, [rsi]",
    "movdqu xmm1, [rdi]",
    "pcmpeqb xmm0, xmm1",
    "pmovmskb eax, xmm0",
    "cmp eax, 0xffff",
    "jne .Lukd_compare_byte",
    "add rsi, 16",
    "add rdi, 16",
    "sub rcx, 16",
    "jnz .Lukd_compare_wide",
    "jmp .Lukd_compare_page",
    ".Lukd_compare_byte:",
    "mov al, [rsi]",
    "cmp al, [rdi]",
    "jne .Lukd_compare_differ",
    "inc rsi",
    "inc rdi",
    "dec rcx",
    "jnz .Lukd_compare_byte",
    "jmp .Lukd_compare_page",
    ".Lukd_compare_differ:",
    "add r8, rcx",
    ".Lukd_compare_store:",
    "sub rdx, r8",
    "mov rdi, [r12 + {a}]",
    "mov [rdi], rdx",
    "jmp .Lukd_done",
    ".Lukd_blit:",
    "mov r8, [r12 + {c}]",
    "mov r9, rdi",
    "mov r10, rsi",
    ".Lukd_blit_row:",
    "test r8, r8",
    "jz .Lukd_done",
    "mov rdi, r9",
    "mov rsi, r10",
    "mov rcx, rdx",
    "rep movsb",
    "add r9, [r12 + {a}]",
    "add r10, [r12 + {b}]",
    "dec r8",
    "jmp .Lukd_blit_row",
    ".Lukd_store:",
    "mov [rdi], esi",
    "jmp .Lukd_done",
    ".Lukd_wait:",
    "cmp [rsi], edx",
    "je .Lukd_done",
    "pause",
    "jmp .Lukd_wait",
    ".balign 4",
    ".Lukd_table:",
    ".long .Lukd_done - .Lukd_table",
    ".long .Lukd_switch - .Lukd_table",
    ".long .Lukd_entries - .Lukd_table",
    ".long .Lukd_copy - .Lukd_table",
    ".long .Lukd_fill - .Lukd_table",
    ".long .Lukd_checksum - .Lukd_table",
    ".long .Lukd_compare - .Lukd_table",
    ".long .Lukd_blit - .Lukd_table",
    ".long .Lukd_store - .Lukd_table",
    ".long .Lukd_wait - .Lukd_table",
    // Handlers, at CPL 0. None touches rsi or rdi.
    ".balign 16",
    "userptr_kvm_device_undefined:",
    "mov cr3, rax",
    "add qword ptr [rsp], 2",
    "iretq",
    ".balign 16",
    "userptr_kvm_device_fault:",
    "hlt",
    "jmp userptr_kvm_device_fault",
    ".balign 16",
    "userptr_kvm_device_other:",
    "hlt",
    "jmp userptr_kvm_device_other",
    "userptr_kvm_device_end:",
    ".popsection",
    ring_mask = const RING_SLOTS - 1,
    port_idle = const PORT_IDLE,
    port_wake = const PORT_WAKE,
    last = const LAST,
    position = const mailbox::POSITION,
    spins = const mailbox::SPINS,
    awaited = const mailbox::AWAITED,
    ticket = const slot::TICKET,
    op = const slot::OP,
    dst = const slot::DST,
    src = const slot::SRC,
    len = const slot::LEN,
    a = const slot::A,
    b = const slot::B,
    c = const slot::C,
);

unsafe extern "C" {
    static userptr_kvm_device_start: u8;
    static userptr_kvm_device_undefined: u8;
    static userptr_kvm_device_fault: u8;
    static userptr_kvm_device_other: u8;
    static userptr_kvm_device_end: u8;
}

/// The guest's code and its entry points, as offsets.
#[derive(Debug)]
pub(super) struct Blob {
    pub(super) code: &'static [u8],
    /// Handler of #UD: loads CR3 from `rax` and skips the instruction.
    pub(super) undefined: u64,
    /// Handler of #PF: halts.
    pub(super) fault: u64,
    /// Handler of every other exception: halts.
    pub(super) other: u64,
}

/// What the assembler made.
pub(super) fn blob() -> Blob {
    let start = &raw const userptr_kvm_device_start;
    let offset = |label: *const u8| label.addr() - start.addr();
    let len = offset(&raw const userptr_kvm_device_end);
    Blob {
        // SAFETY: the labels enclose what the assembly above puts into .rodata, which is never written.
        code: unsafe { std::slice::from_raw_parts(start, len) },
        undefined: offset(&raw const userptr_kvm_device_undefined) as u64,
        fault: offset(&raw const userptr_kvm_device_fault) as u64,
        other: offset(&raw const userptr_kvm_device_other) as u64,
    }
}
