// SPDX-License-Identifier: MIT OR Apache-2.0
//! Storage of which each thread has its own.
use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

thread_local! {
    static SLOTS: RefCell<HashMap<usize, Rc<dyn Any>>> = RefCell::new(HashMap::new());
}

/// One `T` for each thread, made at first use there and dropped when the thread ends.
pub struct PerThread<T> {
    init: fn() -> T,
    key: std::sync::OnceLock<usize>,
}

impl<T: 'static> PerThread<T> {
    /// Storage whose values begin as `init()`.
    pub const fn new(init: fn() -> T) -> Self {
        PerThread { init, key: std::sync::OnceLock::new() }
    }

    /// The value of this thread.
    #[track_caller]
    pub fn with<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let key = *self.key.get_or_init(|| NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let found = SLOTS.with(|s| s.borrow().get(&key).cloned());
        let slot = found.unwrap_or_else(|| {
            let slot: Rc<dyn Any> = Rc::new((self.init)());
            SLOTS.with(|s| s.borrow_mut().insert(key, Rc::clone(&slot)));
            slot
        });
        match slot.downcast_ref::<T>() {
            Some(value) => f(value),
            None => unreachable!("a key belongs to one PerThread"),
        }
    }
}
