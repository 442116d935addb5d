// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every way in which Linux changes memory underneath a program, done to this process's own memory.
//!
//! An [`Event`] is one such way: `setup` maps memory and fills it with a stamp, [`Scene::disturb`] makes the change
//! and nothing else, and the [`Scene`] says what the CPU must see afterwards. What two kinds of device that are
//! told nothing will see is declared beforehand in [`Expect`]; `tests/disturb.rs` holds every declaration against the
//! kernel it runs on. One family of events, one file.
//!
//! Invariants:
//! * a scene touches only addresses that it mapped itself, and puts back on drop what it changed of the machine;
//! * after a disturbance the page frame at the watched address is never the old one by accident: the freed frame is
//!   allocated elsewhere first, or is not freed yet (`mem::Plug`), so comparing page frame numbers is an exact oracle;
//! * settings of the machine (KSM, swap) are held only while a change needs them, never between set-up and
//!   disturbance, so two scenes of one process cannot wait for each other.
//!
//! Scenes of one process may live side by side, but are disturbed one at a time. No lock is held here.

mod brk;
mod exit;
mod file;
mod fork;
mod guard;
mod ksm;
mod madvise;
mod mem;
mod migrate;
mod mprotect;
mod mremap;
mod munmap;
mod need;
mod observer;
mod process;
mod raw;
mod reclaim;
mod remap_file_pages;
mod scene;
mod sysv;
mod thp;
mod uprobe;
mod zero_page;

use std::fmt;
use std::io;

use mmu_notifier::Range;

use crate::page::PageError;

pub use need::Need;
pub use observer::{Observer, Sighting};
pub use scene::{After, Arena, Change, Scene};

/// Who makes the change, and through which door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// This process, through the C library: a library that patches libc sees it.
    Libc,
    /// This process, with the `syscall` instruction itself: nothing in user space sees it.
    RawSyscall,
    /// This process, by touching memory: a page fault.
    Fault,
    /// A thread of the kernel.
    KernelThread,
    /// Another process.
    OtherProcess,
}

/// What a device that is told nothing finds at its next use of the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It works on a page that is not the one at the program's address any more, or where the program has none that
    /// it may read.
    Stale,
    /// It reads what the program reads, but its right to write is gone: its write is lost, forbidden, or not counted
    /// as dirty.
    WriteStale,
    /// It works on the program's page with the program's rights.
    Coherent,
    /// With the page given to the device this change does not happen: the kernel refuses it, or giving the page did
    /// it already (pinning for writing breaks copy-on-write).
    Prevented,
    /// Such a device cannot be given this memory.
    NotMappable,
}

impl Outcome {
    /// Must the control, a device without any notifier, be caught with wrong bytes or a wrong page?
    #[must_use]
    pub const fn is_stale(self) -> bool {
        matches!(self, Outcome::Stale)
    }
}

/// What is declared about an event before it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expect {
    /// A device that pinned the page for long and for writing (`FOLL_PIN | FOLL_LONGTERM | FOLL_WRITE`, as an
    /// io_uring fixed buffer does).
    pub pinned: Outcome,
    /// A device that took no pin and keeps the page frame number from the time of mapping, as a device page table
    /// does.
    pub unpinned: Outcome,
    /// Does userfaultfd send an event about [`Scene::changed`]?
    pub uffd_delivers: bool,
    /// Do the kernel's MMU notifiers report [`Scene::changed`]?
    pub kvm_delivers: bool,
    /// Why, in one line.
    pub why: &'static str,
}

/// One way in which Linux changes memory underneath a program.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// Stable name, such as `madv_dontneed/raw`.
    pub name: &'static str,
    /// The path inside the kernel, for whoever wants to read it there (names as of 6.18).
    pub kernel_path: &'static str,
    /// Who does it.
    pub via: Via,
    /// What the machine must offer.
    pub needs: &'static [Need],
    /// What is declared beforehand.
    pub expect: Expect,
    setup: fn(&mut Arena, Via) -> Result<Scene, DisturbError>,
}

impl Event {
    const fn new(
        name: &'static str,
        kernel_path: &'static str,
        via: Via,
        setup: fn(&mut Arena, Via) -> Result<Scene, DisturbError>,
    ) -> Event {
        let expect = Expect {
            pinned: Outcome::Stale,
            unpinned: Outcome::Stale,
            uffd_delivers: false,
            kvm_delivers: true,
            why: "",
        };
        Event { name, kernel_path, via, needs: &[], expect, setup }
    }

    const fn needs(mut self, needs: &'static [Need]) -> Event {
        self.needs = needs;
        self
    }

    const fn expect(mut self, pinned: Outcome, unpinned: Outcome, why: &'static str) -> Event {
        self.expect.pinned = pinned;
        self.expect.unpinned = unpinned;
        self.expect.why = why;
        self
    }

    const fn uffd(mut self) -> Event {
        self.expect.uffd_delivers = true;
        self
    }

    const fn not_kvm(mut self) -> Event {
        self.expect.kvm_delivers = false;
        self
    }

    /// Map the memory, fill it, and make it fit for a device: the watched page is present, and writable where
    /// [`Expect::pinned`] is anything but [`Outcome::NotMappable`].
    ///
    /// Where the pin excludes the change ([`Outcome::Prevented`]) each device needs a scene of its own: call this
    /// once for each. May sleep, up to some seconds where a kernel thread has work to do first.
    ///
    /// # Errors
    /// [`DisturbError`], with everything already undone.
    pub fn setup(&self, arena: &mut Arena) -> Result<Scene, DisturbError> {
        (self.setup)(arena, self.via)
    }
}

/// Why an event could not be set up or did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DisturbError {
    /// A system call failed.
    #[error("{what}{}: {source}", range.map_or(String::new(), |range| format!(" on {range}")))]
    Call {
        /// The system call or file.
        what: &'static str,
        /// The memory that it was about.
        range: Option<Range>,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel was asked and had time, and the change did not happen.
    #[error("{what} did not happen within {millis} ms on {range}: the machine may be too busy, try again")]
    Timeout {
        /// The change.
        what: &'static str,
        /// The watched memory.
        range: Range,
        /// How long it was given, in milliseconds.
        millis: u128,
    },
    /// Somebody else moved the program break between set-up and change.
    #[error(
        "the program break moved from {ours:#x} to {now:#x} since set-up (an allocation grew the heap): set up again"
    )]
    BreakMoved {
        /// Where set-up left it.
        ours: u64,
        /// Where it is.
        now: u64,
    },
    /// Whether the page moved cannot be told.
    #[error(transparent)]
    Page(#[from] PageError),
    /// Page frame numbers read as 0.
    #[error(
        "/proc/self/pagemap hides page frame numbers, so whether the page moved cannot be told: needs CAP_SYS_ADMIN"
    )]
    HiddenFrames,
    /// A [`Scene`] can be disturbed once.
    #[error("this scene was disturbed already: set up a new one")]
    Spent,
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Via::Libc => "libc",
            Via::RawSyscall => "raw system call",
            Via::Fault => "page fault",
            Via::KernelThread => "kernel thread",
            Via::OtherProcess => "other process",
        })
    }
}

/// The same event by libc and by the bare system call.
macro_rules! both {
    ($name:literal, $path:literal, $setup:expr, |$e:ident| $with:expr) => {
        [
            {
                let $e = Event::new(concat!($name, "/libc"), $path, Via::Libc, $setup);
                $with
            },
            {
                let $e = Event::new(concat!($name, "/raw"), $path, Via::RawSyscall, $setup);
                $with
            },
        ]
    };
}
use both;

/// Every event, family by family, in the order in which a table prints them.
#[must_use]
pub fn catalogue() -> Vec<&'static Event> {
    let families: [&'static [&'static [Event]]; 17] = [
        munmap::EVENTS,
        brk::EVENTS,
        mremap::EVENTS,
        madvise::EVENTS,
        reclaim::EVENTS,
        guard::EVENTS,
        mprotect::EVENTS,
        fork::EVENTS,
        zero_page::EVENTS,
        file::EVENTS,
        ksm::EVENTS,
        uprobe::EVENTS,
        migrate::EVENTS,
        thp::EVENTS,
        sysv::EVENTS,
        remap_file_pages::EVENTS,
        exit::EVENTS,
    ];
    families.into_iter().flatten().flat_map(|events| events.iter()).collect()
}
