// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands as slots, and the addresses that no command may name.
//!
//! The system's memory is mapped in every address space, for the command processor to use. So a command that reaches it,
//! or what lies beyond the last device address, never comes before it: its fault is known at submission.

use mmu_notifier::Access;

use super::job::Slot;
use super::layout::{DEVICE_END, Op, SYSTEM, SYSTEM_END};
use crate::device::Command;

pub(super) fn is_device(at: u64, len: u64) -> bool {
    forbidden(at, len).is_none()
}

/// The first of these addresses that no mapping can be at.
pub(super) fn forbidden(at: u64, len: u64) -> Option<u64> {
    let end = at.saturating_add(len);
    if at < SYSTEM_END && end > SYSTEM {
        Some(at.max(SYSTEM))
    } else if end > DEVICE_END {
        Some(at.max(DEVICE_END))
    } else {
        None
    }
}

/// The first address of the command that cannot be mapped.
pub(super) fn first_forbidden(command: &Command) -> Option<(u64, Access)> {
    let spans = command.spans().filter(|(_, len, _)| *len != 0);
    spans.filter_map(|(at, len, access)| Some((forbidden(at.0, len)?, access))).next()
}

pub(super) fn slot(command: &Command) -> Slot {
    match *command {
        Command::Copy { dst, src, len } => Slot { op: Op::Copy, dst: dst.0, src: src.0, len, ..Slot::NOP },
        Command::Fill { dst, len, byte } => {
            Slot { op: Op::Fill, dst: dst.0, src: byte.into(), len, ..Slot::NOP }
        }
        Command::Checksum { src, len, result } => {
            Slot { op: Op::Checksum, dst: result.0, src: src.0, len, ..Slot::NOP }
        }
        Command::Compare { a, b, len, result } => {
            Slot { op: Op::Compare, dst: b.0, src: a.0, len, a: result.0, ..Slot::NOP }
        }
        // Rows of nothing would take a turn each.
        Command::Blit2d { width: 0, .. } => Slot::NOP,
        Command::Blit2d { dst, dst_pitch, src, src_pitch, width, height } => {
            Slot { op: Op::Blit, dst: dst.0, src: src.0, len: width, a: dst_pitch, b: src_pitch, c: height }
        }
        Command::StoreDword { dst, value } => {
            Slot { op: Op::StoreDword, dst: dst.0, src: value.into(), ..Slot::NOP }
        }
    }
}
