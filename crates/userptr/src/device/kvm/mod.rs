// SPDX-License-Identifier: MIT OR Apache-2.0
//! A real secondary MMU: a guest whose page tables are the device's.
//!
//! KVM runs a guest of one processor. Its page tables are device page tables; what it executes is a command
//! processor of some two hundred instructions; its physical memory is windows of this process's memory. A command's
//! device address goes through two stages: the device's page tables, which [`KvmContext`] owns, and the program's own,
//! which KVM mirrors and keeps coherent with its mmu_notifier. So a mapping is never out of date: where the program
//! has unmapped the memory, the device faults ([`Hold::Coherent`](super::Hold)).
//!
//! ```text
//! program:  map, unmap, submit ──────> ring ──────> command processor (guest, CPL 3)
//!           wait <───── position <──────────────────┘   │ device page tables
//!                                                       v
//! processor's thread: KVM_RUN, idle, faults, kills      windows: memory of the program
//! ```
//!
//! * A mapping is of whole pages. The bytes beside a buffer in its first and last page are within the device's reach:
//!   whoever hands out device addresses checks commands against the buffer, as [`KvmBatch`] does, or owns the pages.
//! * What one batch wrote, the next one sees, of whichever context. The program sees it once the fence is signaled.
//! * A command that is executed for the first time on a page costs the host's work to mirror it, some microseconds.
//! * The guest can name no address of its own system memory: such commands fault before they start.
//! * Batches that fail are skipped to their end; others, of the same context too, go on.
//! * After fork the device serves the parent; the child gets errors.
//!
//! Lock order:
//!
//! ```text
//! kvm_device_mappings     of one context; held over updates of its page tables
//!   kvm_device_pool       tables; held until an update has been executed
//!     kvm_device_queue    what is in flight
//!       kvm_device_failure    of one batch
//!   kvm_device_windows
//! ```
//!
//! The processor's thread takes `kvm_device_queue`, what is below it, and `kvm_device_windows`.

mod blob;
mod borrow;
mod context;
mod encode;
mod error;
mod fence;
mod job;
mod layout;
mod memory;
mod ppgtt;
mod processor;
mod queue;
mod signal;
#[cfg(test)]
mod tests;
mod vm;
mod window;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use interleave::{AtomicBool, AtomicU32, JoinHandle, LockClass, MaySleep, Mutex, try_spawn};
use kvm_ioctls::Kvm;

use job::{Batch, Place, Slot};
use layout::{KERNEL_ROOT, Op, SPINS_MAX, SYSTEM};
use memory::SystemMemory;
use ppgtt::{Pool, Update};
use processor::Shared;
use queue::{JOB_SLOTS, Queue};
use window::Windows;

pub use borrow::{BatchError, KvmBatch};
pub use context::{KvmContext, KvmMapping, KvmPages};
pub use error::KvmError;
pub use fence::KvmFence;

static POOL: LockClass = LockClass::new("kvm_device_pool");

/// What the command processor does when it has nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    /// Gives the core back at once. The next submission has to enter the guest: tens of microseconds under nested
    /// virtualisation.
    Never,
    /// Looks for work for about this long first, at most for some 40 ms.
    For(Duration),
    /// Looks for work for ever: an empty command takes less than a microsecond, and one core is gone.
    Always,
}

impl Polling {
    /// A turn of the command processor's loop is a PAUSE, which takes some 40 to 140 cycles.
    const TURN: Duration = Duration::from_nanos(40);

    fn spins(self) -> u64 {
        match self {
            Polling::Never => 0,
            Polling::For(time) => (time.as_nanos() / Polling::TURN.as_nanos()).min(SPINS_MAX.into()) as u64,
            Polling::Always => u64::MAX,
        }
    }
}

impl Default for Polling {
    /// 50 us where there is a second core, else never.
    fn default() -> Polling {
        match std::thread::available_parallelism() {
            Ok(cores) if cores.get() > 1 => Polling::For(Duration::from_micros(50)),
            _ => Polling::Never,
        }
    }
}

/// The device. A handle; the device ends with the last handle and context.
#[derive(Clone, Debug)]
pub struct KvmDevice {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    pool: Mutex<Pool>,
    thread: Option<JoinHandle<()>>,
}

impl KvmDevice {
    /// Makes a VM and starts the thread that runs it. Takes some milliseconds.
    ///
    /// # Errors
    /// [`KvmError`], which says what is missing.
    pub fn open(polling: Polling) -> Result<KvmDevice, KvmError> {
        let kvm = Kvm::new().map_err(|e| KvmError::Open(io::Error::from_raw_os_error(e.errno())))?;
        let memory = SystemMemory::new().map_err(KvmError::system("mmap of the guest's system memory"))?;
        vm::load(&memory);
        let vm = vm::create_vm(&kvm, &memory)?;
        let vcpu = vm::create_vcpu(&kvm, &vm)?;
        let queue = Queue::new(memory, KERNEL_ROOT);
        queue.set_spins(polling.spins());
        let shared = Arc::new(Shared {
            queue,
            windows: Windows::new(vm, kvm.get_nr_memslots()),
            stop: AtomicBool::new(false),
            tid: AtomicU32::new(0),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            try_spawn("kvm-device", move |cx| processor::run(cx, &shared, vcpu))
                .map_err(KvmError::system("starting the processor's thread"))?
        };
        let inner = Arc::new(Inner { shared, pool: Mutex::new(&POOL, Pool::new()), thread: Some(thread) });
        // Whatever this kernel's KVM cannot do is found out here.
        MaySleep::enter(|cx| inner.update(cx, Place::Any, |_| Ok(())))?;
        Ok(KvmDevice { inner })
    }

    /// A new, empty address space. Sleeps.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn context(&self) -> Result<KvmContext, KvmError> {
        MaySleep::enter(|cx| KvmContext::new(cx, self))
    }

    /// Takes effect within a tenth of a second.
    pub fn set_polling(&self, polling: Polling) {
        self.inner.shared.queue.set_spins(polling.spins());
    }
}

impl Inner {
    /// Works out an update of page tables, has the command processor execute it in `place`, and waits for that.
    fn update<T>(
        &self,
        cx: &mut MaySleep<'_>,
        place: Place,
        work: impl FnOnce(&mut Update<'_>) -> Result<T, KvmError>,
    ) -> Result<T, KvmError> {
        let queue = &self.shared.queue;
        if !queue.memory.is_owned() {
            return Err(KvmError::Forked);
        }
        let mut pool = self.pool.lock(cx);
        let mut update = Update::new(&queue.memory, &mut pool);
        let result = work(&mut update);
        let plan = update.plan();
        let result = match result {
            Ok(result) => result,
            Err(e) => {
                pool.abandon(plan);
                return Err(e);
            }
        };
        let place = match place {
            Place::AnyFlush(_) if !plan.takes_away => Place::Any,
            other => other,
        };
        let batch = Batch::new(None, None);
        let mut end = 0;
        let mut rest = &plan.runs[..];
        loop {
            let (job, later) = rest.split_at(rest.len().min(JOB_SLOTS));
            let slots = job.iter().map(|run| Slot {
                op: Op::Entries,
                dst: SYSTEM + run.at,
                src: run.first,
                len: run.count,
                a: run.step,
                ..Slot::NOP
            });
            let place = if later.is_empty() { place } else { Place::Any };
            if let Some(position) = queue.submit(cx, place, &batch, 0, slots).map_err(KvmError::Lost)? {
                end = position;
            }
            if later.is_empty() {
                break;
            }
            rest = later;
        }
        queue.wait(cx, end, None, false);
        if let Some(why) = &queue.lock(cx).lost {
            return Err(KvmError::Lost(why.clone()));
        }
        pool.settle(plan);
        Ok(result)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // In a forked child there is no such thread.
        if !self.shared.queue.memory.is_owned() {
            return;
        }
        self.shared.stop.store(true, interleave::Ordering::SeqCst);
        self.shared.kick();
        if let Some(thread) = self.thread.take() {
            let _ = MaySleep::try_enter(|cx| thread.join(cx));
        }
    }
}
