// SPDX-License-Identifier: MIT OR Apache-2.0
//! The contract between a primary and a secondary MMU.

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
