// SPDX-License-Identifier: MIT OR Apache-2.0
//! The paths of the mm as data: what each needs, and what it does to one page of a process.
//!
//! A path works on page [`X`]; KSM's second page is [`Y`]. CPU 1 runs it (CPU 0 is the driver's). Words of a page: 0 is the CPU's,
//! 1 the device's. Whatever a path does, it ends with the process using the page, where there still is one: a stale
//! translation is harmless until then.

use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::{PageAddr, Range};
use softmm::{File, FileKind, Machine, MapKind, Mm, MmUser, Placement, Prot};
use std::fmt;
use std::sync::Arc;

static USER: LockClass = LockClass::new("process");

/// The page that the device uses.
pub const X: u64 = 16;
/// The page beside it, with equal contents for KSM.
pub const Y: u64 = 17;

/// One page.
pub(crate) fn page(number: u64) -> PageAddr {
    PageAddr::new(number << 12).unwrap_or(Range::ALL.last_page())
}

/// The range of one page.
pub(crate) fn range(number: u64) -> Range {
    Range::page(page(number))
}

/// A process on a machine, and what a path leaves behind.
pub struct Stage {
    /// The machine.
    pub machine: Arc<Machine>,
    /// The address space.
    pub mm: Arc<Mm>,
    /// A file of one page.
    pub file: Arc<File>,
    /// The process; a path that ends it takes it.
    pub(crate) user: Mutex<Option<MmUser>>,
    /// Other processes, which end after everything.
    pub(crate) children: Mutex<Vec<MmUser>>,
}

impl Stage {
    pub(crate) fn new(machine: Arc<Machine>, user: MmUser, kind: FileKind) -> Stage {
        let file = machine.new_file(kind, 1);
        let children = Mutex::new(&USER, Vec::new());
        Stage { mm: (*user).clone(), machine, file, user: Mutex::new(&USER, Some(user)), children }
    }

    fn store(&self, cx: &mut MaySleep<'_>, page: u64, value: u64) {
        // It fails only if the process is gone or out of memory: nothing was stored then, which is no fault of a driver.
        let _ = self.machine.cpus()[1].store(cx, &self.mm, page << 12, value);
    }

    fn load(&self, cx: &mut MaySleep<'_>, page: u64) {
        let _ = self.machine.cpus()[1].load(cx, &self.mm, page << 12);
    }

    fn anonymous(&self, cx: &mut MaySleep<'_>) {
        let there = Range::new(X << 12, 2 << 12).unwrap_or(range(X));
        // The mm is empty: there is room.
        let _ = self.mm.mmap(cx, Placement::Fixed(there), Prot::ReadWrite);
    }

    fn filled(&self, cx: &mut MaySleep<'_>) {
        self.anonymous(cx);
        self.store(cx, X, 1);
    }

    fn of_file(&self, cx: &mut MaySleep<'_>, prot: Prot, kind: MapKind) {
        let _ = self.mm.mmap_file(cx, Placement::Fixed(range(X)), prot, &self.file, 0, kind);
    }

    fn fork(&self, cx: &mut MaySleep<'_>) {
        if let Ok(child) = self.mm.fork(cx) {
            self.children.lock(cx).push(child);
        }
    }

    fn child_stores(&self, cx: &mut MaySleep<'_>, value: u64) {
        let child = self.children.lock(cx).first().map(|child| (**child).clone());
        if let Some(child) = child {
            let _ = self.machine.cpus()[1].store(cx, &child, X << 12, value);
        }
    }

    fn mergeable(&self, cx: &mut MaySleep<'_>, x: u64, y: u64) {
        self.anonymous(cx);
        self.store(cx, X, x);
        self.store(cx, Y, y);
        let there = Range::new(X << 12, 2 << 12).unwrap_or(range(X));
        let _ = self.mm.madvise_mergeable(cx, there, true);
    }

    fn merge(&self, cx: &mut MaySleep<'_>) {
        self.machine.ksm_merge(cx, (&self.mm, page(Y)), (&self.mm, page(X)));
    }

    fn swap_out(&self, cx: &mut MaySleep<'_>) {
        if let Some((frame, _)) = crate::oracle::mapped(&self.mm, page(X)) {
            self.machine.reclaim_page(cx, frame, true);
        }
    }
}

/// What is run on a stage.
pub type Step = fn(&mut MaySleep<'_>, &Stage);

/// One path.
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
    /// Before the driver binds the page.
    pub prepare: Step,
    /// After the device has used it once.
    pub bound: Step,
    /// The path itself.
    pub run: Step,
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Path").field("name", &self.name).field("kernel", &self.kernel).finish()
    }
}

const ANON: Path = Path {
    name: "",
    kernel: "",
    file: FileKind::Regular,
    explicit: false,
    leaves_memory: true,
    prepare: |cx, s| s.filled(cx),
    bound: |_, _| {},
    run: |_, _| {},
};

/// Every path.
pub static PATHS: &[Path] = &[
    Path {
        name: "cow",
        kernel: "do_wp_page after fork",
        prepare: |cx, s| {
            s.filled(cx);
            s.fork(cx);
        },
        run: |cx, s| {
            s.store(cx, X, 2);
            s.child_stores(cx, 3);
        },
        ..ANON
    },
    Path {
        name: "cow-zero",
        kernel: "do_wp_page on the zero page",
        prepare: |cx, s| {
            s.anonymous(cx);
            s.load(cx, X);
        },
        run: |cx, s| s.store(cx, X, 2),
        ..ANON
    },
    Path {
        name: "cow-file",
        kernel: "do_wp_page on a private file page",
        prepare: |cx, s| {
            s.of_file(cx, Prot::ReadWrite, MapKind::Private);
            s.load(cx, X);
        },
        run: |cx, s| s.store(cx, X, 2),
        ..ANON
    },
    Path {
        name: "fork",
        kernel: "copy_page_range, then do_wp_page",
        run: |cx, s| {
            s.fork(cx);
            s.store(cx, X, 2);
            s.child_stores(cx, 3);
        },
        ..ANON
    },
    Path {
        name: "ksm-protect",
        kernel: "write_protect_page, contents differ",
        prepare: |cx, s| s.mergeable(cx, 1, 7),
        run: |cx, s| {
            s.merge(cx);
            s.store(cx, X, 2);
        },
        ..ANON
    },
    Path {
        name: "ksm-replace",
        kernel: "replace_page, then do_wp_page",
        prepare: |cx, s| s.mergeable(cx, 1, 1),
        run: |cx, s| {
            s.merge(cx);
            s.store(cx, X, 2);
        },
        ..ANON
    },
    Path {
        name: "ksm-clean",
        kernel: "replace_page of a page that is read-only and clean",
        prepare: |cx, s| s.mergeable(cx, 1, 1),
        bound: |cx, s| {
            s.swap_out(cx);
            s.load(cx, X);
        },
        run: |cx, s| {
            s.merge(cx);
            s.store(cx, X, 2);
        },
        ..ANON
    },
    Path {
        name: "swap-out",
        kernel: "try_to_unmap, then do_swap_page",
        run: |cx, s| {
            s.swap_out(cx);
            s.store(cx, X, 2);
        },
        ..ANON
    },
    Path {
        name: "munmap",
        kernel: "unmap_region, and a new mapping there",
        explicit: true,
        run: |cx, s| {
            s.mm.munmap(cx, range(X));
            let _ = s.mm.mmap(cx, Placement::FixedNoReplace(range(X)), Prot::ReadWrite);
            s.store(cx, X, 2);
        },
        ..ANON
    },
    Path {
        name: "dontneed",
        kernel: "zap_page_range (MADV_DONTNEED), then a fault",
        explicit: true,
        run: |cx, s| {
            let _ = s.mm.madvise_dontneed(cx, range(X));
            s.store(cx, X, 2);
        },
        ..ANON
    },
    Path {
        name: "mprotect",
        kernel: "change_protection, and back",
        run: |cx, s| {
            let _ = s.mm.mprotect(cx, range(X), Prot::Read);
            let _ = s.mm.mprotect(cx, range(X), Prot::ReadWrite);
            s.store(cx, X, 2);
        },
        ..ANON
    },
    Path {
        name: "writeback",
        kernel: "page_mkclean of a shared file page",
        prepare: |cx, s| {
            s.of_file(cx, Prot::ReadWrite, MapKind::Shared);
            s.store(cx, X, 1);
        },
        run: |cx, s| {
            s.file.fsync(cx);
            s.store(cx, X, 2);
        },
        ..ANON
    },
    Path {
        name: "truncate",
        kernel: "unmap_mapping_range of a shared file page",
        explicit: true,
        leaves_memory: false,
        prepare: |cx, s| {
            s.of_file(cx, Prot::ReadWrite, MapKind::Shared);
            s.store(cx, X, 1);
        },
        run: |cx, s| {
            let _ = s.file.truncate(cx, 0);
        },
        ..ANON
    },
    Path {
        name: "exit",
        kernel: "exit_mmap",
        explicit: true,
        leaves_memory: false,
        run: |cx, s| {
            let user = s.user.lock(cx).take();
            if let Some(user) = user {
                user.mmput(cx);
            }
        },
        ..ANON
    },
    Path {
        name: "oom-reap",
        kernel: "__oom_reap_task_mm",
        explicit: true,
        leaves_memory: false,
        run: |cx, s| {
            s.mm.oom_reap(cx);
        },
        ..ANON
    },
    Path {
        name: "uprobe-remove",
        kernel: "uprobe_unregister over memory that was made writable",
        prepare: |cx, s| {
            s.of_file(cx, Prot::Read, MapKind::Private);
            s.load(cx, X);
            let _ = s.file.uprobe_register(cx, 0, 0);
            let _ = s.mm.mprotect(cx, range(X), Prot::ReadWrite);
        },
        run: |cx, s| {
            let _ = s.file.uprobe_unregister(cx, 0, 0);
        },
        ..ANON
    },
    Path {
        name: "uprobe-insert",
        kernel: "uprobe_register, install_breakpoint",
        prepare: |cx, s| {
            s.of_file(cx, Prot::Read, MapKind::Private);
            s.load(cx, X);
        },
        run: |cx, s| {
            let _ = s.file.uprobe_register(cx, 0, 0);
        },
        ..ANON
    },
];

/// The path called `name`.
pub fn named(name: &str) -> Option<&'static Path> {
    PATHS.iter().find(|path| path.name == name)
}
