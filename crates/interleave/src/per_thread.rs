// SPDX-License-Identifier: MIT OR Apache-2.0
//! Storage of which each thread has its own, and each virtual thread too (`thread_local!` is shared by those).
//!
//! Nothing is shared between threads, so that a key in a static serves in every world.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::world::{self, OpKind};

/// The values of one thread, by key.
#[derive(Default)]
pub(crate) struct Slots(RefCell<Vec<Option<Rc<dyn Any>>>>);

thread_local! {
    static SLOTS: Slots = const { Slots(RefCell::new(Vec::new())) };

    /// Whether `SLOTS` has anything. Beside it, because what has no destructor is cheaper to reach.
    static ANY: Cell<bool> = const { Cell::new(false) };
}

/// Exchanges the values of the running thread for those of another virtual thread.
#[inline]
pub(crate) fn swap(other: &Slots) {
    let (mine, others) = (ANY.get(), !other.0.borrow().is_empty());
    if mine || others {
        SLOTS.with(|slots| slots.0.swap(&other.0));
        ANY.set(others);
    }
}

/// One `T` for each thread, made at its first use there and dropped when the thread ends.
///
/// Any context. Values outlive the `PerThread` that they belong to: meant for statics, in every world.
#[derive(Debug)]
pub struct PerThread<T> {
    init: fn() -> T,
    key: OnceLock<usize>,
}

impl<T: 'static> PerThread<T> {
    /// Storage whose values begin as `init()`.
    pub const fn new(init: fn() -> T) -> Self {
        PerThread { init, key: OnceLock::new() }
    }

    /// Runs `f` on the value of this thread.
    ///
    /// # Panics
    /// In a destructor that runs while the thread ends, after its values are gone.
    #[track_caller]
    pub fn with<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        world::note(OpKind::PerThread);
        let key = self.key();
        let found = SLOTS.with(|slots| slots.0.borrow().get(key).cloned().flatten());
        let slot = found.unwrap_or_else(|| {
            // `init` may use other keys: no borrow while it runs.
            let slot: Rc<dyn Any> = Rc::new((self.init)());
            SLOTS.with(|slots| {
                let mut slots = slots.0.borrow_mut();
                if slots.len() <= key {
                    slots.resize(key + 1, None);
                }
                slots[key] = Some(Rc::clone(&slot));
            });
            ANY.set(true);
            slot
        });
        match slot.downcast_ref::<T>() {
            Some(value) => f(value),
            None => unreachable!("a key belongs to one PerThread, whose values are all of one type"),
        }
    }

    fn key(&self) -> usize {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        *self.key.get_or_init(|| NEXT.fetch_add(1, Ordering::Relaxed))
    }
}
