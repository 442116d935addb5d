// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restartable sequences (rseq(2)): what the kernel owes a thread that is interrupted inside of one.
//!
//! The kernel sends such a thread to its abort handler on the way back to user space, if it still stands in the sequence
//! then. One that is borrowed stands elsewhere: the kernel then forgets the sequence, and the thread that is put back
//! would finish it as if nobody had been in between. So it is put back at the abort handler.

use super::ptrace::{self, Tid};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Where in struct rseq the pointer to the thread's sequence lies.
const SEQUENCE: u64 = 8;

/// Where a thread that was interrupted at `ip` has to go on: the abort handler of the sequence that it is in, or `ip`.
///
/// `ip`, too, where the kernel does not tell of sequences (before Linux 5.13), and where what the thread says of its
/// sequence cannot be read: the kernel sees that as well, and kills it.
pub(super) fn resume_at(tid: Tid, ip: u64) -> u64 {
    handler(tid, ip).unwrap_or(ip)
}

/// The abort handler of the sequence around `ip`.
fn handler(tid: Tid, ip: u64) -> Option<u64> {
    let area = ptrace::rseq_area(tid).ok()??;
    let memory = File::open(format!("/proc/{tid}/mem")).ok()?;
    let [sequence] = words(&memory, area + SEQUENCE).ok()?;
    if sequence == 0 {
        return None;
    }
    // struct rseq_cs: version and flags, start, length, abort handler.
    let [_, start, len, abort] = words(&memory, sequence).ok()?;
    (ip.wrapping_sub(start) < len).then_some(abort)
}

fn words<const N: usize>(memory: &File, at: u64) -> io::Result<[u64; N]> {
    let mut words = [0; N];
    for (i, word) in words.iter_mut().enumerate() {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, at + 8 * i as u64)?;
        *word = u64::from_ne_bytes(bytes);
    }
    Ok(words)
}
