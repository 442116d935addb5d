// SPDX-License-Identifier: MIT OR Apache-2.0
//! Contexts, locks, atomics and threads that run plainly or under exploration.
#![expect(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "this crate is what the others use instead of the standard locks, atomics and threads"
)]

pub mod atomic;
mod class;
mod context;
mod digest;
mod lock_map;
pub mod lockdep;
mod mutex;
mod once;
mod per_thread;
mod refcount;
mod rwlock;
mod semaphore;
mod spinlock;
mod task;
mod thread;
pub mod time;
mod wait_queue;

pub use atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
pub use class::LockClass;
pub use context::{
    Atomic, AtomicContext, Context, MaySleep, NonBlock, PageContext, Sleep,
    forge_may_sleep_against_the_rules, might_sleep, preempt_disable,
};
pub use digest::{Digest, mix};
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
