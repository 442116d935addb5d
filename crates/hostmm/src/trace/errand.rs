// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a borrowed thread does for us, as code that runs at any address: it gets hold of /dev/kvm, makes a VM, and closes
//! all that was opened for it.
//!
//! Where something is needed of us it stops, by a SIGTRAP that it sends to itself and that its tracer takes. A stop costs
//! two switches of context, and a system call made from outside costs two stops, so all else is done in one go.
//!
//! | stop | registers | the tracer |
//! |---|---|---|
//! | [`SOCKET`] | r13: both ends of a pair of sockets | sends /dev/kvm through a copy of the lower |
//! | [`VM`] | rbp: the VM | copies it |
//! | the end | rbp: the VM or a negative errno, ebx: the [`STEPS`] that failed | puts the thread back |
//!
//! The number of the stop is in r14. There is no stop at [`SOCKET`] if the thread can open /dev/kvm itself, and none at
//! [`VM`] if there is none. A program that may not, or whose root has none or a false one, is sent it.
//!
//! Memory is a page of its own: to write to what a forked child shares with its parent would be to copy it. The page is
//! gone before there is a VM, so that the program's own stream begins empty. The stack is not touched.

use std::arch::global_asm;

pub(super) const SOCKET: u64 = 1;
pub(super) const VM: u64 = 2;
/// What it calls, by the number in ebx.
pub(super) const STEPS: [&str; 4] = ["mmap", "socketpair", "recvmsg", "KVM_CREATE_VM"];
/// What r13 and r15 are at the start: descriptors that there are none of.
pub(super) const NONE: u64 = u64::MAX;

// r12: the page (0: none yet); r15: /dev/kvm; r8: where to go on after a stop. System calls change rax, rcx and r11 alone.
// In the page: the two ends at 0, struct msghdr at 64, iovec at 192, its byte at 256, the control message at 320.
global_asm!(
    ".pushsection .rodata.userptr_errand, \"a\", @progbits",
    ".local userptr_errand_path",
    ".hidden userptr_errand, userptr_errand_stop, userptr_errand_end",
    ".globl userptr_errand, userptr_errand_stop, userptr_errand_end",
    "userptr_errand:",
    "lea rdi, [rip + userptr_errand_path]",
    "mov esi, 0x80902", // O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC
    "mov eax, 2",       // open
    "syscall",
    "movsxd r15, eax",
    "xor r12d, r12d",
    "mov ebx, 3",
    "test eax, eax",
    "jns 6f",
    "4:",
    "xor ebx, ebx",
    "xor edi, edi",
    "mov esi, 4096",
    "mov edx, 3",     // PROT_READ | PROT_WRITE
    "mov r10d, 0x22", // MAP_PRIVATE | MAP_ANONYMOUS
    "mov r8, -1",
    "xor r9d, r9d",
    "mov eax, 9", // mmap
    "syscall",
    "mov r12, rax",
    "mov rbp, rax",
    "cmp rax, -4095",
    "jae 8f",
    "inc ebx",
    "mov edi, 1",       // AF_UNIX
    "mov esi, 0x80002", // SOCK_DGRAM | SOCK_CLOEXEC
    "xor edx, edx",
    "mov r10, r12",
    "mov eax, 53", // socketpair
    "syscall",
    "test eax, eax",
    "js 5f",
    "mov r13, [r12]",
    "mov r14d, 1",
    "lea r8, [rip + 2f]",
    "jmp 9f",
    "2:",
    "inc ebx",
    "lea rax, [r12 + 192]",
    "mov [r12 + 64 + 16], rax",
    "mov qword ptr [r12 + 64 + 24], 1",
    "lea rax, [r12 + 320]",
    "mov [r12 + 64 + 32], rax",
    "mov qword ptr [r12 + 64 + 40], 24",
    "lea rax, [r12 + 256]",
    "mov [r12 + 192], rax",
    "mov qword ptr [r12 + 200], 1",
    "mov rdi, r13",
    "shr rdi, 32",
    "lea rsi, [r12 + 64]",
    "mov edx, 0x40000040", // MSG_CMSG_CLOEXEC | MSG_DONTWAIT
    "mov eax, 47",         // recvmsg
    "syscall",
    "test rax, rax",
    "js 5f",
    // A full table of descriptors leaves the control message empty.
    "mov rax, -24", // EMFILE
    "cmp qword ptr [r12 + 64 + 40], 20",
    "jb 5f",
    "mov r15d, [r12 + 320 + 16]",
    "xor eax, eax",
    "5:",
    "movsxd rbp, eax",
    "mov rdi, r12",
    "mov esi, 4096",
    "mov eax, 11", // munmap
    "syscall",
    "test rbp, rbp",
    "js 7f",
    "inc ebx",
    "6:",
    "mov edi, r15d",
    "mov esi, 0xae01", // KVM_CREATE_VM
    "xor edx, edx",
    "mov eax, 16", // ioctl
    "syscall",
    // It takes every lock of the mm, and gives up when a signal is pending: its stop has been by now.
    "cmp rax, -4", // EINTR
    "je 6b",
    "movsxd rbp, eax",
    "test eax, eax",
    "jns 2f",
    // What was opened here is no KVM; what was sent is, and refuses.
    "test r12, r12",
    "jnz 7f",
    "mov edi, r15d",
    "mov eax, 3",
    "syscall",
    "mov r15, -1",
    "jmp 4b",
    "2:",
    "mov r14d, 2",
    "lea r8, [rip + 3f]",
    "jmp 9f",
    "3:",
    "mov edi, ebp",
    "mov eax, 3", // close
    "syscall",
    "7:",
    "mov edi, r15d",
    "mov eax, 3",
    "syscall",
    "mov edi, r13d",
    "mov eax, 3",
    "syscall",
    "mov rdi, r13",
    "shr rdi, 32",
    "mov eax, 3",
    "syscall",
    "8:",
    "mov r14d, 3",
    "lea r8, [rip + 8b]",
    "9:",
    "mov eax, 39", // getpid
    "syscall",
    "mov edi, eax",
    "mov eax, 186", // gettid
    "syscall",
    "mov esi, eax",
    "mov edx, 5",   // SIGTRAP
    "mov eax, 234", // tgkill
    "syscall",
    "userptr_errand_stop:",
    "jmp r8",
    "userptr_errand_path:",
    ".asciz \"/dev/kvm\"",
    "userptr_errand_end:",
    ".popsection",
);

unsafe extern "C" {
    static userptr_errand: u8;
    static userptr_errand_stop: u8;
    static userptr_errand_end: u8;
}

/// The code, to be run from its first byte.
pub(super) fn code() -> &'static [u8] {
    let begin = &raw const userptr_errand;
    let len = (&raw const userptr_errand_end).addr() - begin.addr();
    // SAFETY: the two symbols above are the ends of one piece of read-only data, which lives as long as the program.
    unsafe { std::slice::from_raw_parts(begin, len) }
}

/// Where in it the thread stands at a stop of its own.
pub(super) fn stop_offset() -> u64 {
    ((&raw const userptr_errand_stop).addr() - (&raw const userptr_errand).addr()) as u64
}
