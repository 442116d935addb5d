// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's own MMU notifiers, by way of an empty KVM virtual machine.
//!
//! KVM_CREATE_VM registers an mmu_notifier on the process. It has no memory and no work, but its callback
//! invalidate_range_start passes the tracepoint `kvm:kvm_unmap_hva_range`, where a BPF program counts the range in a
//! map that the process reads and, on demand, writes it to a ring. So the process knows of **every** change that a
//! driver in the kernel would be told of, whatever makes it: system calls, copy on write, KSM, compaction, writeback,
//! truncation by another process.
//!
//! * [`Watch`]: "has anything in this range changed since?", a load or two, right as soon as the change is visible.
//! * [`Subscription`]: callbacks from a monitor thread, late, for giving memory back.
//!
//! It hears *starts* only, never the end, the event's type or the mm; see [`watch`](self::Watch).
//!
//! # What it needs
//!
//! Linux 5.13 on x86-64 (the tracepoint was arm64's alone before; commit "KVM: Move arm64's MMU notifier trace events to
//! generic code"), /dev/kvm, CAP_BPF and CAP_PERFMON, and a tracefs that can be read or mounted. An unprivileged process
//! needs nothing but a grant from one that has these.
//!
//! # What can be lost, and what then
//!
//! * The kernel keeps tracing programs off a CPU while a task is inside some operations of bpf(2) on maps
//!   (bpf_disable_instrumentation). On a preemptible kernel (preempt=full or lazy, PREEMPT_RT) that task can be
//!   scheduled away meanwhile, and changes made by others on that CPU are then *not counted*. This takes a privileged
//!   process that is preempted in the middle of such a call. The kernel counts it: [`Health::misses`]. It cannot happen
//!   with preempt=none or voluntary, nor to perf rings on a tracepoint without BPF programs.
//! * The ring is full: every subscriber is told [`Notice::Everything`], and it is counted. The counters lose nothing.
//! * Fork: the child's handles answer [`Gone::Forked`]; the notifier is on the parent's mm.
//!
//! The source opens no descriptors that stay open in the process's table (but the programs', for [`KvmSource::health`],
//! which nothing else needs): VM, map and event live through mappings, so a careless close_range(2) cannot silence it.

mod canary;
mod cause;
mod error;
mod grant;
mod layout;
mod monitor;
mod parts;
mod perf_rings;
mod program;
mod queue;
mod record;
mod shared;
pub mod stream;
mod subscription;
mod watch;

pub use cause::{STACK_DEPTH, TOP_WORDS};
pub(crate) use error::kvm as kvm_error;
pub use error::{Gone, OpenError, SubscribeError};
pub use grant::{CanaryPage, Grant};
pub use layout::{Buckets, Kind};
pub use record::{Notice, Record};
pub use subscription::Subscription;
pub use watch::{Seq, Watch};

use crate::sys::bpf::Program;
use crate::sys::map::{Mapping, Word};
use crate::sys::vm::Vm;
use crate::sys::wipe::WipePage;
use crate::sys::{perf, ringbuf::RingReader, signal::blocking_signals, vm};
use canary::{Canary, Records};
use error::system;
use layout::LOST;
use mmu_notifier::Range;
use monitor::{Input, Monitor};
use parts::Parts;
use perf_rings::PerfRings;
use shared::{ALIVE, CLOSED, Counters, MONITOR, Near, Shared};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

/// How to open a [`KvmSource`].
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the ring for records (a power of two, at least 4096); `None`: counters only, no callbacks.
    pub ring: Option<u32>,
    /// Counters per part of the address space; `None`: one global counter, the cheapest.
    pub buckets: Option<Buckets>,
    /// Count ageing too.
    pub age: bool,
    /// Count only ranges that overlap this one; `None`: all, and those of other processes with a VM.
    pub window: Option<Range>,
    /// How to listen.
    pub prefer: Prefer,
    /// The KVM device.
    pub kvm_path: PathBuf,
}

impl Default for Options {
    /// Counters with the default buckets, no ring, no ageing, no window, BPF or else perf rings, /dev/kvm.
    fn default() -> Options {
        Options {
            ring: None,
            buckets: Some(Buckets::default()),
            age: false,
            window: None,
            prefer: Prefer::Any,
            kvm_path: "/dev/kvm".into(),
        }
    }
}

/// How to listen to the tracepoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefer {
    /// BPF, and perf rings where BPF is refused.
    Any,
    /// BPF or nothing.
    Bpf,
    /// perf rings or nothing.
    PerfRing,
}

/// What a source knows of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Times that the kernel skipped a program because another ran on that CPU: changes that were *not counted*. Must
    /// be 0; anything else means that quiet watches may have lied, so throw away what was cached and say so loudly.
    /// `None` where it cannot be known (a grant, or kernels before 5.12).
    pub misses: Option<u64>,
    /// Records that did not fit the ring (perf: times that a ring was overwritten). Subscribers were told
    /// [`Notice::Everything`]; counters are not concerned.
    pub lost: u64,
    /// CPUs that came online after perf rings were opened: changes made there are *not heard*. Must be 0. Always 0
    /// with BPF, whose program runs on every CPU.
    pub unheard_cpus: usize,
}

/// A source of the kernel's notifications about this process's memory.
///
/// Dropping it takes the notifier off the mm; its watches then answer [`Gone::Closed`].
#[derive(Debug)]
pub struct KvmSource {
    shared: Arc<Shared>,
    monitor: Option<Monitor>,
    /// `None` once closed, and forgotten, not dropped, in a forked child, which did not inherit these mappings.
    keep: Option<Keep>,
    progs: Vec<Program>,
    age: bool,
    /// 1 while the source, and its monitor if it has one, can be trusted.
    trusted: Word,
    /// The word that moves last, whatever changes; `None` where no single one does (perf rings).
    any: Option<Word>,
    /// The words that move with what is near.
    near: Option<Near>,
}

/// The mappings that the source lives by. Order of the fields: first no more events, then nobody to hear them.
#[derive(Debug)]
#[expect(dead_code, reason = "held, never read: to drop them is to close the source")]
struct Keep {
    vm: Vm,
    events: Vec<Mapping>,
    canary: Canary,
}

impl KvmSource {
    /// Opens a source for the calling process and checks that it hears.
    ///
    /// # Errors
    /// [`OpenError`]: what is missing and how to get it. May sleep.
    pub fn open(options: &Options) -> Result<KvmSource, OpenError> {
        // A pending signal makes the BPF verifier give up (EAGAIN) and the registration of the notifier too (EINTR), so
        // a storm of them could keep both from ever finishing.
        blocking_signals(|| KvmSource::open_quietly(options))
    }

    fn open_quietly(options: &Options) -> Result<KvmSource, OpenError> {
        let bpf = match options.prefer {
            Prefer::PerfRing => return KvmSource::open_perf(options),
            Prefer::Any | Prefer::Bpf => KvmSource::open_bpf(options),
        };
        match bpf {
            // Only a refusal is worth another try: what the canary found wrong is wrong either way.
            Err(bpf @ OpenError::Bpf { .. }) if options.prefer == Prefer::Any => {
                KvmSource::open_perf(options)
                    .map_err(|perf| OpenError::Neither { bpf: Box::new(bpf), perf: Box::new(perf) })
            }
            other => other,
        }
    }

    fn open_bpf(options: &Options) -> Result<KvmSource, OpenError> {
        let canary = Canary::reserve().map_err(system("reserving the canary page"))?;
        let parts = Parts::make(options, canary.range())?;
        KvmSource::from_parts(parts, canary)
    }

    fn open_perf(options: &Options) -> Result<KvmSource, OpenError> {
        let canary = Canary::reserve().map_err(system("reserving the canary page"))?;
        let kvm = vm::open(&options.kvm_path).map_err(|e| error::kvm(&options.kvm_path, e))?;
        let PerfRings { rings, cpus, fds, fields } = PerfRings::open(options, &canary)?;
        let shared = new_shared(Counters::Perf { rings, cpus })?;
        let vm = Vm::create(kvm.as_fd()).map_err(|e| error::kvm(&options.kvm_path, e))?;
        canary::verify(&canary, &shared, Records::Perf(fields))?;
        let input = options.ring.map(|_| (Input::Perf(fields), fds));
        KvmSource::start(shared, Keep { vm, events: Vec::new(), canary }, input, Vec::new(), false)
    }

    fn from_parts(parts: Parts, canary: Canary) -> Result<KvmSource, OpenError> {
        let Parts { kvm, counters, ring, events, progs, layout } = parts;
        let map = Mapping::shared(counters.as_fd(), layout.map_len() as usize, libc::PROT_READ, 0)
            .map_err(system("mapping the counters"))?;
        let lost =
            map.word(LOST as usize).ok_or_else(|| OpenError::Grant("the map is too small".to_owned()))?;
        let shared = new_shared(Counters::Bpf { map, layout })?;
        let keep = events.iter().map(|e| perf::keep(e.as_fd())).collect::<Result<Vec<_>, _>>();
        let keep = keep.map_err(system("mapping the event"))?;
        let vm = Vm::create(kvm.as_fd()).map_err(|e| error::kvm("/dev/kvm".as_ref(), e))?;
        let mut reader = match &ring {
            Some((fd, len)) => Some(RingReader::new(fd.as_fd(), *len).map_err(system("mapping the ring"))?),
            None => None,
        };
        canary::verify(&canary, &shared, reader.as_mut().map_or(Records::None, Records::Bpf))?;
        let input = reader.zip(ring).map(|(reader, (fd, _))| (Input::Bpf(reader, lost), vec![fd]));
        KvmSource::start(shared, Keep { vm, events: keep, canary }, input, progs, layout.age)
    }

    fn start(
        shared: Arc<Shared>,
        keep: Keep,
        input: Option<(Input, Vec<OwnedFd>)>,
        progs: Vec<Program>,
        age: bool,
    ) -> Result<KvmSource, OpenError> {
        let start = |(input, fds)| Monitor::start(&shared, input, fds);
        let monitor = input.map(start).transpose().map_err(system("starting the monitor"))?;
        let trusted = shared.state_word(if monitor.is_some() { MONITOR } else { 0 });
        let heads = shared.heads(Kind::Unmap);
        let any = if let [any] = heads[..] { Some(any) } else { None };
        let near = shared.near(Kind::Unmap);
        Ok(KvmSource { shared, monitor, keep: Some(keep), progs, age, trusted, any, near })
    }

    /// The count of all changes: if it was loaded, then [`Watch::changed_since`] answered `false`, and later it is the
    /// same, then the answer is still `false` (the same argument as for the global counter inside of a watch). `None`
    /// without a counter, and when the source is gone, its monitor has died, or this is a forked child.
    #[inline]
    pub fn era(&self) -> Option<u64> {
        let any = self.any?;
        if self.trusted.load() == 0 { None } else { Some(any.load()) }
    }

    /// The count of changes where `key` says: a [`Watch`] that [gave the key](Watch::count_at), with this value, has not
    /// changed since. `None` as for [`KvmSource::era`].
    #[inline]
    pub fn count(&self, key: u64) -> Option<u64> {
        let near = self.near.as_ref()?;
        if self.trusted.load() == 0 { None } else { Some(near.count(key)) }
    }

    /// A watch of `range`. It outlives the source, and then says that it is gone.
    ///
    /// # Errors
    /// [`Gone`] in a forked child.
    pub fn watch(&self, range: Range) -> Result<Watch, Gone> {
        self.shared.check(ALIVE)?;
        Watch::new(&self.shared, range, ALIVE, self.age)
    }

    /// Calls `callback` from a thread of the source for each record that overlaps `range`, after the fact.
    ///
    /// The callback may take locks, use descriptors and sleep; while it does, records wait and may be lost (and
    /// counted). It may subscribe and unsubscribe. If it panics the monitor dies and every subscription's watch says so.
    ///
    /// # Errors
    /// [`SubscribeError`]: no ring, or gone.
    pub fn subscribe(
        &self,
        range: Range,
        callback: impl FnMut(&Notice) + Send + 'static,
    ) -> Result<Subscription, SubscribeError> {
        self.shared.check(ALIVE)?;
        let monitor = self.monitor.as_ref().ok_or(SubscribeError::NoRing)?;
        let watch = Watch::new(&self.shared, range, ALIVE | MONITOR, self.age)?;
        Ok(Subscription::new(&self.shared, monitor.tid(), range, Box::new(callback), watch)?)
    }

    /// What went wrong so far. A system call; ask now and then, not before each use.
    ///
    /// # Errors
    /// [`Gone`] if nothing can be said any more.
    pub fn health(&self) -> Result<Health, Gone> {
        self.shared.check(if self.monitor.is_some() { ALIVE | MONITOR } else { ALIVE })?;
        let misses = self.progs.iter().map(Program::misses).sum();
        let unheard_cpus = match &*self.shared.counters {
            Counters::Bpf { .. } => 0,
            Counters::Perf { cpus, .. } => perf_rings::online_cpus()
                .map_or(usize::MAX, |online| online.iter().filter(|cpu| !cpus.contains(cpu)).count()),
        };
        let misses = if self.progs.is_empty() { None } else { misses };
        Ok(Health { misses, lost: self.shared.lost(), unheard_cpus })
    }

    /// Closes the source: no callback runs when this returns, and watches answer [`Gone::Closed`]. As dropping it.
    pub fn close(self) {}
}

impl Drop for KvmSource {
    fn drop(&mut self) {
        if !self.shared.at_home() {
            std::mem::forget(self.keep.take());
            std::mem::forget(self.monitor.take());
            return;
        }
        self.shared.set(CLOSED);
        self.shared.clear(ALIVE);
        let keep = self.keep.take();
        if let (Some(monitor), Some(keep)) = (self.monitor.take(), &keep) {
            monitor.stop(|| keep.canary.poke());
        }
    }
}

fn new_shared(counters: Counters) -> Result<Arc<Shared>, OpenError> {
    let state = WipePage::new().map_err(system("mapping the state page"))?;
    let shared = Arc::new(Shared::new(state, counters));
    shared.set(ALIVE);
    Ok(shared)
}
