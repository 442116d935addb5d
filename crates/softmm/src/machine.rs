// SPDX-License-Identifier: MIT OR Apache-2.0
//! A machine: frames, page-table pages, CPUs and the kernel version that runs on it. Its mms share these and nothing
//! else. There is no global state: two machines do not know of each other, so that tests and explorations do not.

use crate::error::OutOfMemory;
use crate::fail::{Allocation, FailNth};
use crate::frame::Frames;
use crate::ksm::StableNodes;
use crate::mm::{Mm, MmUser};
use crate::page_table::Tables;
use crate::profile::KernelProfile;
use crate::rmap::AnonVmas;
use crate::swap::Swap;
use crate::tlb::Cpu;
use interleave::{AtomicU64, Digest, LockClass, Mutex, Ordering, RwLock};
use mmu_notifier::PAGE_SIZE;
use std::sync::Arc;

static DUP_MMAP_SEM: LockClass = LockClass::new("dup_mmap_sem");
static KSM_THREAD_MUTEX: LockClass = LockClass::new("ksm_thread_mutex");

/// How big a machine is. Small by default, so that rare paths (a full batch, no frame left) are common.
#[derive(Debug, Clone)]
pub struct Config {
    /// Page frames, the zero page not counted.
    pub frames: u32,
    /// Page-table pages. An mm needs four as soon as it maps a page.
    pub tables: u32,
    /// Pages that the swap area holds.
    pub swap_slots: u32,
    /// CPUs.
    pub cpus: usize,
    /// 64-bit words that a page stores, at its start: 1 to 512.
    pub words_per_page: usize,
    /// Pages that an mmu_gather holds before it flushes early. The kernel's is about 500 for each of up to 20
    /// batches.
    pub gather_batch: usize,
    /// Pages that a read fault on a file maps at most, if they are cached: a power of two, 1 for none but the one asked for
    /// (fault_around_bytes; 16 pages since 3.15).
    pub fault_around: u64,
    /// Which kernel this is.
    pub profile: KernelProfile,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            frames: 256,
            tables: 64,
            swap_slots: 64,
            cpus: 2,
            words_per_page: 8,
            gather_batch: 64,
            fault_around: 16,
            profile: KernelProfile::V6_18,
        }
    }
}

/// See the module.
pub struct Machine {
    config: Config,
    frames: Frames,
    tables: Tables,
    swap: Swap,
    anon_vmas: AnonVmas,
    ksm: Mutex<()>,
    stable_nodes: StableNodes,
    dup_mmap_sem: RwLock<()>,
    cpus: Box<[Cpu]>,
    next_id: AtomicU64,
}

impl Machine {
    /// A machine with all memory free. Numbers out of bounds are brought to the nearest sensible one: at least one
    /// CPU, one word and one page in a batch.
    pub fn new(config: Config) -> Arc<Machine> {
        let words = config.words_per_page.clamp(1, PAGE_SIZE as usize / 8);
        let config = Config { words_per_page: words, gather_batch: config.gather_batch.max(1), ..config };
        Arc::new(Machine {
            frames: Frames::new(config.frames, words),
            tables: Tables::new(config.tables),
            swap: Swap::new(config.swap_slots),
            anon_vmas: AnonVmas::new(),
            ksm: Mutex::with_digest(&KSM_THREAD_MUTEX, (), <()>::digest),
            stable_nodes: StableNodes::new(),
            dup_mmap_sem: RwLock::with_digest(&DUP_MMAP_SEM, (), <()>::digest),
            cpus: (0..config.cpus.max(1)).map(|_| Cpu::new()).collect(),
            next_id: AtomicU64::new(1),
            config,
        })
    }

    /// An empty address space with one user.
    ///
    /// # Errors
    /// [`OutOfMemory::Tables`] if there is no page for its top-level table.
    pub fn new_mm(self: &Arc<Machine>) -> Result<MmUser, OutOfMemory> {
        Mm::create(self)
    }

    /// How it was made.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its page frames.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }

    /// Its CPUs.
    pub fn cpus(&self) -> &[Cpu] {
        &self.cpus
    }

    /// Page-table pages in use. Exact only while nothing runs.
    pub fn tables_in_use(&self) -> usize {
        self.tables.in_use()
    }

    /// Makes the `n`th allocation of `what` from now (1 is the next) fail once, though there is enough. 0: none.
    pub fn fail_nth(&self, what: Allocation, n: u64) {
        self.failures(what).set(n);
    }

    /// Is the failure that was asked for still to come?
    pub fn failure_is_due(&self, what: Allocation) -> bool {
        self.failures(what).is_due()
    }

    fn failures(&self, what: Allocation) -> &FailNth {
        match what {
            Allocation::Frame => &self.frames.bitmap().fail,
            Allocation::Table => &self.tables.bitmap().fail,
            Allocation::SwapSlot => &self.swap.fail,
        }
    }

    /// The swap area and the swap cache.
    pub fn swap(&self) -> &Swap {
        &self.swap
    }

    pub(crate) fn anon_vmas(&self) -> &AnonVmas {
        &self.anon_vmas
    }

    pub(crate) fn stable_nodes(&self) -> &StableNodes {
        &self.stable_nodes
    }

    /// One ksmd at a time.
    pub(crate) fn ksm_thread_mutex(&self) -> &Mutex<()> {
        &self.ksm
    }

    /// Fork reads it, uprobes write it.
    pub(crate) fn dup_mmap_sem(&self) -> &RwLock<()> {
        &self.dup_mmap_sem
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The kernel that runs on it.
    pub fn profile(&self) -> &KernelProfile {
        &self.config.profile
    }

    /// A number never given before: names of mms and anon_vmas.
    pub(crate) fn fresh_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::SeqCst)
    }
}
