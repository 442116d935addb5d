// SPDX-License-Identifier: MIT OR Apache-2.0
//! Is a word on a stack a return address? It is if the instruction before the place that it names is a call.
//!
//! Bytes that only look like one are rare, and a return address that a function left behind on its stack is still one: so
//! this finds callers, but is no proof. x86-64.

use super::elf;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The longest call: `call *disp32(base, index, 8)`.
const LONGEST: usize = 7;

/// What was looked up so far.
#[derive(Debug, Default)]
pub(super) struct Calls {
    files: HashMap<String, Option<File>>,
    known: HashMap<(String, u64), bool>,
}

impl Calls {
    /// Does a call end where byte `offset` of `file` begins?
    pub(super) fn one_ends_at(&mut self, file: &str, offset: u64) -> bool {
        let key = (file.to_owned(), offset);
        if let Some(known) = self.known.get(&key) {
            return *known;
        }
        let code = self.files.entry(file.to_owned()).or_insert_with_key(|file| elf::open(file));
        let mut before = [0; LONGEST];
        let from = offset.checked_sub(LONGEST as u64);
        let read = code.as_ref().zip(from).is_some_and(|(f, at)| f.read_exact_at(&mut before, at).is_ok());
        let is = read && ends_in_call(&before);
        self.known.insert(key, is);
        is
    }
}

/// `call rel32`, or `call` through a register or memory (opcode FF, extension 2).
fn ends_in_call(code: &[u8; LONGEST]) -> bool {
    let indirect = |len: usize| {
        let [opcode, modrm] = [code[LONGEST - len], code[LONGEST - len + 1]];
        let sib = (modrm >> 6 != 3 && modrm & 7 == 4) as usize;
        let displacement = match (modrm >> 6, modrm & 7) {
            (0, 5) | (2, _) => 4,
            (1, _) => 1,
            _ => 0,
        };
        opcode == 0xff && modrm & 0x38 == 0x10 && len == 2 + sib + displacement
    };
    code[LONGEST - 5] == 0xe8 || [2, 3, 4, 6, 7].into_iter().any(indirect)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_from_other_instructions() {
        let ends = |code: &[u8]| {
            let mut padded = [0x90; LONGEST];
            padded[LONGEST - code.len()..].copy_from_slice(code);
            ends_in_call(&padded)
        };
        assert!(ends(&[0xe8, 1, 2, 3, 4]));
        assert!(ends(&[0xff, 0xd0]) && ends(&[0x41, 0xff, 0xd4]) && ends(&[0xff, 0x50, 8]));
        assert!(ends(&[0xff, 0x15, 1, 2, 3, 4]) && ends(&[0xff, 0x94, 0xd8, 1, 2, 3, 4]));
        // jmp *%rax, jmp *0(%rip), nop, add.
        assert!(!ends(&[0xff, 0xe0]) && !ends(&[0xff, 0x25, 1, 2, 3, 4]));
        assert!(!ends(&[0x90]) && !ends(&[0x48, 0x83, 0xc0, 1]));
    }

    #[test]
    fn what_cannot_be_read_is_no_call() {
        let mut calls = Calls::default();
        assert!(!calls.one_ends_at("/nonexistent", 100) && !calls.one_ends_at("/dev/zero", 100));
        assert!(!calls.one_ends_at("/bin/sh", 3));
    }
}
