// SPDX-License-Identifier: MIT OR Apache-2.0
//! A thread inside of a restartable sequence (rseq(2)): whoever interrupts it must send it to its abort handler.

use std::arch::asm;
use std::io::BufRead;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

const SYS_RSEQ: i64 = 334;
const SIGNATURE: u32 = 0x5305_3053;

/// struct rseq, as of Linux 4.18.
#[repr(C, align(32))]
struct Area {
    cpu: [u32; 2],
    /// The sequence that the thread is in; the kernel clears it when it finds it elsewhere.
    sequence: AtomicU64,
    rest: [u64; 2],
}

static AREA: Area = Area { cpu: [0; 2], sequence: AtomicU64::new(0), rest: [0; 2] };
static LEAVE: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
}

/// Stays in a sequence, begun again after each abort, while another thread asks for a line, calls `work` and says whether
/// the sequence is still armed. Wants GLIBC_TUNABLES=glibc.pthread.rseq=0: a thread has one area.
pub fn stay(work: impl FnOnce() + Send + 'static) {
    // Written by the kernel, so not to be in read-only memory: the atomic sees to that.
    assert_eq!(unsafe { syscall(SYS_RSEQ, &raw const AREA, size_of::<Area>(), 0, SIGNATURE) }, 0);
    let other = std::thread::spawn(move || {
        let armed = || AREA.sequence.load(Ordering::SeqCst) != 0;
        let soon = || (0..20_000).any(|_| armed() || { std::thread::sleep(Duration::from_millis(1)); false });
        assert!(soon());
        let mut line = String::new();
        println!("ready");
        std::io::stdin().lock().read_line(&mut line).unwrap();
        work();
        println!("{}", if soon() { "armed" } else { "not aborted" });
        LEAVE.store(1, Ordering::SeqCst);
        std::io::stdin().lock().read_line(&mut line).unwrap();
    });
    unsafe {
        asm!(
            "2:",
            "lea {next}, [rip + 5f]",
            "mov [{sequence}], {next}",
            "3:",
            "cmp dword ptr [{leave}], 0",
            "je 3b",
            "4:",
            "jmp 6f",
            ".long 0x53053053",
            "7:",
            "jmp 2b",
            ".pushsection .data",
            ".balign 32",
            "5:",
            ".long 0, 0",
            ".quad 3b, 4b - 3b, 7b",
            ".popsection",
            "6:",
            next = out(reg) _,
            sequence = in(reg) AREA.sequence.as_ptr(),
            leave = in(reg) LEAVE.as_ptr(),
        );
    }
    other.join().unwrap();
}
