// SPDX-License-Identifier: MIT OR Apache-2.0
//! The third layer: the device page table of one address space, which leads from its addresses to objects, and
//! commands that are led through it.
//!
//! A binding is of whole pages; a command may reach the object's bytes in them and nothing beside, and stays within one
//! binding.

use std::collections::BTreeMap;

use mmu_notifier::{Access, PAGE_SIZE, Range};

use crate::device::{Command, DeviceAddr};

/// One past the last address of a space.
const END: u64 = 1 << 48;
/// Where bindings go whose address nobody chose. Not 0: an address that was forgotten should fault.
const FIRST: u64 = 1 << 32;

#[derive(Debug, Clone, Copy)]
pub(super) struct Binding {
    pub(super) object: u64,
    end: u64,
    /// Device address of the first byte of the object.
    first: u64,
    len: u64,
    access: Access,
}

/// Bindings by the device address of their first page.
#[derive(Debug, Default)]
pub(super) struct Table(BTreeMap<u64, Binding>);

/// What a part of a command leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reached {
    pub(super) object: u64,
    /// In bytes from the object's first page.
    pub(super) offset: u64,
}

impl Table {
    /// Binds the bytes `[start, start + len)` of `object`, which are in the pages of `range`. The device address of the
    /// first byte; if it cannot be, why.
    pub(super) fn bind(
        &mut self,
        object: u64,
        range: Range,
        bytes: (u64, u64),
        access: Access,
        at: Option<DeviceAddr>,
    ) -> Result<DeviceAddr, &'static str> {
        let at = match at {
            Some(at) => at.0,
            None => self.free(range.len()).ok_or("no room is left")?,
        };
        if !at.is_multiple_of(PAGE_SIZE) {
            return Err("it is not the first address of a page");
        }
        let end =
            at.checked_add(range.len()).filter(|end| *end <= END).ok_or("it is past the last address")?;
        if !self.is_free(at, end) {
            return Err("something is bound there");
        }
        let first = at + (bytes.0 - range.start());
        self.0.insert(at, Binding { object, end, first, len: bytes.1, access });
        Ok(DeviceAddr(first))
    }

    fn is_free(&self, at: u64, end: u64) -> bool {
        self.0.range(..end).next_back().is_none_or(|(_, binding)| binding.end <= at)
    }

    fn free(&self, len: u64) -> Option<u64> {
        let above = self.0.last_key_value().map_or(FIRST, |(_, last)| last.end.max(FIRST));
        if above.checked_add(len)? <= END {
            return Some(above);
        }
        let mut at = FIRST;
        for (start, binding) in self.0.range(FIRST..) {
            if at + len <= *start {
                break;
            }
            at = binding.end;
        }
        (at.checked_add(len)? <= END).then_some(at)
    }

    /// The object that was bound with its first byte at `first`.
    pub(super) fn unbind(&mut self, first: DeviceAddr) -> Option<u64> {
        let at = first.0 / PAGE_SIZE * PAGE_SIZE;
        if self.0.get(&at)?.first != first.0 {
            return None;
        }
        self.0.remove(&at).map(|binding| binding.object)
    }

    pub(super) fn unbind_all(&mut self, object: u64) {
        self.0.retain(|_, binding| binding.object != object);
    }

    /// Where these bytes, at least one, are for this access.
    pub(super) fn reach(&self, addr: DeviceAddr, len: u64, access: Access) -> Option<Reached> {
        let (at, binding) = self.0.range(..=addr.0).next_back()?;
        let offset = addr.0.checked_sub(binding.first)?;
        let inside = offset < binding.len && len <= binding.len - offset;
        let allowed = access == Access::Read || binding.access == Access::Write;
        (inside && allowed).then_some(Reached { object: binding.object, offset: addr.0 - at })
    }
}

/// The same command with each of its addresses led through `f`: address, bytes, access. What has no bytes touches nothing
/// and goes to address 0, so that it does not seem to overlap anything.
pub(super) fn relocate<E>(
    command: &Command,
    mut f: impl FnMut(DeviceAddr, u64, Access) -> Result<DeviceAddr, E>,
) -> Result<Command, E> {
    let mut there = [DeviceAddr(0); 3];
    for (to, (addr, len, access)) in there.iter_mut().zip(command.spans()) {
        if len != 0 {
            *to = f(addr, len, access)?;
        }
    }
    Ok(match *command {
        Command::Copy { len, .. } => Command::Copy { src: there[0], dst: there[1], len },
        Command::Fill { len, byte, .. } => Command::Fill { dst: there[0], len, byte },
        Command::Checksum { len, .. } => Command::Checksum { src: there[0], result: there[1], len },
        Command::Compare { len, .. } => Command::Compare { a: there[0], b: there[1], result: there[2], len },
        Command::Blit2d { dst_pitch, src_pitch, width, height, .. } => {
            Command::Blit2d { src: there[0], dst: there[1], dst_pitch, src_pitch, width, height }
        }
        Command::StoreDword { value, .. } => Command::StoreDword { dst: there[0], value },
    })
}

/// Where the device address `bus`, at which `there` faulted, is in `here`, which `there` was made of.
pub(super) fn fault_address(here: &Command, there: &Command, bus: DeviceAddr) -> Option<DeviceAddr> {
    here.spans().zip(there.spans()).find_map(|((from, len, _), (to, _, _))| {
        let offset = bus.0.checked_sub(to.0)?;
        (offset < len).then_some(DeviceAddr(from.0 + offset))
    })
}
