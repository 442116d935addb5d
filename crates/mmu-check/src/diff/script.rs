// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is done on both sides: a list of operations, by hand or at random.
//!
//! Pages are numbered from the arena's first one. An operation of a child that is not there is skipped, so every part
//! of a script is a script: that is what makes shrinking simple.

use hostmm::lab::{Backing, Rights};
use std::fmt;

/// Pages of the arena. In its middle lies a boundary of 1 GiB, so that two page tables of the last three levels map it.
pub const PAGES: u64 = 32;
/// Pages of the file at the start of a script.
pub const FILE_PAGES: u64 = 24;
/// The file grows to at most so many.
const FILE_MAX: u64 = 40;

/// Pages `first..first + pages` of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub first: u64,
    /// How many; not 0.
    pub pages: u64,
}

/// Who does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The process that is listened to.
    Parent,
    /// Its child, whose mm nobody listens to.
    Child,
}

/// One operation. Those on files are in pages of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Op {
    /// mmap with MAP_FIXED.
    Map(Who, Span, Rights, Backing),
    /// munmap.
    Unmap(Who, Span),
    /// mprotect.
    Protect(Who, Span, Rights),
    /// madvise(MADV_DONTNEED).
    DontNeed(Who, Span),
    /// Load the first word of a page.
    Load(Who, u64),
    /// Store it.
    Store(Who, u64, u64),
    /// The parent forks; one child at a time.
    Fork,
    /// The child exits.
    Exit,
    /// ftruncate to so many pages.
    Truncate(u64),
    /// fallocate(FALLOC_FL_PUNCH_HOLE) of pages `.0..=.1`.
    Punch(u64, u64),
    /// pwrite the word `.1` all over page `.0`.
    WriteFile(u64, u64),
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{},{})", self.first, self.first + self.pages)
    }
}

fn rights(rights: Rights) -> &'static str {
    match rights {
        Rights::None => "PROT_NONE",
        Rights::Read => "PROT_READ",
        Rights::ReadWrite => "PROT_READ|PROT_WRITE",
    }
}

fn who(who: Who) -> &'static str {
    match who {
        Who::Parent => "",
        Who::Child => "child: ",
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Op::Map(by, span, prot, backing) => {
                write!(f, "{}mmap {span} {} MAP_FIXED|", who(by), rights(prot))?;
                match backing {
                    Backing::Anonymous => write!(f, "MAP_PRIVATE|MAP_ANONYMOUS"),
                    Backing::PrivateFile(at) => write!(f, "MAP_PRIVATE file@{at}"),
                    Backing::SharedFile(at) => write!(f, "MAP_SHARED file@{at}"),
                }
            }
            Op::Unmap(by, span) => write!(f, "{}munmap {span}", who(by)),
            Op::Protect(by, span, prot) => write!(f, "{}mprotect {span} {}", who(by), rights(prot)),
            Op::DontNeed(by, span) => write!(f, "{}madvise {span} MADV_DONTNEED", who(by)),
            Op::Load(by, page) => write!(f, "{}load {page}", who(by)),
            Op::Store(by, page, value) => write!(f, "{}store {page} = {value}", who(by)),
            Op::Fork => write!(f, "fork"),
            Op::Exit => write!(f, "child: exit"),
            Op::Truncate(pages) => write!(f, "ftruncate {pages} pages"),
            Op::Punch(first, last) => write!(f, "punch file [{first},{})", last + 1),
            Op::WriteFile(page, value) => write!(f, "pwrite file {page} = {value}"),
        }
    }
}

/// Numbers that a seed determines (splitmix64).
struct Rng(u64);

impl Rng {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.word() % n
    }

    fn span(&mut self) -> Span {
        // Mostly short: long ones wipe out what made the state interesting.
        let longest = if self.below(4) == 0 { PAGES } else { 6 };
        let first = self.below(PAGES);
        Span { first, pages: 1 + self.below(longest.min(PAGES - first)) }
    }

    fn rights(&mut self) -> Rights {
        match self.below(8) {
            0 => Rights::None,
            1 | 2 => Rights::Read,
            _ => Rights::ReadWrite,
        }
    }
}

/// `ops` operations at random, the same for the same `seed`. Values stored are all different.
#[must_use]
pub fn random(seed: u64, ops: usize) -> Vec<Op> {
    let mut rng = Rng(seed);
    let mut child = false;
    // Something to work on.
    let whole = Span { first: 4, pages: PAGES - 8 };
    let mut script = vec![Op::Map(Who::Parent, whole, Rights::ReadWrite, Backing::Anonymous)];
    while script.len() < ops {
        let by = if child && rng.below(3) == 0 { Who::Child } else { Who::Parent };
        let value = script.len() as u64;
        let op = match rng.below(100) {
            0..=9 => {
                let at = rng.below(FILE_PAGES);
                let backing = match rng.below(4) {
                    0 => Backing::PrivateFile(at),
                    1 => Backing::SharedFile(at),
                    _ => Backing::Anonymous,
                };
                Op::Map(by, rng.span(), rng.rights(), backing)
            }
            10..=13 => Op::Unmap(by, rng.span()),
            14..=21 => Op::Protect(by, rng.span(), rng.rights()),
            22..=27 => Op::DontNeed(by, rng.span()),
            28..=49 => Op::Load(by, rng.below(PAGES)),
            50..=79 => Op::Store(by, rng.below(PAGES), value),
            80..=87 if child => Op::Exit,
            80..=87 => Op::Fork,
            88..=90 => Op::Truncate(rng.below(FILE_MAX)),
            91..=94 => {
                let first = rng.below(FILE_MAX);
                Op::Punch(first, first + rng.below(4))
            }
            _ => Op::WriteFile(rng.below(FILE_PAGES), value),
        };
        child = matches!(op, Op::Fork) || child && !matches!(op, Op::Exit);
        script.push(op);
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_script_and_spans_stay_inside() {
        assert_eq!(random(7, 300), random(7, 300));
        assert_ne!(random(7, 300), random(8, 300));
        for op in random(3, 3000) {
            if let Op::Map(_, s, ..) | Op::Unmap(_, s) | Op::Protect(_, s, _) | Op::DontNeed(_, s) = op {
                assert!(s.pages > 0 && s.first + s.pages <= PAGES, "{op}");
            }
        }
    }
}
