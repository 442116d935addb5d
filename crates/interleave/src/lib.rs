// SPDX-License-Identifier: MIT OR Apache-2.0
//! Contexts, locks, atomics and threads that run plainly or under exploration, decided at run time in one binary.
//!
//! Plainly they are parking_lot's and std's, at their speed, with two checks of the kernel's that are always on: the
//! order of lock classes ([`lockdep`]), and sleeping where one must not ([`might_sleep`]). Under exploration every
//! operation is first announced to an engine, which decides who goes on.
//!
//! ```
//! use interleave::{LockClass, MaySleep, Mutex, SpinLock};
//!
//! static MMAP_LOCK: LockClass = LockClass::new("mmap_lock");
//! static PTL: LockClass = LockClass::new("ptl");
//!
//! let (vmas, rss) = (Mutex::new(&MMAP_LOCK, vec![0x1000]), SpinLock::new(&PTL, 0));
//! MaySleep::enter(|cx| {
//!     let mut vmas = vmas.lock(cx); // a sleeping lock wants a context that may sleep
//!     vmas.push(0x2000);
//!     let mut rss = rss.lock(cx); // a spin lock takes any context, and keeps it:
//!     let (pages, _atomic) = rss.split(); // under it there is only `Atomic`, which cannot sleep
//!     *pages += vmas.len();
//! });
//! assert!(interleave::lockdep::take_reports().is_empty());
//! ```
//!
//! # What may be used where
//!
//! | type | contexts | in a static |
//! |---|---|---|
//! | [`Mutex`], [`RwLock`] | lock: [`MaySleep`]; try: any | `const_new`, plain only |
//! | [`SpinLock`] | any; lends [`Atomic`] | `const_new`, plain only |
//! | [`Semaphore`] | down: [`MaySleep`]; try: any; up: any, without a token | `const_new`, plain only |
//! | [`WaitQueue`] | wait: [`MaySleep`]; wake: any, without a token | `const_new`, plain only |
//! | [`OnceCell`] | init: [`MaySleep`]; get: any, without a token | `const_new`, plain only |
//! | atomics, [`fence`] | any, without a token | `const_new`, plain only |
//! | [`AsymmetricFence`] | any, without a token | no: it asks the system when it is made |
//! | [`AtomicWords`] | any, without a token | no: their number is chosen at run time |
//! | [`RefCount`] | any, without a token | no: it counts the references to an object that goes |
//! | [`LockMap`] | any | `new`; every world |
//! | [`PerThread`] | any, without a token | `new`; every world |
//! | [`LockClass`] | - | `new`; nowhere else |
//!
//! *Plain only*: under exploration its first use panics (rule 7), since what is in a static outlives an execution.
//!
//! # Rules
//! 1. A context is a token. It comes from [`MaySleep::enter`] or [`spawn`], is lent, and is never kept, sent or copied.
//! 2. A [`Mutex`], [`RwLock`], [`Semaphore`], [`WaitQueue`] or join wants [`MaySleep`]. A [`SpinLock`] and any try
//!    take each context.
//! 3. Every lock has a [`LockClass`], in a static, named by its role. Two locks of one class at once need
//!    `lock_nested`.
//! 4. Classes are taken in one order. The first contradiction is reported with both places of both orders.
//! 5. A reader queues behind a waiting writer: no thread reads a lock twice.
//! 6. A wake comes after the change that it announces; a condition waited for does not sleep.
//! 7. An object belongs to the world that it was born in, plain or explored. `const_new`, for statics, is plain.
//! 8. No other lock, atomic, thread or clock beside these in code that is to be explored (clippy.toml forbids them).
//!
//! Nothing here knows of memory management.
//!
//! Examples that must not compile name their error code. rustdoc compares codes on a nightly compiler only; on stable
//! `RUSTC_BOOTSTRAP=1 cargo test -p interleave --doc` does.
#![expect(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "this crate is what the others use instead of the standard locks, atomics and threads"
)]

mod asymmetric;
pub mod atomic;
mod atomic_words;
mod birth;
mod class;
mod context;
mod digest;
pub mod explore;
mod here;
mod lock_map;
pub mod lockdep;
mod mutex;
mod once;
mod per_thread;
mod raw;
mod refcount;
mod rwlock;
mod semaphore;
mod spinlock;
mod sync;
mod task;
mod thread;
pub mod time;
mod wait_list;
mod wait_queue;
mod world;

pub use asymmetric::{AsymmetricFence, NoBarrier};
pub use atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
pub use atomic_words::{AtomicQuad, AtomicWord, AtomicWords};
pub use class::{LockClass, MAX_SUBCLASSES};
pub use context::{
    Atomic, AtomicContext, Context, MaySleep, NonBlock, PageContext, Sleep,
    forge_may_sleep_against_the_rules, might_sleep, preempt_disable,
};
pub use digest::{Digest, mix};
pub use here::Here;
pub use lock_map::{LockMap, LockMapGuard};
pub use mutex::{Mutex, MutexGuard};
pub use once::OnceCell;
pub use per_thread::PerThread;
pub use refcount::RefCount;
pub use rwlock::{ReadGuard, RwLock, WriteGuard};
pub use semaphore::Semaphore;
pub use spinlock::{SpinGuard, SpinLock};
pub use task::Section;
pub use thread::{
    JoinHandle, Panicked, Scope, ScopedJoinHandle, scope, spawn, spin_hint, try_spawn, yield_now,
};
pub use wait_queue::WaitQueue;
