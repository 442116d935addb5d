// SPDX-License-Identifier: MIT OR Apache-2.0
//! The mm of the running Linux kernel: what changes in it, which pages are behind it, and pins of them.
//!
//! A program shares its memory with a device. Linux changes the memory underneath: munmap, copy-on-write, KSM,
//! compaction, truncation. This crate tells the program, on a stock kernel, without a module; it is the live half of
//! what [`mmu_notifier`] describes, and every path by which Linux changes memory is in it to be tried
//! ([`disturb`]).
//!
//! # Two sources
//!
//! | | [`kvm`] | [`uffd`] |
//! |---|---|---|
//! | how | an empty VM puts the kernel's own notifier on this mm; a BPF program on its tracepoint counts | userfaultfd events |
//! | hears | every invalidation: all kinds of memory, kernel threads and other processes too | unmap, move, and drop by madvise of registered memory; what it does not is [`uffd::DEAF`] |
//! | tells | before the page tables change; nobody waits | after (unmap, move) or before (drop); the changer waits until the event is read |
//! | the check costs | one or two loads | one system call, some 200 ns |
//! | needs | `/dev/kvm`, `CAP_BPF` and `CAP_PERFMON`, Linux 5.13; or a [`kvm::Grant`] from a process with these | nothing; Linux 5.15 |
//!
//! Take `kvm` where it can be had: it is complete. Take `uffd` where it cannot, for anonymous memory that only this
//! program changes and that a pin guards against what is not heard. [`primary::HostMm`] makes a
//! [`PrimaryMmu`](mmu_notifier::primary::PrimaryMmu) of either, so the code is the same; [`capability`] says what this
//! machine offers, and how to get the rest.
//!
//! # The contract
//!
//! 1. `read_begin` before the pages are got; `read_retry` under the lock that installs them, and before every use.
//! 2. `false` from `read_retry` is a promise; `true` may be a false alarm, and is the answer of whatever is gone.
//! 3. Callbacks come late, on a thread of the source. They give memory back; correctness never rests on them.
//! 4. To drop a subscription is a fence. Never do it with a lock held that its callback takes.
//! 5. In a forked child every handle refuses: it is about the parent's memory.
//!
//! ```no_run
//! use hostmm::{kvm, primary::HostMm};
//! use interleave::MaySleep;
//! use mmu_notifier::primary::{PrimaryMmu, Subscription};
//! use mmu_notifier::{Access, Range};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mm = HostMm::new(kvm::KvmSource::open(&kvm::Options::default())?, 64)?;
//! let buffer = vec![0_u8; 1 << 20];
//! let range = Range::enclosing(buffer.as_ptr().addr() as u64, buffer.len() as u64)?;
//! let sub = mm.watch(range)?;
//! MaySleep::enter(|cx| {
//!     loop {
//!         let seq = sub.read_begin(cx)?;
//!         let pin = mm.pin(cx, range, Access::Write)?; // what a device driver would map
//!         if !sub.read_retry(seq) {
//!             break Ok((pin, seq)); // to be used for as long as `read_retry(seq)` says false
//!         }
//!     }
//! })
//! # .map(|_: (_, _)| ())
//! # }
//! ```
//!
//! # What needs what
//!
//! | | privilege |
//! |---|---|
//! | [`uffd`], [`pin`] within `RLIMIT_MEMLOCK`, mappings of [`page`], [`barrier`] | none |
//! | [`kvm`] | see above |
//! | page frame numbers of [`page`] | `CAP_SYS_ADMIN` in the initial user namespace |
//! | frame flags and map counts of [`page`] | root |
//! | [`disturb`], [`setting`] | per event: [`disturb::Need`] |
//!
//! # Lock order
//!
//! Classes of [`interleave::lockdep`], outer to inner; what is not below another is never held with it. Application
//! locks stand where a callback may take them.
//!
//! ```text
//! host_settled                     one subscription's last barrier; held while the barrier waits
//!   file_links                     list of second file mappings
//!   file_link                      one of them, while it is split
//! kvm_callback                     one subscription's callback, while it runs; to drop the subscription takes it
//!   (application)
//!     kvm_subs                     the list of subscriptions
//! uffd_callback                    no lock: stands for the wait for a running callback
//!   (application)
//!     uffd_registrations           pages by how many watches hold them; held over UFFDIO_REGISTER
//! kvm_notices                      records on their way to the callbacks
//! kvm_monitor_stage                is the monitor up or gone; with its wait queue kvm_monitor_stage_changed
//! pin_device                       our ring's submission side
//! race_cache, race_handover        of the races
//! ```
//!
//! The one exception: a callback that drops another subscription only tries that one's `kvm_callback`. The monitor
//! calls one at a time, so the try fails for the callback that runs, which needs no waiting for.
//!
//! The uffd monitor takes none of these: whoever changes memory sleeps until it has read the event, with whatever
//! locks it holds.
//!
//! # Not in this crate
//!
//! Policy. What a consumer does with a stale translation, and how it caches, is the business of the floors above. Nor
//! does anything here print: it returns errors, or logs through `tracing` where nobody is left to be told.

pub mod barrier;
pub mod capability;
pub mod child;
pub mod disturb;
pub mod kvm;
pub mod lab;
pub mod page;
pub mod peer;
pub mod pin;
pub mod primary;
pub mod race;
pub mod setting;
mod sys;
#[doc(hidden)]
pub mod testing;
pub mod trace;
pub mod uffd;
