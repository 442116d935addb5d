// SPDX-License-Identifier: MIT OR Apache-2.0
//! The mm barrier: wait until every operation that was inside the mm has changed its page tables.
//!
//! Live sources report the *start* of an invalidation. Whoever pins after the report but before the page tables
//! change pins the old page, and no second report comes. The barrier is what `mmu_interval_read_begin` does by
//! waiting for `invalidate_range_end`, made of operations that user space has: it takes, one after the other, the
//! locks under which Linux changes page tables, and gives them back.
//!
//! | lock | who holds it while page tables change | taken here by |
//! |---|---|---|
//! | mmap lock, for writing | munmap, mremap, mprotect, fork, uprobes, KSM, oom reaper (some for reading) | `mbind`, `madvise` |
//! | the VMA's own lock, for writing | page faults (6.4), MADV_DONTNEED and MADV_FREE (6.16) | `mbind` (its page walk asks for it, 6.5), or a change of the VMA's flags |
//! | `i_mmap`, for writing | truncate, hole punch, by any process | linking a second mapping of the file, or splitting it |
//!
//! Order: read the counter, barrier, get the pages, read the counter. An operation that started before the first
//! read is over when the barrier returns; one that starts later moves the counter.
//!
//! Not waited for: reclaim, migration and writeback, which hold only the folio lock and rmap locks. Linux backs out
//! of the first two when it finds a pin, and the third keeps the page. A consumer that does not pin must compare the
//! page's identity at each use.
//!
//! Nothing of the program changes: `mbind` sets the default policy only where the default policy already is, which
//! Linux (`vma_replace_policy`) leaves alone; where a policy is set, a flag that only core dumps look at is toggled
//! and put back.
//!
//! Lock order: `file_links` and `file_link` are leaves. Context: may sleep, for as long as the longest operation in
//! flight. Must not be called by a thread that a userfaultfd monitor waits for.

mod file_link;

use std::sync::{Arc, Weak};
use std::{fmt, io};

use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::Range;

use crate::page::{Maps, PageError, PidOrSelf, VmFlags};
use crate::sys::mm;
use file_link::{FileId, FileLink, file_of};

static FILE_LINKS: LockClass = LockClass::new("file_links");

/// Why the barrier could not be made. The caller must not trust pages got after it.
#[derive(Debug, thiserror::Error)]
pub enum BarrierError {
    /// The mappings of the range cannot be told.
    #[error("the mappings of {range} cannot be listed: {source}")]
    Maps {
        /// The range.
        range: Range,
        /// Why.
        source: PageError,
    },
    /// Neither way to take the VMA's write lock works.
    #[error(
        "the lock of the mapping at {range} cannot be taken: mbind: {mbind}, madvise(MADV_DONTDUMP): {madvise}; \
         a seccomp filter may forbid both, allow one"
    )]
    Vma {
        /// The part of the range in that mapping.
        range: Range,
        /// What `mbind` said.
        mbind: io::Error,
        /// What `madvise` said.
        madvise: io::Error,
    },
    /// The file behind a shared mapping cannot be locked against truncate and hole punch.
    #[error(
        "the shared mapping at {range} cannot be duplicated ({source}), so truncate and hole punch of its file \
         cannot be waited for: use memory of another kind, or seal the file (F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE)"
    )]
    File {
        /// The part of the range in that mapping.
        range: Range,
        /// What `mremap` said.
        source: io::Error,
    },
}

/// The files behind a range whose second mappings are kept; see [`MmBarrier::wait`].
#[derive(Default)]
pub struct Files(Vec<Arc<FileLink>>);

/// Makes mm barriers for this process.
pub struct MmBarrier {
    maps: Maps,
    /// Second mappings, shared by all ranges that show the same file.
    links: Mutex<Vec<Weak<FileLink>>>,
}

impl fmt::Debug for MmBarrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmBarrier").field("maps", &self.maps).finish_non_exhaustive()
    }
}

impl MmBarrier {
    /// Prepare: opens `/proc/self/maps`.
    ///
    /// # Errors
    /// [`BarrierError::Maps`].
    pub fn open() -> Result<MmBarrier, BarrierError> {
        let maps = Maps::open(PidOrSelf::Myself);
        let maps = maps.map_err(|source| BarrierError::Maps { range: Range::ALL, source })?;
        Ok(MmBarrier { maps, links: Mutex::new(&FILE_LINKS, Vec::new()) })
    }

    /// Wait until every operation that was changing a translation in `range`, when this was called, has done so.
    ///
    /// With `files`, truncate and hole punch of the shared files in the range included; keep the value for the next
    /// barrier of the same range. A barrier announces nothing itself, except when `files` forgets a file that the
    /// range shows no more, which unmaps two pages elsewhere.
    ///
    /// Context: may sleep. Costs some 2 µs for one quiet anonymous mapping, 4 µs more for each shared file in the
    /// range; otherwise as long as the longest operation in flight.
    ///
    /// # Errors
    /// [`BarrierError`]: there was no barrier.
    pub fn wait(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        files: Option<&mut Files>,
    ) -> Result<(), BarrierError> {
        let vmas = self.maps.in_range(range).map_err(|source| BarrierError::Maps { range, source })?;
        if vmas.is_empty() {
            // Nothing to pin either, but an munmap that took it away may still be changing its page tables: it holds
            // the mmap lock, and mbind asks for that before it finds the hole.
            let _ = mm::mbind_default(range);
        }
        let parts = || vmas.iter().filter_map(|vma| Some((vma, vma.range.intersection(range)?)));
        for (_, part) in parts() {
            self.wait_for_vma(part)?;
        }
        let Some(Files(held)) = files else { return Ok(()) };
        held.retain(|link| vmas.iter().any(|vma| file_of(vma) == Some(link.file())));
        for (vma, part) in parts() {
            let Some(file) = file_of(vma) else { continue };
            let failed = |source| BarrierError::File { range: part, source };
            if let Some(link) = held.iter().find(|link| link.file() == file) {
                link.wait(cx).map_err(failed)?;
            } else {
                held.push(self.link(cx, file, part).map_err(failed)?);
            }
        }
        Ok(())
    }

    /// The second mapping of `file`, waited for.
    fn link(&self, cx: &mut MaySleep<'_>, file: FileId, part: Range) -> io::Result<Arc<FileLink>> {
        let known = {
            let mut links = self.links.lock(cx);
            links.retain(|link| link.strong_count() > 0);
            links.iter().filter_map(Weak::upgrade).find(|link| link.file() == file)
        };
        if let Some(link) = known {
            link.wait(cx)?;
            return Ok(link);
        }
        // Not under the lock: it waits for others in the kernel. Two of one file do no harm.
        let link = Arc::new(FileLink::new(file, part.first_page())?);
        self.links.lock(cx).push(Arc::downgrade(&link));
        Ok(link)
    }

    fn wait_for_vma(&self, part: Range) -> Result<(), BarrierError> {
        let mbind = match mm::has_default_policy(part.first_page()) {
            Ok(true) => match mm::mbind_default(part) {
                Ok(()) => return Ok(()),
                Err(e) => e,
            },
            Ok(false) => io::Error::other("a memory policy is set there and must stay"),
            Err(e) => e,
        };
        self.toggle_dump(part).map_err(|madvise| BarrierError::Vma { range: part, mbind, madvise })
    }

    /// A change of the VMA's flags takes its write lock; this flag matters to core dumps alone.
    fn toggle_dump(&self, part: Range) -> io::Result<()> {
        let page = part.first_page();
        let flags = self.maps.vm_flags(page).map_err(io::Error::other)?;
        let dumped = !flags.contains(VmFlags::DD);
        mm::set_dump(part, !dumped)?;
        mm::set_dump(part, dumped)
    }
}

#[cfg(test)]
mod tests;
