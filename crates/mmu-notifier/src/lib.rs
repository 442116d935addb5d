// SPDX-License-Identifier: MIT OR Apache-2.0
//! The contract between a primary and a secondary MMU: mm/mmu_notifier.c and its header, of every kernel since 3.16.
//!
//! The *primary* MMU is the mm that owns page tables; a *secondary* MMU (a device, a hypervisor, a registration cache)
//! mirrors a part of them. The primary tells before and after it changes a range; the secondary drops
//! what it mirrors in between and may come back afterwards.
//!
//! | to do this | use |
//! |---|---|
//! | mirror a range and never be stale | [`primary`]: the protocol, and the trait behind which softmm and the running kernel are the same |
//! | mirror a range of a mm | [`IntervalNotifier`], from [`NotifierSubscriptions::insert_interval`] |
//! | hear everything of a mm | [`MmuNotifier`], with [`NotifierSubscriptions::register`] |
//! | be the mm | [`NotifierSubscriptions`]: `invalidate_range_start` and the other calls, under the [`Rules`] of a kernel |
//! | find ranges by overlap | [`IntervalIndex`] |
//!
//! ```
//! use std::sync::Arc;
//! use interleave::{LockClass, MaySleep, Mutex, Sleep};
//! use mmu_notifier::*;
//!
//! static TABLE: LockClass = LockClass::new("device table");
//! struct Device(Mutex<Option<Pfn>>);
//!
//! impl Invalidate for Device {
//!     fn invalidate(&self, cx: Sleep<'_, '_>, _: &Invalidation, seq: SetSeq<'_>) -> Result<SeqMoved, WouldBlock> {
//!         let Sleep::May(cx) = cx else { return Err(WouldBlock) };
//!         let mut table = self.0.lock(cx);
//!         let moved = seq.set();
//!         *table = None;
//!         Ok(moved)
//!     }
//! }
//!
//! MaySleep::enter(|cx| {
//!     let mm = NotifierSubscriptions::new(Rules::default());
//!     let device = Arc::new(Device(Mutex::new(&TABLE, None)));
//!     let range = Range::new(0x7000, 0x1000)?;
//!     let notifier = mm.insert_interval(cx, range, device.clone())?;
//!
//!     // The reader: get the page, then install it under the device's lock if nothing has changed.
//!     let seq = notifier.read_begin(cx)?;
//!     let page = Pfn(42);
//!     let mut table = device.0.lock(cx);
//!     if !notifier.read_retry(seq) {
//!         *table = Some(page);
//!     }
//!     drop(table);
//!
//!     // The writer: munmap.
//!     let section = mm.invalidate_range_start(cx, Invalidation::new(range, Event::Unmap));
//!     assert_eq!(*device.0.lock(cx), None);
//!     section.invalidate_range_end(cx);
//!     assert!(notifier.read_retry(seq));
//!     Ok::<(), Box<dyn std::error::Error>>(())
//! }).unwrap();
//! ```

mod dispatch;
mod event;
mod inside;
mod interval;
mod interval_notifier;
mod invalidation;
mod itree;
mod notifier;
pub mod primary;
mod pte;
mod range;
mod registry;
mod rules;
mod srcu;

pub use interleave::{Atomic, Context, MaySleep, NonBlock, PageContext, Sleep};

pub use dispatch::InvalidateSection;
pub use event::Event;
pub use inside::InsideInvalidation;
pub use interval::{Cursor, IntervalIndex, Key, Overlaps};
pub use interval_notifier::IntervalNotifier;
pub use invalidation::{Invalidation, Owner};
pub use notifier::{MmuNotifier, Ops, WouldBlock};
pub use primary::{
    After, Blocks, CountedBefore, Delivery, Gone, GupError, IdentityError, Invalidate, PageIdentity, Pin,
    PrimaryMmu, Seq, SeqMoved, SetSeq, SourceError, SubscribeError, Subscription, Unheard,
};
pub use pte::{Access, Pfn, Pte};
pub use range::{PAGE_SHIFT, PAGE_SIZE, PageAddr, Range, RangeError, TASK_SIZE};
pub use registry::{
    FS_RECLAIM, INVALIDATE_START, NotifierSubscriptions, RegisterError, Registration, UnregisterError,
};
pub use rules::{Breach, Rules};
