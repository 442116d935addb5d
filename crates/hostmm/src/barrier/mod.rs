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
//! | `i_mmap`, for writing | truncate, hole punch, by any process | linking a second mapping of the file |
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
//! Context: may sleep, for as long as the longest operation in flight. Takes no lock of ours. Must not be called by
//! a thread that a userfaultfd monitor waits for.

use interleave::MaySleep;
use mmu_notifier::Range;

use crate::page::{Maps, PageError, PidOrSelf, VmFlags, Vma};
use crate::sys::mm;

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
        mbind: std::io::Error,
        /// What `madvise` said.
        madvise: std::io::Error,
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
        source: std::io::Error,
    },
}

/// Makes mm barriers for this process.
#[derive(Debug)]
pub struct MmBarrier {
    maps: Maps,
}

impl MmBarrier {
    /// Prepare: opens `/proc/self/maps`.
    ///
    /// # Errors
    /// [`BarrierError::Maps`].
    pub fn open() -> Result<MmBarrier, BarrierError> {
        let maps = Maps::open(PidOrSelf::Myself);
        Ok(MmBarrier { maps: maps.map_err(|source| BarrierError::Maps { range: Range::ALL, source })? })
    }

    /// Wait until every operation that was changing a translation in `range`, when this was called, has done so.
    ///
    /// Context: may sleep. Costs about 2 µs for one quiet anonymous mapping, some 3 µs more for each shared file in
    /// the range; otherwise as long as the longest operation in flight.
    ///
    /// # Errors
    /// [`BarrierError`]: there was no barrier.
    pub fn wait(&self, _cx: &mut MaySleep<'_>, range: Range) -> Result<(), BarrierError> {
        let vmas = self.maps.in_range(range).map_err(|source| BarrierError::Maps { range, source })?;
        if vmas.is_empty() {
            // Nothing to pin either, but an munmap that took it away may still be changing its page tables: it holds
            // the mmap lock, and mbind asks for that before it finds the hole.
            let _ = mm::mbind_default(range);
            return Ok(());
        }
        let mut files: Vec<((u32, u32), u64)> = Vec::new();
        for vma in &vmas {
            let Some(part) = vma.range.intersection(range) else { continue };
            self.wait_for_vma(part)?;
            let file = (vma.dev, vma.inode);
            if needs_i_mmap(vma) && !files.contains(&file) {
                // After the VMA's lock: a fault in flight may hold the file's lock while it waits for nobody.
                mm::link_and_unlink(part).map_err(|source| BarrierError::File { range: part, source })?;
                files.push(file);
            }
        }
        Ok(())
    }

    fn wait_for_vma(&self, part: Range) -> Result<(), BarrierError> {
        let mbind = match mm::has_default_policy(part.first_page()) {
            Ok(true) => match mm::mbind_default(part) {
                Ok(()) => return Ok(()),
                Err(e) => e,
            },
            Ok(false) => std::io::Error::other("a memory policy is set there and must stay"),
            Err(e) => e,
        };
        self.toggle_dump(part).map_err(|madvise| BarrierError::Vma { range: part, mbind, madvise })
    }

    /// A change of the VMA's flags takes its write lock; this flag matters to core dumps alone.
    fn toggle_dump(&self, part: Range) -> std::io::Result<()> {
        let page = part.first_page();
        let flags = self.maps.vm_flags(page).map_err(std::io::Error::other)?;
        let dumped = !flags.contains(VmFlags::DD);
        mm::set_dump(part, !dumped)?;
        mm::set_dump(part, dumped)
    }
}

/// Can a page of this mapping go without the mmap lock and without a second notification?
///
/// Truncate notifies each mapping twice, before and after the pages leave the page cache (`truncate_pagecache`), so
/// whoever got a page in the first gap hears the second. A hole punch in a shared mapping notifies once. In a private
/// mapping a pin for writing has an anonymous copy, which a hole punch leaves alone.
fn needs_i_mmap(vma: &Vma) -> bool {
    vma.shared && vma.inode != 0
}

#[cfg(test)]
mod tests;
