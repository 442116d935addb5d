// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs and libraries as files: what is needed of one is read, and no more.

use object::read::ReadCache;
use object::read::elf::ElfFile64;
use object::{Object, ObjectSegment};
use std::fs::{self, File};

/// A file's bytes, read when they are asked for.
pub(super) type Data = ReadCache<File>;

/// An ELF file over them.
pub(super) type Elf<'a> = ElfFile64<'a, object::Endianness, &'a Data>;

/// Opens what a mapping is of: nothing where its name is none of a file (it is in brackets), and never a device.
pub(super) fn open(path: &str) -> Option<File> {
    let regular = path.starts_with('/') && fs::metadata(path).is_ok_and(|m| m.is_file());
    regular.then(|| File::open(path).ok()).flatten()
}

/// Where the parts of a file that are mapped lie in memory: file offset, length, address.
#[derive(Debug)]
pub(super) struct Segments(Vec<(u64, u64, u64)>);

impl Segments {
    pub(super) fn of(elf: &Elf<'_>) -> Segments {
        Segments(elf.segments().map(|s| (s.file_range().0, s.file_range().1, s.address())).collect())
    }

    /// The address, as the file states it, of what lies at `offset` in it.
    pub(super) fn address(&self, offset: u64) -> Option<u64> {
        let (from, _, address) =
            self.0.iter().find(|(from, len, _)| (*from..from + len).contains(&offset))?;
        Some(offset - from + address)
    }
}
