// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where things are in the guest: what the host code and the guest's code must agree on.
//!
//! ```text
//! guest physical                         seen by the guest at
//! 0            system memory             SYSTEM, in every address space
//!   0x1000     GDT
//!   0x2000     IDT
//!   0x3000     TSS
//!   0x4000     stack of CPL 0
//!   0x8000     mailbox
//!   0x100000   the command processor
//!   0x200000   the ring
//!   0x400000   page tables
//! 4 GiB        windows of host memory    wherever an address space maps their pages
//! ```
//!
//! Device addresses are guest virtual addresses. Those in [`SYSTEM`]`..`[`SYSTEM_END`] are the system's: no command may
//! name one. It lies where Linux puts nothing unasked (programs and their heaps are at 0x55..., mappings at 0x7f..., what
//! asks for low addresses gets them below 4 GiB), so memory can nearly always be mapped at its own address.

/// A page of the host, and the smallest thing that a device page table maps.
pub(super) const PAGE: u64 = 4096;
/// What one entry of a page directory maps by itself.
pub(super) const LARGE: u64 = 2 << 20;

/// Where every address space has the system memory. One entry of the top table, which nothing else shares.
pub(super) const SYSTEM: u64 = 0x4000_0000_0000;
/// One past the last address that is the system's.
pub(super) const SYSTEM_END: u64 = SYSTEM + (1 << 39);
/// One past the highest device address: end of the lower half.
pub(super) const DEVICE_END: u64 = 1 << 47;

pub(super) const GDT: u64 = 0x1000;
pub(super) const IDT: u64 = 0x2000;
pub(super) const TSS: u64 = 0x3000;
pub(super) const STACK_TOP: u64 = 0x5000;
pub(super) const MAILBOX: u64 = 0x8000;
pub(super) const BLOB: u64 = 0x10_0000;
pub(super) const RING: u64 = 0x20_0000;
pub(super) const TABLES: u64 = 0x40_0000;
/// Length of the system memory. Nearly all of it is for page tables: enough to map 126 GiB in pages of 4 KiB. It is
/// only reserved; the host gives pages to what is used.
pub(super) const SYSTEM_LEN: u64 = 256 << 20;

/// The first two tables, which every address space shares: its entry for [`SYSTEM`] points to this one,
pub(super) const SHARED_PDPT: u64 = TABLES;
/// and that to this one, which maps the system memory.
pub(super) const SHARED_PD: u64 = TABLES + PAGE;
/// An address space without device addresses, for when nothing runs.
pub(super) const KERNEL_ROOT: u64 = TABLES + 2 * PAGE;
/// First table of the pool.
pub(super) const POOL: u64 = TABLES + 3 * PAGE;

/// Selectors, in the order that Linux has them: PVM wants CPL 3 code to run with these.
pub(super) const KERNEL_CS: u16 = 0x10;
pub(super) const KERNEL_SS: u16 = 0x18;
pub(super) const USER_SS: u16 = 0x2b;
pub(super) const USER_CS: u16 = 0x33;
pub(super) const TSS_SELECTOR: u16 = 0x40;

/// Slots of the ring. A power of two.
pub(super) const RING_SLOTS: u64 = 4096;
/// A slot: eight words of eight bytes, one cache line.
pub(super) const SLOT_LEN: u64 = 64;

/// Byte offsets in a slot.
pub(super) mod slot {
    /// Position plus one, once the slot may be executed. Written last.
    pub(in super::super) const TICKET: u64 = 0;
    /// Bits 0-7 the operation, bits 8-15 flags.
    pub(in super::super) const OP: u64 = 8;
    pub(in super::super) const DST: u64 = 16;
    pub(in super::super) const SRC: u64 = 24;
    pub(in super::super) const LEN: u64 = 32;
    pub(in super::super) const A: u64 = 40;
    pub(in super::super) const B: u64 = 48;
    pub(in super::super) const C: u64 = 56;
}

/// Flag of a slot: the last of its batch, after which whoever sleeps is woken.
pub(super) const LAST: u64 = 1;

/// Byte offsets in the mailbox. What the guest writes and what the host writes are in different cache lines.
pub(super) mod mailbox {
    /// Slots executed so far. Written by the guest, and by the host while the guest is stopped.
    pub(in super::super) const POSITION: u64 = 0;
    /// How often to look for the next slot before giving the core back: at most SPINS_MAX, or all ones for ever.
    pub(in super::super) const SPINS: u64 = 128;
    /// The lowest position that somebody sleeps for, or all ones.
    pub(in super::super) const AWAITED: u64 = 136;
    /// Says that this is the process that made the device: a forked child finds zeroes.
    pub(in super::super) const OWNED: u64 = 256;
}

/// So many looks for the next slot, some tens of milliseconds, and SPINS is read again. A mask.
pub(super) const SPINS_MAX: u64 = (1 << 20) - 1;

/// Ports through which the command processor leaves the guest.
pub(super) const PORT_IDLE: u8 = 0x10;
pub(super) const PORT_WAKE: u8 = 0x11;

/// Operations of the command processor. The numbers are indices of its jump table.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Nothing.
    Nop = 0,
    /// Load CR3 from DST, which also flushes the TLB.
    Switch,
    /// At DST, write LEN page table entries: SRC, SRC + A, SRC + 2 A, ...
    Entries,
    /// Copy LEN bytes from SRC to DST, upwards.
    Copy,
    /// Fill LEN bytes at DST with the byte in SRC.
    Fill,
    /// At DST, store the sum of LEN bytes at SRC.
    Checksum,
    /// At A, store the offset of the first of LEN bytes that differ between SRC and DST.
    Compare,
    /// Copy C rows of LEN bytes from SRC to DST, A bytes apart there and B bytes here.
    Blit,
    /// Store the 32 bits in SRC at DST.
    StoreDword,
    /// Wait until the 32 bits at SRC are those in LEN.
    WaitDword,
}

impl Op {
    /// Does it read at `rsi`, does it write at `rdi`?
    pub(super) fn accesses(self) -> (bool, bool) {
        match self {
            Op::Nop | Op::Switch | Op::Entries => (false, false),
            Op::Copy | Op::Blit | Op::Checksum | Op::Compare => (true, true),
            Op::Fill | Op::StoreDword => (false, true),
            Op::WaitDword => (true, false),
        }
    }

    pub(super) fn from_word(word: u64) -> Option<Op> {
        const ALL: [Op; 10] = [
            Op::Nop,
            Op::Switch,
            Op::Entries,
            Op::Copy,
            Op::Fill,
            Op::Checksum,
            Op::Compare,
            Op::Blit,
            Op::StoreDword,
            Op::WaitDword,
        ];
        ALL.get(usize::from(word as u8)).copied()
    }
}
