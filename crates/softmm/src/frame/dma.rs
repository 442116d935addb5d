// SPDX-License-Identifier: MIT OR Apache-2.0
//! Access by devices, which know a frame by its number and hold no reference: each says which life of the frame it means, and
//! is told if that is over.

use super::{Frames, ZERO_PAGE};
use interleave::{Digest, Ordering};
use mmu_notifier::Pfn;

/// One life of a frame: its number and how often it had been allocated. What a device's page table holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameId {
    /// The frame.
    pub pfn: Pfn,
    /// Which of its lives.
    pub generation: u64,
}

impl Digest for FrameId {
    fn digest(&self) -> u64 {
        (self.pfn.0, self.generation).digest()
    }
}

/// Access to a frame that is free, or has been freed and given to somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{pfn:?} was freed: its {generation}th life is over, so whoever used it missed an invalidation or a reference"
)]
pub struct FrameFreed {
    /// The frame.
    pub pfn: Pfn,
    /// The life that the user of the frame had in mind.
    pub generation: u64,
}

impl From<FrameId> for FrameFreed {
    fn from(id: FrameId) -> FrameFreed {
        FrameFreed { pfn: id.pfn, generation: id.generation }
    }
}

impl Frames {
    /// The present life of `pfn`.
    pub fn id(&self, pfn: Pfn) -> FrameId {
        FrameId { pfn, generation: self.frame(pfn).generation.load(Ordering::SeqCst) }
    }

    /// Is this life of the frame still going on?
    pub fn is_live(&self, id: FrameId) -> bool {
        self.id(id.pfn) == id && self.refcount(id.pfn) != 0
    }

    /// What a device reads from word `word` of the frame.
    ///
    /// # Errors
    /// [`FrameFreed`] if that life of the frame was over before or at the end of the access.
    ///
    /// # Panics
    /// If `word` is not below [`Frames::words_per_page`].
    pub fn read(&self, id: FrameId, word: usize) -> Result<u64, FrameFreed> {
        let value = self.words_of(id.pfn)[word].load(Ordering::SeqCst);
        if self.is_live(id) { Ok(value) } else { Err(id.into()) }
    }

    /// A device writes word `word` of the frame. The write lands wherever the frame number leads, as DMA does; it
    /// is not made when the life is known to be over.
    ///
    /// # Errors
    /// As [`Frames::read`].
    ///
    /// # Panics
    /// As [`Frames::read`].
    pub fn write(&self, id: FrameId, word: usize, value: u64) -> Result<(), FrameFreed> {
        if !self.is_live(id) {
            return Err(id.into());
        }
        self.words_of(id.pfn)[word].store(value, Ordering::SeqCst);
        if self.is_live(id) { Ok(()) } else { Err(id.into()) }
    }

    /// set_page_dirty by a driver that mirrors the page and has no reference on it, before it lets go of the mapping.
    ///
    /// # Errors
    /// [`FrameFreed`] if that life of the frame is over: the driver let go too late.
    pub fn mark_dirty(&self, id: FrameId) -> Result<(), FrameFreed> {
        if !self.is_live(id) {
            return Err(id.into());
        }
        if id.pfn != ZERO_PAGE {
            self.set_dirty(id.pfn);
        }
        Ok(())
    }
}
