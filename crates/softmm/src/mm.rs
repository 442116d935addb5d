// SPDX-License-Identifier: MIT OR Apache-2.0
//! An address space: the kernel's `struct mm_struct` (v6.18).
//!
//! Lifetimes, as in the kernel: `mm_users` counts those who use the address space ([`MmUser`]; the last
//! [`MmUser::mmput`] tears it down); `mm_count` keeps the struct alive and is the count of the `Arc` here, which is
//! what a subscription or a device holds.
//!
//! The system calls are methods of [`Mm`], one file each: `mmap`, `munmap`, `fault`, `cow`, `fork`, `gup`, `exit`,
//! `oom`. All may sleep and none may be called from a notifier callback, which runs inside them.

use crate::error::OutOfMemory;
use crate::machine::Machine;
use crate::page_table::PageTable;
use crate::pte::Pte;
use crate::vma::VmaTree;
use interleave::{AtomicBool, AtomicU64, Digest, LockClass, MaySleep, Ordering, RefCount, RwLock};
use mmu_notifier::{NotifierSubscriptions, PageAddr, Range};
use std::sync::{Arc, Weak};

static MMAP_LOCK: LockClass = LockClass::new("mmap_lock");

/// Names an mm within its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MmId(u64);

impl MmId {
    pub(crate) const fn number(self) -> u64 {
        self.0
    }
}

/// See the module.
pub struct Mm {
    /// Immutable.
    id: MmId,
    /// Immutable.
    machine: Arc<Machine>,
    /// Itself, for who finds it by a page instead of by its owner (reverse maps). Immutable.
    this: Weak<Mm>,
    /// mmap_lock, and what it guards.
    pub(crate) vmas: RwLock<VmaTree>,
    /// Locks of its own; shape protected by mmap_lock and `page_table_lock`, ptes by their ptl.
    pub(crate) page_table: PageTable,
    /// Who hears the changes. Locks of its own.
    pub(crate) notifiers: Arc<NotifierSubscriptions>,
    /// mm_users.
    users: RefCount,
    /// MMF_HAS_PINNED: set before the first FOLL_PIN, never cleared.
    pub(crate) has_pinned: AtomicBool,
    /// Teardown has begun (mm_users is 0). Shared with subscriptions, which outlive the mm.
    pub(crate) exiting: Arc<AtomicBool>,
    /// MMF_UNSTABLE: the oom reaper has taken pages away; every later fault fails.
    pub(crate) unstable: AtomicBool,
    /// Odd while fork write-protects (5.11 and later): gup_fast pins are void if it moved. Written under mmap_lock for
    /// writing.
    pub(crate) write_protect_seq: AtomicU64,
}

impl Mm {
    pub(crate) fn create(machine: &Arc<Machine>) -> Result<MmUser, OutOfMemory> {
        let page_table = PageTable::new(machine.tables())?;
        let mm = Arc::new_cyclic(|this| Mm {
            id: MmId(machine.fresh_id()),
            page_table,
            this: this.clone(),
            machine: machine.clone(),
            vmas: RwLock::with_digest(&MMAP_LOCK, VmaTree::default(), VmaTree::digest),
            notifiers: NotifierSubscriptions::new(machine.profile().rules),
            users: RefCount::new(),
            has_pinned: AtomicBool::new(false),
            exiting: Arc::new(AtomicBool::new(false)),
            unstable: AtomicBool::new(false),
            write_protect_seq: AtomicU64::new(0),
        });
        Ok(MmUser { mm })
    }

    /// Its name.
    pub fn id(&self) -> MmId {
        self.id
    }

    /// Where it lives.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    pub(crate) fn machine_arc(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Keeps the struct, not the address space.
    pub(crate) fn weak(&self) -> &Weak<Mm> {
        &self.this
    }

    /// The callbacks that this mm fires; register list notifiers here.
    pub fn notifiers(&self) -> &Arc<NotifierSubscriptions> {
        &self.notifiers
    }

    /// mmget_not_zero: a user more, unless the address space is being torn down.
    pub fn mmget(self: &Arc<Mm>) -> Option<MmUser> {
        self.users.get_unless_zero().then(|| MmUser { mm: self.clone() })
    }

    /// The pte of `page`, read without a lock: for oracles and reports. What it says may be history at once.
    pub fn peek_pte(&self, page: PageAddr) -> Pte {
        self.page_table.peek(self.machine.tables(), page)
    }

    /// The ranges of the vmas, in order.
    pub fn vma_ranges(&self, cx: &mut MaySleep<'_>) -> Vec<Range> {
        self.vmas.read(cx).iter().map(|vma| vma.range).collect()
    }

    /// folio_needs_cow_for_dma: might a FOLL_PIN taken through this mm hold the frame? Stable while
    /// `write_protect_seq` is odd.
    pub(crate) fn maybe_pinned(&self, pfn: mmu_notifier::Pfn) -> bool {
        self.has_pinned.load(Ordering::SeqCst) && self.machine.frames().maybe_dma_pinned(pfn)
    }

    pub(crate) fn put_user(&self) -> bool {
        self.users.put()
    }
}

impl Drop for Mm {
    fn drop(&mut self) {
        self.page_table.destroy(self.machine.tables());
    }
}

/// A user of an address space (`mm_users`). Give it back with [`MmUser::mmput`]: one that is merely dropped keeps the
/// address space and all its memory for ever, as a leaked reference does in the kernel.
#[must_use]
pub struct MmUser {
    pub(crate) mm: Arc<Mm>,
}

impl std::ops::Deref for MmUser {
    type Target = Arc<Mm>;

    fn deref(&self) -> &Arc<Mm> {
        &self.mm
    }
}

impl MmUser {
    /// Gives the use back. The last one runs [`crate::exit`]: notifiers hear release, everything is unmapped.
    /// May sleep; must not be called with any lock held that a notifier callback takes.
    pub fn mmput(self, cx: &mut MaySleep<'_>) {
        if self.mm.put_user() {
            self.mm.exit_mmap(cx);
        }
    }
}
