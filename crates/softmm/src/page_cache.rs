// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files and their page cache: inode, address_space and the disk behind it (mm/filemap.c; v6.18 unless a line says otherwise).
//!
//! Sequence: read(2) and write(2) notify nothing, because every mapping of the page sees them through the same frame. An XIP
//! file that gets a block is the exception: see [`crate::xip`].
//!
//! Invariants:
//! * The cache holds one reference on each of its pages, and such a page is this file's (`is_page_of`).
//! * A page of the cache lies below the size of the file, except while truncate runs.
//! * A page of a regular file that differs from the disk is dirty, or a dirty pte maps it.
//! * A page of shmem is in the cache or in swap, not in both, but for one that reclaim has locked.
//!
//! Sizes and offsets are in pages: partial pages do not exist here.
//!
//! Lock order:
//! ```text
//! inode_lock                      write, truncate, hole punch (i_mutex, i_rwsem)
//!   mmap_lock                     write(2) from user memory, not modelled; the order is
//!     invalidate_lock             regular files: read to fill the cache, write to truncate and punch
//!       page_lock
//!         i_mmap                  see rmap_file
//!           ptl
//!             i_pages             over disk, which is also taken alone
//! ```
//! invalidate_lock is of 5.15. Older filesystems that could punch holes had a lock of their own for it; that it is taken
//! in every profile hides the races of those that had none, which are about file contents, not about mappings.

use crate::error::{FileError, OutOfMemory};
use crate::frame::Frames;
use crate::machine::Machine;
use crate::rmap_file::IMmap;
use crate::uprobes::Place;
use interleave::{AtomicU64, Digest, LockClass, MaySleep, Mutex, MutexGuard, Ordering, RwLock, SpinLock};
use mmu_notifier::Pfn;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

static INODE_LOCK: LockClass = LockClass::new("inode_lock");
static INVALIDATE_LOCK: LockClass = LockClass::new("invalidate_lock");
static I_MMAP: LockClass = LockClass::new("i_mmap");
static I_PAGES: LockClass = LockClass::new("i_pages");
static DISK: LockClass = LockClass::new("disk");
static XIP_SPARSE: LockClass = LockClass::new("xip_sparse_mutex");
static REGISTER_RWSEM: LockClass = LockClass::new("register_rwsem");
static UPROBES: LockClass = LockClass::new("uprobes_treelock");

/// What is behind a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A disk: clean pages can be dropped, and shared mappings are write-protected while their pages are clean.
    Regular,
    /// Memory (tmpfs, memfd, MAP_SHARED|MAP_ANONYMOUS): no dirty accounting, so a read of a writable shared mapping maps
    /// the page writable at once.
    Shmem,
    /// Blocks that are memory and are mapped themselves: see [`crate::xip`].
    Xip,
}

impl FileKind {
    /// Must a clean page be read-only in shared mappings (vma_wants_writenotify, page_mkwrite)?
    pub(crate) const fn dirty_accounted(self) -> bool {
        matches!(self, FileKind::Regular)
    }
}

/// A file. It is gone, with its cache, when the last `Arc` is: no mapping is left then, since a mapping holds one.
pub struct File {
    /// Immutable.
    id: u64,
    /// Immutable.
    kind: FileKind,
    /// Immutable.
    machine: Arc<Machine>,
    pub(crate) inode_lock: Mutex<()>,
    pub(crate) invalidate_lock: RwLock<()>,
    /// i_size, in pages. Changes under inode_lock.
    size: AtomicU64,
    /// The page cache.
    pages: SpinLock<BTreeMap<u64, Pfn>>,
    /// Who maps it.
    pub(crate) i_mmap: RwLock<IMmap>,
    /// Pages that have been written out (shmem: to swap); others read as zeros.
    disk: SpinLock<BTreeMap<u64, Box<[u64]>>>,
    /// What private mappings show where an XIP file has no block (xip_sparse_mutex).
    pub(crate) xip_sparse: Mutex<Option<Pfn>>,
    /// One registration at a time.
    pub(crate) register_rwsem: Mutex<()>,
    /// The probes, with what the file had there.
    pub(crate) uprobes: SpinLock<BTreeMap<Place, u64>>,
}

fn digest_pages(pages: &BTreeMap<u64, Pfn>) -> u64 {
    pages.iter().map(|(&index, &pfn)| (index, pfn.0)).collect::<Vec<_>>().digest()
}

/// The page is not there and cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPage {
    /// At or past the end of the file.
    PastEnd,
    OutOfMemory(OutOfMemory),
}

impl Machine {
    /// A file of `pages` pages, all zero. [`FileKind::Xip`] on a kernel without it is [`FileKind::Regular`].
    pub fn new_file(self: &Arc<Machine>, kind: FileKind, pages: u64) -> Arc<File> {
        let kind = if kind == FileKind::Xip && !self.profile().xip { FileKind::Regular } else { kind };
        Arc::new(File {
            id: self.fresh_id(),
            kind,
            machine: self.clone(),
            inode_lock: Mutex::with_digest(&INODE_LOCK, (), <()>::digest),
            invalidate_lock: RwLock::with_digest(&INVALIDATE_LOCK, (), <()>::digest),
            size: AtomicU64::new(pages),
            pages: SpinLock::with_digest(&I_PAGES, BTreeMap::new(), digest_pages),
            i_mmap: RwLock::with_digest(&I_MMAP, IMmap::default(), IMmap::digest),
            disk: SpinLock::with_digest(&DISK, BTreeMap::new(), BTreeMap::digest),
            xip_sparse: Mutex::with_digest(&XIP_SPARSE, None, |sparse| sparse.map(|pfn: Pfn| pfn.0).digest()),
            register_rwsem: Mutex::with_digest(&REGISTER_RWSEM, (), <()>::digest),
            uprobes: SpinLock::with_digest(&UPROBES, BTreeMap::new(), BTreeMap::digest),
        })
    }
}

impl File {
    /// What it is.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Its length in pages.
    pub fn pages(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    /// The pages that are in the page cache and their frames: for oracles and reports.
    pub fn cached(&self, cx: &mut MaySleep<'_>) -> Vec<(u64, Pfn)> {
        self.pages.lock(cx).iter().map(|(&index, &pfn)| (index, pfn)).collect()
    }

    /// The page that private mappings of an XIP file show where it has no block, once there is one: for oracles.
    pub fn xip_sparse_page(&self, cx: &mut MaySleep<'_>) -> Option<Pfn> {
        *self.xip_sparse.lock(cx)
    }

    /// What the disk holds of page `index`; `None`: never written out, or dropped since.
    pub fn on_disk(&self, cx: &mut MaySleep<'_>, index: u64) -> Option<Vec<u64>> {
        self.disk.lock(cx).get(&index).map(|contents| contents.to_vec())
    }

    /// read(2) of one word.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn read(&self, cx: &mut MaySleep<'_>, index: u64, word: usize) -> Result<u64, FileError> {
        self.check_word(word)?;
        if self.kind == FileKind::Xip {
            let _truncate_waits = self.invalidate_lock.read(cx);
            let block = if index < self.pages() {
                self.xip_block(cx, index)
            } else {
                return Err(FileError::PastEnd(index));
            };
            return Ok(block.map_or(0, |block| self.frames().contents(block)[word]));
        }
        let page = self.read_page(cx, index)?;
        Ok(self.frames().contents(page.pfn())[word])
    }

    /// write(2) of one word. A write past the end makes the file longer.
    ///
    /// # Errors
    /// [`FileError`]; the file may have become longer all the same.
    pub fn write(&self, cx: &mut MaySleep<'_>, index: u64, word: usize, value: u64) -> Result<(), FileError> {
        self.check_word(word)?;
        if index >= FileError::PAGES_MAX {
            return Err(FileError::TooBig(index));
        }
        let _inode = self.inode_lock.lock(cx);
        if index >= self.pages() {
            self.set_pages(index + 1);
        }
        if self.kind == FileKind::Xip {
            let block = self.xip_create(cx, index)?;
            self.frames().store_word(block, word, value);
            return Ok(());
        }
        let page = self.read_page(cx, index)?;
        self.frames().store_word(page.pfn(), word, value);
        self.frames().set_dirty(page.pfn());
        Ok(())
    }

    pub(crate) fn cached_pfn(&self, cx: &mut MaySleep<'_>, index: u64) -> Option<Pfn> {
        self.pages.lock(cx).get(&index).copied()
    }

    /// A block of an XIP file: its frame belongs to the file, and no mapping counts.
    pub(crate) fn insert_block(&self, cx: &mut MaySleep<'_>, index: u64, block: Pfn) {
        self.frames().set_mapping(block, self.id, index);
        self.pages.lock(cx).insert(index, block);
    }

    /// Frees the blocks of an XIP file; nobody maps them any more.
    pub(crate) fn free_xip_blocks(&self, cx: &mut MaySleep<'_>, indices: std::ops::Range<u64>) {
        for index in self.cached_in(cx, indices) {
            let block = self.pages.lock(cx).remove(&index);
            block.into_iter().for_each(|block| self.frames().put(block, 1));
        }
    }

    fn read_page(&self, cx: &mut MaySleep<'_>, index: u64) -> Result<LockedPage<'_>, FileError> {
        self.find_or_fill(cx, index).map_err(|why| match why {
            NoPage::PastEnd => FileError::PastEnd(index),
            NoPage::OutOfMemory(error) => FileError::OutOfMemory(error),
        })
    }

    fn check_word(&self, word: usize) -> Result<(), FileError> {
        if word < self.frames().words_per_page() { Ok(()) } else { Err(FileError::NotStored(word)) }
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    pub(crate) fn frames(&self) -> &Frames {
        self.machine.frames()
    }

    /// i_size_write. Under inode_lock.
    pub(crate) fn set_pages(&self, pages: u64) {
        self.size.store(pages, Ordering::SeqCst);
    }

    /// The page with a reference, locked, if it is in the cache (find_lock_page).
    pub(crate) fn find_lock(&self, cx: &mut MaySleep<'_>, index: u64) -> Option<LockedPage<'_>> {
        loop {
            let pfn = self.find_get(cx, index)?;
            let lock = self.frames().lock_page(cx, pfn);
            let page = LockedPage { frames: self.frames(), pfn, counted: true, lock: Some(lock) };
            if self.frames().is_page_of(pfn, self.id, index) {
                return Some(page);
            }
        }
    }

    /// As [`File::find_lock`], but does not wait. `Err`: somebody else has it locked.
    pub(crate) fn find_trylock(
        &self,
        cx: &mut MaySleep<'_>,
        index: u64,
    ) -> Result<Option<LockedPage<'_>>, ()> {
        let Some(pfn) = self.find_get(cx, index) else { return Ok(None) };
        let lock = self.frames().trylock_page(cx, pfn);
        let locked = lock.is_some();
        let page = LockedPage { frames: self.frames(), pfn, counted: true, lock };
        if !locked {
            return Err(());
        }
        Ok(self.frames().is_page_of(pfn, self.id, index).then_some(page))
    }

    /// The page with a reference, if it is in the cache (find_get_page).
    pub(crate) fn find_get(&self, cx: &mut MaySleep<'_>, index: u64) -> Option<Pfn> {
        let pages = self.pages.lock(cx);
        let pfn = pages.get(&index).copied()?;
        // The cache's own reference is there while i_pages is held.
        self.frames().get(pfn, 1);
        Some(pfn)
    }

    /// Each page of `indices` that is in the cache, with a reference.
    pub(crate) fn find_get_range(
        &self,
        cx: &mut MaySleep<'_>,
        indices: std::ops::Range<u64>,
    ) -> BTreeMap<u64, Pfn> {
        let pages = self.pages.lock(cx);
        let found: BTreeMap<u64, Pfn> = pages.range(indices).map(|(&index, &pfn)| (index, pfn)).collect();
        found.values().for_each(|&pfn| self.frames().get(pfn, 1));
        found
    }

    /// filemap_fault, read and write: the page, locked, read in if it has to be.
    pub(crate) fn find_or_fill(&self, cx: &mut MaySleep<'_>, index: u64) -> Result<LockedPage<'_>, NoPage> {
        loop {
            if let Some(page) = self.find_lock(cx, index) {
                return if index < self.pages() { Ok(page) } else { Err(NoPage::PastEnd) };
            }
            if index >= self.pages() {
                return Err(NoPage::PastEnd);
            }
            let held = (self.kind == FileKind::Regular).then(|| self.invalidate_lock.read(cx));
            let new = self.frames().alloc_zeroed().map_err(NoPage::OutOfMemory)?;
            let mut pages = self.pages.lock(cx);
            // Truncate lowers the size before it looks at i_pages: what goes in below the size now, it will find.
            let wanted = index < self.pages() && !pages.contains_key(&index);
            if wanted {
                // Under i_pages, or the page could come, be written, written out and go since the disk was looked at. (The
                // kernel puts the page in first, locked and not up to date, and then reads.)
                let (pages, cx) = pages.split();
                let mut disk = self.disk.lock(cx);
                if let Some(contents) = disk.get(&index) {
                    self.frames().fill(new, contents);
                }
                if self.kind == FileKind::Shmem && disk.remove(&index).is_some() {
                    self.frames().set_dirty(new);
                }
                drop(disk);
                self.frames().set_mapping(new, self.id, index);
                pages.insert(index, new);
            }
            drop(pages);
            drop(held);
            if !wanted {
                self.frames().put(new, 1);
            }
        }
    }

    /// Takes a locked page out of the cache; what was not written out is lost (delete_from_page_cache).
    pub(crate) fn remove(&self, cx: &mut MaySleep<'_>, index: u64, page: &LockedPage<'_>) {
        self.frames().clear_dirty(page.pfn());
        let mut pages = self.pages.lock(cx);
        self.frames().clear_mapping(page.pfn());
        pages.remove(&index);
        drop(pages);
        self.frames().put(page.pfn(), 1);
    }

    /// The same if the cache and `page` hold the only references (__remove_mapping). False: somebody else has one.
    pub(crate) fn remove_unused<'f>(
        &'f self,
        cx: &mut MaySleep<'_>,
        index: u64,
        mut page: LockedPage<'f>,
    ) -> Result<(), LockedPage<'f>> {
        let pfn = page.pfn();
        let mut pages = self.pages.lock(cx);
        if !self.frames().freeze(pfn, 2) {
            drop(pages);
            return Err(page);
        }
        page.counted = false;
        self.frames().clear_mapping(pfn);
        pages.remove(&index);
        drop(pages);
        drop(page);
        self.frames().free_frozen(pfn);
        Ok(())
    }

    /// Which pages of `indices` are in the cache now.
    pub(crate) fn cached_in(&self, cx: &mut MaySleep<'_>, indices: std::ops::Range<u64>) -> Vec<u64> {
        self.pages.lock(cx).range(indices).map(|(&index, _)| index).collect()
    }

    /// Writes a locked page out (a_ops->writepage).
    pub(crate) fn write_out(&self, cx: &mut MaySleep<'_>, index: u64, page: &LockedPage<'_>) {
        let contents = self.frames().contents(page.pfn());
        self.disk.lock(cx).insert(index, contents);
    }

    /// Frees the blocks of `indices`.
    pub(crate) fn free_blocks(&self, cx: &mut MaySleep<'_>, indices: std::ops::Range<u64>) {
        self.disk.lock(cx).retain(|index, _| !indices.contains(index));
    }
}

impl Drop for File {
    /// evict: nobody maps it and nobody works on it.
    fn drop(&mut self) {
        for (_, pfn) in std::mem::take(self.pages.get_mut()) {
            self.machine.frames().clear_mapping(pfn);
            self.machine.frames().put(pfn, 1);
        }
        if let Some(sparse) = self.xip_sparse.get_mut().take() {
            self.machine.frames().put(sparse, 1);
        }
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file {} ({:?}, {} pages)", self.id, self.kind, self.pages())
    }
}

/// A page of a file with a reference, locked. Dropping it unlocks, then drops the reference.
pub(crate) struct LockedPage<'f> {
    frames: &'f Frames,
    pfn: Pfn,
    counted: bool,
    lock: Option<MutexGuard<'f, ()>>,
}

impl<'f> LockedPage<'f> {
    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// The reference is a mapping's from now on; the page stays locked.
    pub(crate) fn give_reference_to_mapping(&mut self) {
        self.counted = false;
    }

    /// Locks a page on which the caller holds a reference, which it keeps.
    pub(crate) fn lock(cx: &mut MaySleep<'_>, frames: &'f Frames, pfn: Pfn) -> LockedPage<'f> {
        LockedPage { frames, pfn, counted: false, lock: Some(frames.lock_page(cx, pfn)) }
    }

    /// Lets others lock the page, and locks it again: it may not be the file's any more.
    pub(crate) fn relock(&mut self, cx: &mut MaySleep<'_>) {
        self.lock = None;
        self.lock = Some(self.frames.lock_page(cx, self.pfn));
    }
}

impl Drop for LockedPage<'_> {
    fn drop(&mut self) {
        self.lock = None;
        if self.counted {
            self.frames.put(self.pfn, 1);
        }
    }
}
