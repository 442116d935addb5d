// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `syscall` instruction, so that nothing which patches or replaces libc functions can see the call.

use core::arch::asm;
use std::io;

/// System call `nr` with up to six arguments (x86-64 calling convention, as `syscall(2)` gives it).
///
/// # Safety
/// What the system call itself does to memory must be allowed.
pub(super) unsafe fn syscall(nr: i64, args: [u64; 6]) -> io::Result<u64> {
    let ret: i64;
    // SAFETY: the kernel clobbers rax, rcx and r11 and keeps the rest; what the call does is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr => ret,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    // -4095..-1 are errors: no valid address or count lies there.
    if (-4095..0).contains(&ret) { Err(io::Error::from_raw_os_error(-ret as i32)) } else { Ok(ret as u64) }
}
