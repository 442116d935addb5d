// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is done on both sides: a list of operations, by hand or at random.
//!
//! Pages are numbered from the arena's first one. An operation of a child that is not there is skipped, so every part
//! of a script is a script: that is what makes shrinking simple.

use hostmm::capability::Capability;
use hostmm::lab::{Backing, Rights};

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
    /// madvise(MADV_FREE).
    Free(Who, Span),
    /// mremap of page `.1` to page `.2` (MREMAP_FIXED).
    Move(Who, u64, u64),
    /// Load the first word of a page.
    Load(Who, u64),
    /// Store it.
    Store(Who, u64, u64),
    /// The parent forks; one child at a time, and not while there is a probe, whose descriptor it would hold.
    Fork,
    /// The child exits.
    Exit,
    /// ftruncate to so many pages.
    Truncate(u64),
    /// fallocate(FALLOC_FL_PUNCH_HOLE) of pages `.0..=.1`.
    Punch(u64, u64),
    /// pwrite the word `.1` all over page `.0`.
    WriteFile(u64, u64),
    /// fsync.
    Sync,
    /// The file is one on a disk, all of it in the page cache; skipped anywhere but at the beginning.
    Disk,
    /// madvise(MADV_PAGEOUT) of a page that is mapped nowhere else, until it is gone; else skipped.
    PageOut(Who, u64),
    /// Load the first word of a page through a pin for reading (process_vm_readv).
    ReadPinned(Who, u64),
    /// Store it through a pin for writing (process_vm_writev).
    WritePinned(Who, u64, u64),
    /// The parent pins for writing and for long, as an io_uring fixed buffer; one pin at a time.
    Pin(Span),
    /// It lets go.
    Unpin,
    /// MADV_MERGEABLE of two anonymous pages of the parent, the first one below the other, and ksmd runs; skipped while
    /// there is a child or a pin. A script has at most one, lest ksmd find pairs of its own choice.
    Merge(u64, u64),
    /// madvise(MADV_UNMERGEABLE) by the parent.
    Unmerge(Span),
    /// pwrite instructions to page `.0` of the file and set a uprobe on the first; one at a time. Until it is removed, what
    /// would change the page in the file is skipped.
    Probe(u64),
    /// Take it out.
    Unprobe,
}

impl Op {
    /// What the kernel must have for it, beyond a notifier source and page frame numbers.
    #[must_use]
    pub fn needs(&self) -> Option<Capability> {
        match self {
            Op::Disk => Some(Capability::DiskFile),
            Op::PageOut(..) => Some(Capability::Zram),
            Op::Pin(_) => Some(Capability::IoUring),
            Op::Merge(..) => Some(Capability::Ksm),
            Op::Probe(_) => Some(Capability::Uprobes),
            _ => None,
        }
    }

    /// Would it change page `index` of the file? A probe of softmm's is a word long, the kernel's a byte.
    pub(super) fn changes_file(&self, index: u64) -> bool {
        match *self {
            Op::Truncate(pages) => pages <= index,
            Op::Punch(first, last) => (first..=last).contains(&index),
            Op::WriteFile(at, _) => at == index,
            _ => false,
        }
    }
}

/// What a probed page of a file begins with: instructions, of which any may be probed.
pub(super) const NOPS: u64 = 0x9090_9090_9090_9090;

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

/// `ops` operations at random, the same for the same `seed` and the same `may`: what needs a capability is done where `may`
/// says that it is there. Values stored are all different, but for two pages that KSM shall merge.
#[must_use]
pub fn random(seed: u64, ops: usize, may: impl Fn(Capability) -> bool) -> Vec<Op> {
    let mut rng = Rng(seed);
    let mut merges = 1;
    let disk = rng.below(4) == 0 && may(Capability::DiskFile);
    // Something to work on.
    let whole = Span { first: 4, pages: PAGES - 8 };
    let mut script = if disk { vec![Op::Disk] } else { Vec::new() };
    script.push(Op::Map(Who::Parent, whole, Rights::ReadWrite, Backing::Anonymous));
    let (mut child, mut pinned) = (false, false);
    while script.len() < ops {
        let by = if child && rng.below(3) == 0 { Who::Child } else { Who::Parent };
        // Odd, unlike a breakpoint and what it replaces.
        let value = 2 * script.len() as u64 + 1;
        let op = match rng.below(128) {
            // What readahead brings in is no business of a path's, so nothing on a disk leaves the page cache.
            88..=94 if disk => Op::Sync,
            0..=9 => {
                let (at, span) = (rng.below(FILE_PAGES), rng.span());
                // Around the end of a file on a disk fault-around goes by what the page tables look like.
                let past_end = disk && at + span.pages > FILE_PAGES;
                let backing = match rng.below(4) {
                    0 | 1 if past_end => Backing::Anonymous,
                    0 => Backing::PrivateFile(at),
                    1 => Backing::SharedFile(at),
                    _ => Backing::Anonymous,
                };
                Op::Map(by, span, rng.rights(), backing)
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
            95..=99 => Op::WriteFile(rng.below(FILE_PAGES), value),
            100..=103 => Op::ReadPinned(by, rng.below(PAGES)),
            104..=107 => Op::WritePinned(by, rng.below(PAGES), value),
            108..=110 => Op::PageOut(by, rng.below(PAGES)),
            111..=114 if pinned => Op::Unpin,
            111..=114 => Op::Pin(rng.span()),
            115..=116 if !child && !pinned && merges > 0 && may(Capability::Ksm) => {
                merges -= 1;
                let first = rng.below(PAGES - 1);
                let second = first + 1 + rng.below(PAGES - 1 - first);
                script.extend([first, second].map(|page| Op::Store(Who::Parent, page, value)));
                Op::Merge(first, second)
            }
            115..=116 => Op::Unmerge(rng.span()),
            117..=120 => Op::Move(by, rng.below(PAGES), rng.below(PAGES)),
            121..=124 => Op::Free(by, rng.span()),
            _ if may(Capability::Uprobes) => {
                script.push(Op::Probe(rng.below(FILE_PAGES)));
                script.extend((0..rng.below(8)).map(|n| under_probe(&mut rng, by, n)));
                Op::Unprobe
            }
            _ => continue,
        };
        if !op.needs().is_none_or(&may) {
            continue;
        }
        match op {
            Op::Fork | Op::Exit => child = !child,
            Op::Pin(_) | Op::Unpin => pinned = !pinned,
            _ => {}
        }
        script.push(op);
    }
    script
}

/// What is done while there is a probe: nothing that takes a breakpoint away from a mapping that should have one, since the
/// kernel sets it again when it next splits or merges the vma.
fn under_probe(rng: &mut Rng, by: Who, value: u64) -> Op {
    match rng.below(8) {
        0 | 1 => {
            // Not past the end of the file.
            let place = Span { first: rng.below(PAGES / 2), pages: 1 + rng.below(FILE_PAGES / 2) };
            Op::Map(by, place, rng.rights(), Backing::PrivateFile(rng.below(FILE_PAGES / 2)))
        }
        2 => Op::Unmap(by, rng.span()),
        3 => Op::Protect(by, rng.span(), Rights::ReadWrite),
        4 => Op::Load(by, rng.below(PAGES)),
        5 => Op::ReadPinned(by, rng.below(PAGES)),
        _ => Op::Store(by, rng.below(PAGES), 1001 + 2 * value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_script_and_spans_stay_inside() {
        let all = |seed, ops| random(seed, ops, |_| true);
        assert_eq!(all(7, 300), all(7, 300));
        assert_ne!(all(7, 300), all(8, 300));
        for op in all(3, 3000) {
            if let Op::Map(_, s, ..)
            | Op::Unmap(_, s)
            | Op::Protect(_, s, _)
            | Op::DontNeed(_, s)
            | Op::Free(_, s)
            | Op::Pin(s)
            | Op::Unmerge(s) = op
            {
                assert!(s.pages > 0 && s.first + s.pages <= PAGES, "{op}");
            }
        }
    }

    #[test]
    fn what_is_not_there_is_not_asked_for() {
        for seed in 0..20 {
            assert!(random(seed, 300, |_| false).iter().all(|op| op.needs().is_none()));
        }
    }
}
