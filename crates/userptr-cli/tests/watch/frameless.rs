// SPDX-License-Identifier: MIT OR Apache-2.0
//! A caller that only its unwind table leads to. It keeps no frame pointer, and while it calls the C library it has in
//! every register that the callee may push, above all that of the frame pointer, an address that looks like another caller.

use std::arch::global_asm;
use std::ffi::c_void;

global_asm!(
    ".type watch_frameless, @function",
    "watch_frameless:",
    ".cfi_startproc",
    "push rbx",
    ".cfi_adjust_cfa_offset 8",
    ".cfi_rel_offset rbx, 0",
    "push rbp",
    ".cfi_adjust_cfa_offset 8",
    ".cfi_rel_offset rbp, 0",
    "push r12",
    ".cfi_adjust_cfa_offset 8",
    ".cfi_rel_offset r12, 0",
    "call watch_decoy",
    "mov rbx, rax",
    "mov rbp, rax",
    "mov r12, rax",
    "call rsi",
    "pop r12",
    ".cfi_adjust_cfa_offset -8",
    ".cfi_restore r12",
    "pop rbp",
    ".cfi_adjust_cfa_offset -8",
    ".cfi_restore rbp",
    "pop rbx",
    ".cfi_adjust_cfa_offset -8",
    ".cfi_restore rbx",
    "ret",
    ".cfi_endproc",
    ".size watch_frameless, . - watch_frameless",
    // Returns an address in itself that follows a call.
    ".type watch_decoy, @function",
    "watch_decoy:",
    "call 2f",
    "2:",
    "pop rax",
    "ret",
    ".size watch_decoy, . - watch_decoy",
);

unsafe extern "C" {
    fn watch_frameless(block: *mut c_void, free: unsafe extern "C" fn(*mut c_void));
    fn malloc(len: usize) -> *mut c_void;
    fn free(block: *mut c_void);
}

/// n blocks that the allocator maps, because each is larger than the last, and unmaps when they are freed.
pub fn frees(n: usize) {
    (1..=n).for_each(|i| unsafe { watch_frameless(malloc(i << 20), free) });
}
