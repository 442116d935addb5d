// SPDX-License-Identifier: MIT OR Apache-2.0
//! Physical memory: page frames, who holds them and what is in them (the kernel's `struct page`, v6.18).
//!
//! A frame covers [`mmu_notifier::PAGE_SIZE`] addresses but stores only the first few 64-bit words of them
//! ([`crate::Config::words_per_page`]): contents must be real for a stale device to be caught reading them,
//! and few for an exploration to copy a page in a handful of steps. An access past the stored words is
//! refused, never folded onto another word.
//!
//! Invariants:
//! * `refcount == 0` exactly while the frame is on the free list. Its words then hold [`POISON`], and every
//!   access answers [`FrameFreed`].
//! * A mapping holds one reference, so `mapcount <= refcount`. FOLL_GET holds one, FOLL_PIN holds
//!   [`GUP_PIN_COUNTING_BIAS`] (kernel 5.6 and later; order-0 folios).
//! * `exclusive` (PageAnonExclusive, 5.19): the anonymous frame is mapped by one mm alone, which may write it and
//!   whose pins see every later write. A writable anonymous pte implies it.
//! * The generation counts allocations: a device that kept a [`FrameId`] over a free is told so even if the frame
//!   number has a new owner.
//! * Frame 0 is the zero page: never freed, never counted in a mapcount, never written.
//! * A frame that belongs to a file (page cache) is never anonymous again in this life; `mapping` says whose page
//!   it is and is none once truncate or reclaim has taken it out of the cache. It changes under the page lock.
//!
//! * `anon_vma` says whose an anonymous page is: rmap starts there. A page in the swap cache has one reference for
//!   that.
//!
//! The page lock (PG_locked) may sleep and belongs to whoever works on the page as a whole: faults on files, truncate,
//! writeback, swap, reclaim, KSM, uprobes. Lock order: mmap_lock, page lock, i_mmap, ptl.
//!
//! Nothing else here takes a lock: the free list is a bitmap of atomic words and the lowest free frame is handed out
//! first, which reuses freed frames as soon as possible and so helps to catch who still uses them. References can
//! be dropped in any context, as `put_page` can.

mod dma;
mod owner;

use crate::bitmap::Bitmap;
use crate::error::OutOfMemory;
use interleave::{
    AtomicBool, AtomicU32, AtomicU64, Context, Digest, LockClass, MaySleep, Mutex, MutexGuard, Ordering,
};
use mmu_notifier::Pfn;

pub use dma::{FrameFreed, FrameId};

static PAGE_LOCK: LockClass = LockClass::new("page_lock");

/// What a FOLL_PIN adds to the reference count of an order-0 folio (kernel 5.6 and later).
pub const GUP_PIN_COUNTING_BIAS: u32 = 1024;
/// What the words of a free frame hold.
pub const POISON: u64 = 0xaaaa_dead_aaaa_dead;

/// The zero page.
pub const ZERO_PAGE: Pfn = Pfn(0);

struct Frame {
    refcount: AtomicU32,
    mapcount: AtomicU32,
    exclusive: AtomicBool,
    dirty: AtomicBool,
    lazyfree: AtomicBool,
    generation: AtomicU64,
    lock: Mutex<()>,
    /// A page of a file, not anonymous; also after truncate.
    file: AtomicBool,
    /// The file whose page cache holds the frame; 0 is none.
    mapping: AtomicU64,
    /// Whose page it is, for rmap: 0 not anonymous, KSM, else the name of an anon_vma. Changes under the page
    /// lock, or while nobody else knows the page.
    anon_vma: AtomicU64,
    /// Which page of that file, or the page number at which the anon_vma has it.
    index: AtomicU64,
    /// Its slot in the swap cache plus 1, 0 if it is in none (PG_swapcache). Changes under the page lock.
    swap: AtomicU64,
}

/// All page frames of a [`crate::Machine`]. Nothing sleeps; any context.
///
/// # Panics
/// Every method that takes a frame number, if there is no such frame: numbers come from this machine.
pub struct Frames {
    frames: Box<[Frame]>,
    words: Box<[AtomicU64]>,
    words_per_page: usize,
    /// One bit a frame, set while it is allocated.
    allocated: Bitmap,
}
impl Frames {
    pub(crate) fn new(frames: u32, words_per_page: usize) -> Frames {
        let count = frames as usize + 1;
        let this = Frames {
            frames: (0..count)
                .map(|_| Frame {
                    refcount: AtomicU32::new(0),
                    mapcount: AtomicU32::new(0),
                    exclusive: AtomicBool::new(false),
                    dirty: AtomicBool::new(false),
                    lazyfree: AtomicBool::new(false),
                    generation: AtomicU64::new(0),
                    lock: Mutex::with_digest(&PAGE_LOCK, (), <()>::digest),
                    file: AtomicBool::new(false),
                    mapping: AtomicU64::new(0),
                    anon_vma: AtomicU64::new(0),
                    index: AtomicU64::new(0),
                    swap: AtomicU64::new(0),
                })
                .collect(),
            words: (0..count * words_per_page).map(|_| AtomicU64::new(POISON)).collect(),
            words_per_page,
            allocated: Bitmap::new(count),
        };
        let zero = this.alloc_zeroed();
        debug_assert_eq!(zero, Ok(ZERO_PAGE));
        this
    }

    /// The free list, to make it fail.
    pub(crate) fn bitmap(&self) -> &Bitmap {
        &self.allocated
    }

    /// 64-bit words that a frame stores.
    pub fn words_per_page(&self) -> usize {
        self.words_per_page
    }

    /// Frames that nobody holds. Exact only while nobody allocates or frees.
    pub fn free_frames(&self) -> usize {
        self.allocated.zeros()
    }

    /// Frames there are, free or not, without the zero page.
    pub fn total_frames(&self) -> usize {
        self.frames.len() - 1
    }

    /// A frame with one reference, mapcount 0 and poison for contents: the caller fills it before anybody sees it.
    pub(crate) fn alloc(&self) -> Result<Pfn, OutOfMemory> {
        let index = self.allocated.take_lowest().ok_or(OutOfMemory::Frames)?;
        let frame = &self.frames[index];
        frame.generation.fetch_add(1, Ordering::SeqCst);
        frame.exclusive.store(false, Ordering::SeqCst);
        frame.dirty.store(false, Ordering::SeqCst);
        frame.lazyfree.store(false, Ordering::SeqCst);
        frame.anon_vma.store(0, Ordering::SeqCst);
        frame.file.store(false, Ordering::SeqCst);
        let before = frame.refcount.swap(1, Ordering::SeqCst);
        assert_eq!(before, 0, "pfn {index} was on the free list with references");
        Ok(Pfn(index as u64))
    }

    /// As [`Frames::alloc`], zero filled.
    pub(crate) fn alloc_zeroed(&self) -> Result<Pfn, OutOfMemory> {
        let pfn = self.alloc()?;
        for word in self.words_of(pfn) {
            word.store(0, Ordering::SeqCst);
        }
        Ok(pfn)
    }

    /// The same, not anonymous and of no file in particular.
    pub(crate) fn alloc_file_zeroed(&self) -> Result<Pfn, OutOfMemory> {
        let pfn = self.alloc_zeroed()?;
        self.set_mapping(pfn, 0, 0);
        Ok(pfn)
    }

    /// Copies the contents of `from`, on which the caller holds a reference, into a frame that nobody sees yet
    /// (copy_user_highpage).
    pub(crate) fn copy_contents(&self, to: Pfn, from: Pfn) {
        for (to, from) in self.words_of(to).iter().zip(self.words_of(from)) {
            to.store(from.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }

    /// Adds `n` references to a frame that the caller knows to be held (folio_ref_add).
    pub(crate) fn get(&self, pfn: Pfn, n: u32) {
        let before = self.frame(pfn).refcount.fetch_add(n, Ordering::SeqCst);
        assert_ne!(before, 0, "{pfn:?}: reference taken on a free frame");
    }

    /// Adds `n` references unless the frame is free (folio_try_get, for walkers without a lock).
    pub(crate) fn try_get(&self, pfn: Pfn, n: u32) -> bool {
        let refcount = &self.frame(pfn).refcount;
        let mut seen = refcount.load(Ordering::SeqCst);
        while seen != 0 {
            match refcount.compare_exchange(seen, seen + n, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Drops `n` references; the last one poisons and frees the frame (folio_put_refs).
    ///
    /// # Panics
    /// If more is dropped than was taken, or the frame is freed while mapped: a bug in softmm.
    pub(crate) fn put(&self, pfn: Pfn, n: u32) {
        let frame = self.frame(pfn);
        let before = frame.refcount.fetch_sub(n, Ordering::SeqCst);
        if before < n {
            bug(format_args!("{pfn:?}: {n} references dropped of {before}"));
        } else if before == n {
            self.free_frozen(pfn);
        }
    }

    /// Frees a frame that has no reference left.
    ///
    /// # Panics
    /// As [`Frames::put`].
    pub(crate) fn free_frozen(&self, pfn: Pfn) {
        let frame = self.frame(pfn);
        let mapcount = frame.mapcount.load(Ordering::SeqCst);
        let swap = frame.swap.load(Ordering::SeqCst);
        if pfn == ZERO_PAGE || mapcount != 0 || swap != 0 {
            return bug(format_args!("{pfn:?} freed while mapped by {mapcount}, swap cache {swap}"));
        }
        for word in self.words_of(pfn) {
            word.store(POISON, Ordering::SeqCst);
        }
        self.allocated.give_back(index_of(pfn));
    }

    /// One more pte maps the frame.
    pub(crate) fn add_rmap(&self, pfn: Pfn) {
        self.frame(pfn).mapcount.fetch_add(1, Ordering::SeqCst);
    }

    /// One pte less maps the frame. The reference of that mapping is the caller's to drop.
    pub(crate) fn remove_rmap(&self, pfn: Pfn) {
        let before = self.frame(pfn).mapcount.fetch_sub(1, Ordering::SeqCst);
        assert_ne!(before, 0, "{pfn:?}: unmapped more often than mapped");
    }

    /// A reference that is dropped with the guard.
    pub(crate) fn hold(&self, pfn: Pfn) -> Held<'_> {
        self.get(pfn, 1);
        Held { frames: self, pfn }
    }

    pub(crate) fn set_exclusive(&self, pfn: Pfn, exclusive: bool) {
        self.frame(pfn).exclusive.store(exclusive, Ordering::SeqCst);
    }

    /// PageAnonExclusive.
    pub fn exclusive(&self, pfn: Pfn) -> bool {
        self.frame(pfn).exclusive.load(Ordering::SeqCst)
    }

    pub(crate) fn set_dirty(&self, pfn: Pfn) {
        self.frame(pfn).dirty.store(true, Ordering::SeqCst);
    }

    pub(crate) fn set_lazyfree(&self, pfn: Pfn, lazyfree: bool) {
        self.frame(pfn).lazyfree.store(lazyfree, Ordering::SeqCst);
    }

    /// MADV_FREE was the last word on the page: reclaim need not write it (anonymous and not swapbacked).
    pub fn is_lazyfree(&self, pfn: Pfn) -> bool {
        self.frame(pfn).lazyfree.load(Ordering::SeqCst)
    }

    /// Do two pages hold the same (pages_identical)?
    pub(crate) fn identical(&self, a: Pfn, b: Pfn) -> bool {
        let same = |(a, b): (&AtomicU64, &AtomicU64)| a.load(Ordering::SeqCst) == b.load(Ordering::SeqCst);
        self.words_of(a).iter().zip(self.words_of(b)).all(same)
    }

    /// Has the frame been dirtied by a pin or by a pte that is gone?
    pub fn dirty(&self, pfn: Pfn) -> bool {
        self.frame(pfn).dirty.load(Ordering::SeqCst)
    }

    pub(crate) fn clear_dirty(&self, pfn: Pfn) -> bool {
        self.frame(pfn).dirty.swap(false, Ordering::SeqCst)
    }

    /// lock_page. Only one at a time, but for who says otherwise with a subclass.
    pub(crate) fn lock_page(&self, cx: &mut MaySleep<'_>, pfn: Pfn) -> MutexGuard<'_, ()> {
        self.frame(pfn).lock.lock(cx)
    }

    /// trylock_page.
    pub(crate) fn trylock_page<C: Context + ?Sized>(
        &self,
        cx: &mut C,
        pfn: Pfn,
    ) -> Option<MutexGuard<'_, ()>> {
        self.frame(pfn).lock.try_lock(cx)
    }

    /// Takes the last `expected` references away from everyone at once, if these are all there are (folio_ref_freeze)
    /// and the page is clean then. Then [`Frames::free_frozen`].
    ///
    /// References first: who has pinned the page marks it dirty before it lets go, so whoever sees no reference left sees
    /// the mark (__remove_mapping).
    pub(crate) fn freeze(&self, pfn: Pfn, expected: u32) -> bool {
        let refcount = &self.frame(pfn).refcount;
        if refcount.compare_exchange(expected, 0, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return false;
        }
        let clean = !self.dirty(pfn);
        if !clean {
            refcount.store(expected, Ordering::SeqCst);
        }
        clean
    }

    /// May reclaim forget what is in a page that MADV_FREE has given up? Not if it was written since: then it is like any other
    /// again. The caller holds one reference.
    ///
    /// References first, as in [`Frames::freeze`].
    pub(crate) fn may_discard(&self, pfn: Pfn) -> bool {
        let unheld = self.refcount(pfn) == 1 + self.mapcount(pfn);
        if self.dirty(pfn) {
            self.set_lazyfree(pfn, false);
            return false;
        }
        unheld
    }

    /// What a frame holds, for who copies it away.
    pub(crate) fn contents(&self, pfn: Pfn) -> Box<[u64]> {
        self.words_of(pfn).iter().map(|word| word.load(Ordering::SeqCst)).collect()
    }

    /// write(2): one word of a page that the caller holds locked.
    pub(crate) fn store_word(&self, pfn: Pfn, word: usize, value: u64) {
        self.words_of(pfn)[word].store(value, Ordering::SeqCst);
    }

    /// Fills a frame that nobody sees yet.
    pub(crate) fn fill(&self, pfn: Pfn, contents: &[u64]) {
        for (word, value) in self.words_of(pfn).iter().zip(contents) {
            word.store(*value, Ordering::SeqCst);
        }
    }

    /// References held: mappings, FOLL_GET, and [`GUP_PIN_COUNTING_BIAS`] for each FOLL_PIN. 0 is free.
    pub fn refcount(&self, pfn: Pfn) -> u32 {
        self.frame(pfn).refcount.load(Ordering::SeqCst)
    }

    /// Ptes that map the frame.
    pub fn mapcount(&self, pfn: Pfn) -> u32 {
        self.frame(pfn).mapcount.load(Ordering::SeqCst)
    }

    /// folio_maybe_dma_pinned: no false negative, but 1024 FOLL_GET look like a pin.
    pub fn maybe_dma_pinned(&self, pfn: Pfn) -> bool {
        self.refcount(pfn) >= GUP_PIN_COUNTING_BIAS
    }

    fn frame(&self, pfn: Pfn) -> &Frame {
        &self.frames[index_of(pfn)]
    }

    fn words_of(&self, pfn: Pfn) -> &[AtomicU64] {
        &self.words[index_of(pfn) * self.words_per_page..][..self.words_per_page]
    }
}

/// A reference; see [`Frames::hold`].
pub(crate) struct Held<'f> {
    frames: &'f Frames,
    pfn: Pfn,
}

impl<'f> Held<'f> {
    /// Takes over a reference that the caller has.
    pub(crate) fn adopt(frames: &'f Frames, pfn: Pfn) -> Held<'f> {
        Held { frames, pfn }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.frames.put(self.pfn, 1);
    }
}

/// A rule of softmm's own is broken. Not while unwinding: an operation that was cut off halfway, as an exploration does
/// with the threads of an execution that has failed, leaves counts that its guards then find wrong.
fn bug(what: std::fmt::Arguments<'_>) {
    assert!(std::thread::panicking(), "{what}");
}

const fn index_of(pfn: Pfn) -> usize {
    pfn.0 as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_frame_is_poisoned_and_reused_first() {
        let frames = Frames::new(70, 2);
        let a = frames.alloc_zeroed().unwrap();
        let id = frames.id(a);
        frames.write(id, 1, 7).unwrap();
        assert_eq!(frames.read(id, 1), Ok(7));
        frames.get(a, GUP_PIN_COUNTING_BIAS);
        assert!(frames.maybe_dma_pinned(a));
        frames.put(a, 1);
        assert_eq!(frames.read(id, 1), Ok(7), "a pin keeps the frame");
        frames.put(a, GUP_PIN_COUNTING_BIAS);
        assert_eq!(frames.read(id, 1), Err(id.into()));
        assert!(!frames.try_get(a, 1));
        let b = frames.alloc().unwrap();
        assert_eq!(a, b);
        assert_eq!(frames.words_of(b)[1].load(Ordering::SeqCst), POISON);
        assert_eq!(frames.read(id, 1), Err(id.into()), "the next life is not the old one");
    }

    #[test]
    fn every_frame_is_handed_out_once() {
        let frames = Frames::new(70, 1);
        let mut all: Vec<_> = (0..70).map(|_| frames.alloc().unwrap()).collect();
        assert_eq!(frames.alloc(), Err(OutOfMemory::Frames));
        all.dedup();
        assert_eq!((all.len(), frames.free_frames()), (70, 0));
        assert!(!all.contains(&ZERO_PAGE));
    }

    #[test]
    #[should_panic(expected = "2 references dropped of 1")]
    fn dropping_too_much_is_a_bug() {
        let frames = Frames::new(1, 1);
        frames.put(frames.alloc().unwrap(), 2);
    }
}
