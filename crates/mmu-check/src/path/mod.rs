// SPDX-License-Identifier: MIT OR Apache-2.0
//! The paths of the mm as data: what each needs, and what it does to the memory of a process. One family, one file.
//!
//! A path works on page [`X`]; KSM's second page is [`Y`]. Words of a page: 0 is the CPU's, 1 the device's. CPU 0 is the
//! driver's, CPU 1 the path's, CPU 2 that of another thread of the process, where there is one. Whatever a path does, it ends
//! with the process using the page, where there still is one: a stale translation is harmless until then.
//!
//! [`PATHS`] are those of the table. The others ([`MORE`]) set up what one bug needs and would be a second column for
//! the same kernel function.

mod cow;
mod exit;
mod file;
mod ksm;
mod mapping;
mod stage;
mod swap;
mod uprobe;
mod variants;

pub use stage::Stage;
pub(crate) use stage::{page, range};
pub use variants::VARIANTS;

use interleave::MaySleep;
use softmm::FileKind;
use std::fmt;

/// The page that the device uses.
pub const X: u64 = 16;
/// The page beside it, with equal contents for KSM.
pub const Y: u64 = 17;

/// What is run on a stage.
pub type Step = fn(&mut MaySleep<'_>, &Stage);

/// What the device's user does while the path runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Uses the page, which has been bound and used before.
    Uses,
    /// Binds the page and uses it.
    Binds,
    /// Uses the page and takes the binding away.
    Unbinds,
    /// Closes the driver.
    Closes,
}

/// One path.
#[derive(Clone, Copy)]
pub struct Path {
    /// For tables and the command line.
    pub name: &'static str,
    /// The kernel's function.
    pub kernel: &'static str,
    /// What the file is, where one is mapped.
    pub file: FileKind,
    /// The program itself gives the memory up.
    pub explicit: bool,
    /// The process can use the page afterwards.
    pub leaves_memory: bool,
    /// The process may write the page.
    pub writable: bool,
    /// Pages that the device binds, from [`X`] on.
    pub pages: u64,
    /// What the device's user does meanwhile.
    pub user: User,
    /// Before the driver binds the page.
    pub prepare: Step,
    /// After the device has used it once.
    pub bound: Step,
    /// The path itself.
    pub run: Step,
    /// What another thread of the process does meanwhile.
    pub other: Option<Step>,
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Path").field("name", &self.name).field("kernel", &self.kernel).finish()
    }
}

/// One page of private anonymous memory, written once.
const ANON: Path = Path {
    name: "",
    kernel: "",
    file: FileKind::Regular,
    explicit: false,
    leaves_memory: true,
    writable: true,
    pages: 1,
    user: User::Uses,
    prepare: |cx, s| s.filled(cx),
    bound: |_, _| {},
    run: |_, _| {},
    other: None,
};

/// A thread of the process that stores through whatever is mapped by then, without a fault.
const STORES: Option<Step> = Some(|cx, s| s.store_if_writable(cx, 9));

/// Every path of the table.
pub static PATHS: &[Path] = &[
    cow::AFTER_FORK,
    cow::ZERO,
    cow::FILE,
    cow::IN_FLIGHT,
    cow::FORK,
    ksm::PROTECT,
    ksm::REPLACE,
    ksm::SECOND_PASS,
    ksm::CLEAN,
    swap::OUT,
    swap::AGE,
    mapping::MUNMAP,
    mapping::DONTNEED,
    mapping::MREMAP,
    mapping::MPROTECT,
    file::WRITEBACK,
    file::RECLAIM,
    file::TRUNCATE,
    file::XIP,
    exit::EXIT,
    exit::OOM_REAP,
    uprobe::REMOVE,
    uprobe::INSERT,
];

/// Paths that only the corpus needs.
pub static MORE: &[Path] = &[
    cow::OTHER_WAY,
    cow::FORK_IDLE,
    swap::READ_BACK,
    swap::PINNED_LATE,
    swap::OUT_UNBIND,
    file::WRITEBACK_ALONE,
    mapping::DONTNEED_TWO,
    mapping::UNBIND,
    mapping::FORCED,
    exit::LAST_OBJECT,
    exit::CLOSE,
];

/// The path called `name`.
pub fn named(name: &str) -> Option<&'static Path> {
    PATHS.iter().chain(MORE).chain(VARIANTS).find(|path| path.name == name)
}
