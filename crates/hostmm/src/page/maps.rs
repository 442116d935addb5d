// SPDX-License-Identifier: MIT OR Apache-2.0
//! The mappings of a process: by the ioctl `PROCMAP_QUERY` (Linux 6.11), else by reading `/proc/PID/maps`.
//!
//! One answer is right for one moment. A walk over a range asks once for each mapping (ioctl) or reads all of them
//! at once (file), and in both cases a mapping that changes meanwhile may be seen in its old or new shape.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use mmu_notifier::{PageAddr, Range};
pub use procfs::process::VmFlags;
use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};

use super::error::PageError;
use super::pagemap::{Owner, PidOrSelf};
use crate::sys::procmap;

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    /// Its addresses.
    pub range: Range,
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
    /// `PROT_EXEC`.
    pub exec: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// Offset of its first byte in the file, in bytes; 0 for anonymous memory.
    pub offset: u64,
    /// Major and minor number of the file's device.
    pub dev: (u32, u32),
    /// Inode of the file; 0 for anonymous memory. Shared anonymous memory and memfds have one.
    pub inode: u64,
    /// What `/proc/PID/maps` shows in the last column: a path, or a name in brackets.
    pub name: Option<OsString>,
}

/// The mappings of one process.
#[derive(Debug)]
pub struct Maps {
    file: File,
    path: PathBuf,
    who: PidOrSelf,
    owner: Owner,
    by_query: bool,
}

impl Maps {
    /// Open `/proc/PID/maps`, and ask by ioctl where the kernel knows it.
    ///
    /// # Errors
    /// [`PageError::Permission`], [`PageError::NoProcess`].
    pub fn open(who: PidOrSelf) -> Result<Maps, PageError> {
        let mut maps = Maps::open_without_query(who)?;
        maps.by_query = procmap::query(&maps.file, 0).is_ok();
        Ok(maps)
    }

    /// The same, never by ioctl.
    ///
    /// # Errors
    /// As for [`Maps::open`].
    pub fn open_without_query(who: PidOrSelf) -> Result<Maps, PageError> {
        let path = who.path("maps");
        let file = File::open(&path).map_err(|e| PageError::from_io(&path, e, who.pid()))?;
        Ok(Maps { file, path, who, owner: Owner::new(who)?, by_query: false })
    }

    /// Whether `PROCMAP_QUERY` answers.
    #[must_use]
    pub fn by_query(&self) -> bool {
        self.by_query
    }

    /// The mapping that holds `page`, else the first one above it.
    ///
    /// # Errors
    /// [`PageError::Forked`], [`PageError::NoProcess`].
    pub fn find(&self, page: PageAddr) -> Result<Option<Vma>, PageError> {
        self.owner.check()?;
        if self.by_query {
            return procmap::query(&self.file, page.get())
                .map(|found| found.and_then(from_query))
                .map_err(|e| PageError::from_io(&self.path, e, self.who.pid()));
        }
        Ok(self.read_all()?.into_iter().find(|vma| vma.range.end() > page.get()))
    }

    /// The mapping that holds `page`.
    ///
    /// # Errors
    /// [`PageError::Unmapped`], and those of [`Maps::find`].
    pub fn at(&self, page: PageAddr) -> Result<Vma, PageError> {
        match self.find(page)? {
            Some(vma) if vma.range.contains_addr(page.get()) => Ok(vma),
            next => Err(PageError::Unmapped { range: Range::page(page), next: next.map(|vma| vma.range) }),
        }
    }

    /// The mappings that overlap `range`, in order, whole.
    ///
    /// # Errors
    /// As for [`Maps::find`].
    pub fn in_range(&self, range: Range) -> Result<Vec<Vma>, PageError> {
        self.owner.check()?;
        if !self.by_query {
            let all = self.read_all()?;
            return Ok(all.into_iter().filter(|vma| vma.range.overlaps(range)).collect());
        }
        let mut found = Vec::new();
        let mut at = Ok(range.first_page());
        while let Ok(page) = at
            && page.get() < range.end()
        {
            match self.find(page)? {
                Some(vma) if vma.range.overlaps(range) => {
                    at = PageAddr::new(vma.range.end());
                    found.push(vma);
                }
                _ => break,
            }
        }
        Ok(found)
    }

    /// The parts of `range` that no mapping covers, in order.
    ///
    /// # Errors
    /// As for [`Maps::find`].
    pub fn holes(&self, range: Range) -> Result<Vec<Range>, PageError> {
        Ok(gaps(range, self.in_range(range)?.iter().map(|vma| vma.range)))
    }

    /// The flags of the mapping that holds `page`, from smaps: mergeable, huge page advice, locked, registered with
    /// userfaultfd, ... Dear: the kernel walks the page tables of every mapping to print smaps.
    ///
    /// # Errors
    /// As for [`Maps::at`].
    pub fn vm_flags(&self, page: PageAddr) -> Result<VmFlags, PageError> {
        let vma = self.at(page)?;
        let all = self.process().and_then(|p| p.smaps()).map_err(|e| self.failed(e))?;
        let same = |m: &MemoryMap| m.address.0 <= page.get() && page.get() < m.address.1;
        all.0
            .into_iter()
            .find(same)
            .map(|m| m.extension.vm_flags)
            .ok_or(PageError::Unmapped { range: vma.range, next: None })
    }

    fn process(&self) -> procfs::ProcResult<Process> {
        match self.who {
            PidOrSelf::Myself => Process::myself(),
            PidOrSelf::Pid(pid) => Process::new(pid.cast_signed()),
        }
    }

    fn read_all(&self) -> Result<Vec<Vma>, PageError> {
        let all = self.process().and_then(|p| p.maps()).map_err(|e| self.failed(e))?;
        Ok(all.0.into_iter().filter_map(from_procfs_map).collect())
    }

    fn failed(&self, e: procfs::ProcError) -> PageError {
        use procfs::ProcError::{Io, NotFound, PermissionDenied};
        let source = match e {
            NotFound(_) => std::io::Error::from_raw_os_error(libc::ESRCH),
            PermissionDenied(_) => std::io::Error::from_raw_os_error(libc::EACCES),
            Io(e, _) => e,
            other => std::io::Error::other(other.to_string()),
        };
        PageError::from_io(&self.path, source, self.who.pid())
    }
}

/// The parts of `range` outside all of `covered`, which is in order.
fn gaps(range: Range, covered: impl Iterator<Item = Range>) -> Vec<Range> {
    let mut gaps = Vec::new();
    let mut at = range.start();
    for vma in covered {
        let upto = vma.start().min(range.end());
        gaps.extend(upto.checked_sub(at).and_then(|len| Range::new(at, len).ok()));
        at = at.max(vma.end());
    }
    gaps.extend(range.end().checked_sub(at).and_then(|len| Range::new(at, len).ok()));
    gaps
}

/// The vsyscall page is a mapping outside user space: no [`Range`], and none of ours.
fn from_query(found: procmap::Found) -> Option<Vma> {
    Some(Vma {
        range: Range::new(found.start, found.end - found.start).ok()?,
        read: found.flags & procmap::READABLE != 0,
        write: found.flags & procmap::WRITABLE != 0,
        exec: found.flags & procmap::EXECUTABLE != 0,
        shared: found.flags & procmap::SHARED != 0,
        offset: found.offset,
        dev: found.dev,
        inode: found.inode,
        name: (!found.name.is_empty()).then(|| OsString::from_vec(found.name)),
    })
}

fn from_procfs_map(map: MemoryMap) -> Option<Vma> {
    Some(Vma {
        range: Range::new(map.address.0, map.address.1.checked_sub(map.address.0)?).ok()?,
        read: map.perms.contains(MMPermissions::READ),
        write: map.perms.contains(MMPermissions::WRITE),
        exec: map.perms.contains(MMPermissions::EXECUTE),
        shared: map.perms.contains(MMPermissions::SHARED),
        offset: map.offset,
        dev: (map.dev.0.cast_unsigned(), map.dev.1.cast_unsigned()),
        inode: map.inode,
        name: name(map.pathname),
    })
}

fn name(path: MMapPath) -> Option<OsString> {
    let text = match path {
        MMapPath::Anonymous => return None,
        MMapPath::Path(path) => return Some(path.into_os_string()),
        MMapPath::Heap => "[heap]".to_owned(),
        MMapPath::Stack => "[stack]".to_owned(),
        MMapPath::TStack(tid) => format!("[stack:{tid}]"),
        MMapPath::Vdso => "[vdso]".to_owned(),
        MMapPath::Vvar => "[vvar]".to_owned(),
        MMapPath::Vsyscall => "[vsyscall]".to_owned(),
        MMapPath::Rollup => "[rollup]".to_owned(),
        MMapPath::Vsys(key) => format!("/SYSV{key:08x}"),
        MMapPath::Other(name) => format!("[{name}]"),
    };
    Some(text.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn gaps_and_mappings_tile_the_range(
            start in 0u64..40, len in 1u64..40, cuts in proptest::collection::btree_set(0u64..80, 0..20)
        ) {
            let page = |n: u64| n << 12;
            let range = Range::new(page(start), page(len)).unwrap();
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let all: Vec<Range> =
                cuts.as_chunks::<2>().0.iter().map(|[a, b]| Range::new(page(*a), page(b - a)).unwrap()).collect();
            let gaps = gaps(range, all.iter().copied().filter(|r| r.overlaps(range)));
            for p in range.iter_pages() {
                let mapped = all.iter().any(|r| r.contains_addr(p.get()));
                let hole = gaps.iter().filter(|r| r.contains_addr(p.get())).count();
                prop_assert_eq!(hole, usize::from(!mapped));
            }
            prop_assert!(gaps.iter().all(|g| range.contains(*g)));
            prop_assert!(gaps.windows(2).all(|w| w[0].end() < w[1].start()));
        }
    }
}
