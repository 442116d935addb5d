// SPDX-License-Identifier: MIT OR Apache-2.0
//! Room for code in the vDSO of another program.
//!
//! The kernel maps one image into every program, and what is left of its last page is zeroes: room that nobody's code or
//! data is in, so other threads of the program may use the vDSO meanwhile. To write there copies the page, which no
//! rule forbids (debuggers set breakpoints in it), and the program reads what it read before once the zeroes are back.
//!
//! What stays is that the vDSO now has a page of its own (an anon_vma), and so fork announces its range, too.

use super::facts::read;
use super::inject::InjectError;
use super::ptrace::Tid;
use crate::page::{Maps, PidOrSelf};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// In the auxiliary vector (getauxval(3)): where the vDSO lies.
const AT_SYSINFO_EHDR: u64 = 33;
/// Code begins at a multiple of it.
const ALIGN: usize = 16;

/// Where in the image there is room: the same in every 64-bit program.
pub(super) struct Room {
    offset: u64,
    len: usize,
    image_len: u64,
}

impl Room {
    /// Looks for `len` bytes in our own. `None`: no vDSO (vdso=0), or too full a one.
    pub(super) fn find(len: usize) -> Option<Room> {
        let maps = Maps::open(PidOrSelf::Myself).ok()?.in_range(mmu_notifier::Range::ALL).ok()?;
        let vdso = maps.iter().find(|vma| vma.name.as_ref().is_some_and(|name| name == "[vdso]"))?.range;
        let mut image = vec![0; usize::try_from(vdso.len()).ok()?];
        File::open("/proc/self/mem").ok()?.read_exact_at(&mut image, vdso.start()).ok()?;
        let free = |at: &usize| image[*at..*at + len].iter().all(|byte| *byte == 0);
        let last = image.len().checked_sub(len)? / ALIGN * ALIGN;
        let offset = (0..=last).rev().step_by(ALIGN).find(free)?;
        Some(Room { offset: offset as u64, len, image_len: vdso.len() })
    }
}

/// The room in one program, with our code in it. [`Lodged::leave`] or dropping it makes it zeroes again.
pub(super) struct Lodged {
    memory: File,
    /// Of the vDSO.
    range: Range<u64>,
    at: u64,
    len: usize,
}

impl Lodged {
    /// Writes `code`, which is as long as the room, to the vDSO of `tid`, a stopped tracee.
    pub(super) fn enter(tid: Tid, room: &Room, code: &[u8]) -> Result<Lodged, InjectError> {
        let start = image_start(tid)?;
        let at = start + room.offset;
        let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{tid}/mem"))?;
        let mut there = vec![1; room.len];
        memory.read_exact_at(&mut there, at)?;
        // Another kernel's image, brought along by a checkpoint.
        if there.iter().any(|byte| *byte != 0) {
            return Err(InjectError::NoVdso);
        }
        memory.write_all_at(code, at)?;
        Ok(Lodged { memory, range: start..start + room.image_len, at, len: room.len })
    }

    /// Of the code.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The vDSO.
    pub(super) fn vdso(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Puts the zeroes back.
    pub(super) fn leave(&self) -> io::Result<()> {
        self.memory.write_all_at(&vec![0; self.len], self.at)
    }
}

/// Where the vDSO of `tid` begins.
fn image_start(tid: Tid) -> Result<u64, InjectError> {
    // A 32-bit program has words of four bytes in it, among which this finds nothing.
    let words = read(&format!("/proc/{tid}/auxv"))?;
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes);
    let mut pairs = words.chunks_exact(16).map(|pair| (word(&pair[..8]), word(&pair[8..])));
    pairs
        .find_map(|pair| match pair {
            // A 32-bit vDSO lies below 4 GiB and speaks another language.
            (Ok(AT_SYSINFO_EHDR), Ok(start)) if start >= 1 << 32 => Some(start),
            _ => None,
        })
        .ok_or(InjectError::NoVdso)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_in_our_own_vdso_and_not_for_anything() {
        let room = Room::find(64).expect("every kernel that was seen leaves some");
        assert!(room.offset.is_multiple_of(ALIGN as u64) && room.offset + 64 <= room.image_len);
        assert!(Room::find(1 << 20).is_none());
    }
}
