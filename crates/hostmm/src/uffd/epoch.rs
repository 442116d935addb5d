// SPDX-License-Identifier: MIT OR Apache-2.0
//! The word that every check loads.
//!
//! It is even while nothing is being applied, odd from before the monitor reads an event until it has marked every
//! watch that the event concerns. Two values stand for themselves: [`FORKED`], because the word lives on a page of
//! its own that the kernel wipes in a forked child (MADV_WIPEONFORK, since 4.14, raw clone(2) included), and
//! [`CLOSED`], which the monitor leaves behind. Neither is ever a value that a caller holds as a sequence.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use crate::sys::wipe::{WipePage, WipeWord};

/// This process is a forked child of the one that opened the source.
pub(super) const FORKED: u64 = 0;
/// The monitor is gone: nothing will be heard any more.
pub(super) const CLOSED: u64 = 1;
/// The first even value.
const FIRST: u64 = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Epoch {
    page: WipePage,
}

impl Epoch {
    pub(super) fn new() -> io::Result<Epoch> {
        let epoch = Epoch { page: WipePage::new()? };
        epoch.word().store(FIRST, Ordering::SeqCst);
        Ok(epoch)
    }

    fn word(&self) -> &WipeWord {
        &self.page.words()[0]
    }

    pub(super) fn as_word(&self) -> Word {
        Word(NonNull::from(self.word()))
    }

    /// The present value. Even and the same as before: nothing has been read from the kernel in between.
    #[inline]
    pub(super) fn load(&self) -> u64 {
        self.word().load(Ordering::Acquire)
    }

    /// The present value, if the monitor is neither busy nor gone and this is no forked child.
    #[inline]
    pub(super) fn load_even(&self) -> Option<u64> {
        match self.load() {
            FORKED | CLOSED => None,
            epoch => epoch.is_multiple_of(2).then_some(epoch),
        }
    }

    /// Monitor only: busy, before the read that lets an unmapper go. The even value that will follow.
    pub(super) fn begin(&self) -> u64 {
        // SeqCst on both sides of a system call: the store is visible before the unmapper can return from its call.
        self.word().fetch_add(1, Ordering::SeqCst) + 2
    }

    /// Monitor only: every mark made since [`Epoch::begin`] is visible to whoever loads `even`.
    pub(super) fn end(&self, even: u64) {
        self.word().store(even, Ordering::SeqCst);
    }

    /// For good.
    pub(super) fn close(&self) {
        self.word().store(CLOSED, Ordering::SeqCst);
    }
}

/// The word, one load away. The holder keeps the [`Epoch`] alive.
#[derive(Clone, Copy)]
pub(super) struct Word(NonNull<WipeWord>);

// SAFETY: only reached through an atomic.
unsafe impl Send for Word {}
// SAFETY: as above.
unsafe impl Sync for Word {}

impl Word {
    /// # Safety
    /// The [`Epoch`] that this came from has not been dropped.
    #[inline]
    pub(super) unsafe fn load(self) -> u64 {
        // SAFETY: the page is mapped until the epoch is dropped.
        unsafe { self.0.as_ref() }.load(Ordering::Acquire)
    }
}
