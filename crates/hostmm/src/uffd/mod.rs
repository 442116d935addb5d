// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changes of this process's memory as userfaultfd reports them: no privilege, no module, no patched functions.
//!
//! What is heard: munmap, anything mapped over, mremap, and madvise that drops pages, by whatever way the system call
//! was made. What is not is listed in [`DEAF`]; whoever shares memory of those kinds needs another source.
//!
//! # Protocol
//! userfaultfd tells an unmapper's story late: the page table changes, `mmap_lock` is dropped, and only then does the
//! event lie ready for the monitor, while the unmapper sleeps until it has been *read*. In between the address can
//! already belong to another thread. So two things are needed:
//!
//! 1. The monitor makes the epoch odd, *then* reads (which frees the unmapper), marks the watches concerned, makes
//!    the epoch even. Whoever starts after an munmap has returned sees an odd epoch, or an even one with the marks.
//! 2. Whoever may have been handed an address by a thread that mapped it while another is still in munmap first
//!    *probes*: the kernel raises `mmap_changing` under `mmap_lock` before it touches the page table and lowers it
//!    after the event was dequeued, and refuses an ioctl with EAGAIN in between. A quiet probe followed by a look at
//!    the epoch therefore misses nothing. (The flag is a counter, and exact, since 5.15.)
//!
//! The epoch must be looked at after the probe, never before.
//!
//! MADV_DONTNEED and its like are announced *before* the pages go, and nothing says when they have gone: who pins
//! again between the two pins the old pages. [`Watch::snapshot`] does not close this gap.
//!
//! # Threads
//! `uffd-monitor` reads and marks; `uffd-callback` runs callbacks and frees memory. Both block all signals. The
//! source ends when its last handle and its last [`Watch`] are dropped.
//!
//! # Locks
//! `uffd_registrations` is the only one, and a leaf. Callbacks run without it, and the monitor takes no lock at all.
//! To the lock-class graph, `uffd_callback` is one more: the wait of whoever drops a watch for its running callback.
//!
//! # Kernels
//! Events 4.11, write-protect mode 5.7, unprivileged user mode 5.11, the strict probe 5.15, shmem and hugetlb 5.19,
//! /dev/userfaultfd 6.1, files and everything else (WP_ASYNC) 6.7. Nothing is ever write-protected, so no page fault
//! ever waits for the monitor.
mod callbacks;
mod deaf;
mod epoch;
mod error;
mod futex;
mod index;
mod monitor;
mod node;
mod open;
pub mod raced;
mod registrations;
mod shared;
mod watch;

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use interleave::{JoinHandle, MaySleep, Ordering};
use mmu_notifier::Range;

pub use deaf::{DEAF, Deaf};
pub use error::{Gone, OpenError, WatchError};
pub use node::Change;
pub use watch::{Quiet, Seq, Watch};

use shared::Shared;

/// How a source behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a check waits for an answer before it answers "changed". Default: one second, which a munmap of
    /// hundreds of GiB can exceed.
    pub patience: Duration,
    /// The most VMAs that the watches together may add. Default: half of vm.max_map_count.
    pub vma_budget: Option<usize>,
    /// Events read at a time, at least 1. A full batch is counted and loses nothing. Default: 256.
    pub batch: usize,
    /// Be content with a kernel before 5.15, and never ask for [`Watch::changed_since_strict`]. Default: no.
    pub ordered_only: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { patience: Duration::from_secs(1), vma_budget: None, batch: 256, ordered_only: false }
    }
}

/// What a source has seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Ranges unmapped or mapped over.
    pub unmaps: u64,
    /// Ranges moved.
    pub remaps: u64,
    /// Ranges whose pages were dropped.
    pub removes: u64,
    /// Times that there were at least as many events as a batch holds. Nothing is lost by it.
    pub full_batches: u64,
    /// Times that every watch was declared dead because something was not understood.
    pub lost: u64,
    /// Callbacks that panicked.
    pub callback_panics: u64,
    /// Strict checks that found a change in flight and waited for it.
    pub in_flight: u64,
    /// Checks that ran out of patience and answered "changed".
    pub gave_up: u64,
}

/// A fault of the monitor, for tests.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It panics.
    Panic,
    /// It ends as if the kernel had refused to let it read.
    Return,
    /// It meets something that it does not understand.
    Lose,
}

impl Fault {
    fn from_word(word: u32) -> Option<Fault> {
        match word {
            1 => Some(Fault::Panic),
            2 => Some(Fault::Return),
            3 => Some(Fault::Lose),
            _ => None,
        }
    }
}

/// One userfaultfd with its monitor. Cloning makes another handle to the same.
#[derive(Clone)]
pub struct UffdSource {
    core: Arc<Core>,
}

/// Lives as long as any handle or watch.
struct Core {
    shared: Arc<Shared>,
    threads: Option<(JoinHandle<()>, JoinHandle<()>)>,
    features: u64,
}

impl fmt::Debug for UffdSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UffdSource").field("alive", &self.core.shared.alive()).finish_non_exhaustive()
    }
}

impl UffdSource {
    /// Opens a userfaultfd, starts its threads, and makes sure that it works: an munmap of its own must be reported.
    ///
    /// # Errors
    /// [`OpenError`], which names what is missing and how to get it.
    pub fn open(options: &Options) -> Result<UffdSource, OpenError> {
        open::open(options)
    }

    /// Watches exactly the pages of `range`, whatever is mapped there, without a callback.
    ///
    /// The caller keeps them mapped until this returns.
    ///
    /// # Errors
    /// [`WatchError`]; then nothing is subscribed.
    pub fn watch(&self, range: Range) -> Result<Watch, WatchError> {
        Watch::new(&self.core, range, None)
    }

    /// The same, with a callback that runs on a thread of the source after each change, and may do as it likes:
    /// munmap, free, lock, drop the watch. It comes after the fact: what is cached is guarded by the checks of
    /// [`Watch`], not by the callback.
    ///
    /// # Errors
    /// As [`UffdSource::watch`].
    pub fn watch_with(
        &self,
        range: Range,
        callback: impl Fn(&Change) + Send + Sync + 'static,
    ) -> Result<Watch, WatchError> {
        Watch::new(&self.core, range, Some(Box::new(callback)))
    }

    /// One probe for many checks: the expensive half of [`Watch::changed_since_strict`].
    ///
    /// The answers of the returned value are right for memory that was mapped before this call.
    ///
    /// # Errors
    /// If nothing can be vouched for.
    pub fn probe(&self) -> Result<Quiet<'_>, Gone> {
        self.core.shared.quiet().map(|()| Quiet::new(&self.core))
    }

    /// The epoch, if no batch of events is being worked on: if it was loaded, then [`Watch::changed_since_ordered`]
    /// answered `false`, and later it is the same, then the answer is still `false`. `None` also when the source is gone,
    /// and in a forked child.
    #[inline]
    pub fn era(&self) -> Option<u64> {
        self.core.shared.epoch.load_even()
    }

    /// Whether files, secret memory and the like can be watched (WP_ASYNC, Linux 6.7).
    pub fn takes_files(&self) -> bool {
        self.core.features & crate::sys::uffd::WP_ASYNC != 0
    }

    /// Counters since the source was opened.
    pub fn stats(&self) -> Stats {
        self.core.shared.stats()
    }

    /// The kernel's name of the monitor thread, to set its priority or affinity.
    pub fn monitor_tid(&self) -> i32 {
        self.core.shared.monitor_tid.load(Ordering::Acquire).cast_signed()
    }

    /// The descriptor, for tests that take it away.
    #[doc(hidden)]
    pub fn raw_fd(&self) -> RawFd {
        self.core.shared.fd()
    }

    /// Makes the monitor fail. Does not wait for it.
    #[doc(hidden)]
    pub fn inject(&self, fault: Fault) {
        let word = match fault {
            Fault::Panic => 1,
            Fault::Return => 2,
            Fault::Lose => 3,
        };
        self.core.shared.fault.store(word, Ordering::Release);
        self.core.shared.wake_monitor();
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let Some((monitor, callbacks)) = self.threads.take() else { return };
        if self.shared.alive() == Err(Gone::Forked) {
            // The threads do not exist in this process; there is nothing to join or to detach.
            std::mem::forget((monitor, callbacks));
            return;
        }
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake_monitor();
        // In an atomic section nobody may wait: the threads then end by themselves, and own all that they touch.
        let _ = MaySleep::try_enter(|cx| {
            let _ = monitor.join(cx);
            // The last watch may have been dropped by its own callback.
            if !self.shared.is_callback_thread() {
                let _ = callbacks.join(cx);
            }
        });
    }
}
