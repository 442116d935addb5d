// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lease slots under weak memory: src/cache/slab.rs itself, over loom's atomics and cells instead of our own.
//!
//! interleave explores sequentially consistent memory; the slots are what the cache has of weaker orders and of `unsafe`.

use std::sync::Arc;

use loom::thread;
use slab::{Phase, Slab};

#[allow(dead_code, reason = "the cache uses more of it")]
#[path = "../src/cache/slab.rs"]
mod slab;

/// Loom's twins of what src/sync.rs has.
mod sync {
    pub(crate) use loom::sync::atomic::Ordering;
    use loom::sync::atomic::{self, fence};

    /// Loom takes a sequentially consistent access for acquire and release, so it is said with fences here: one before a
    /// load and one behind a read-modify-write, as compilers do it for machines that have only these.
    pub(crate) struct AtomicU64(atomic::AtomicU64);

    fn sc(order: Ordering) {
        if order == Ordering::SeqCst {
            fence(Ordering::SeqCst);
        }
    }

    impl AtomicU64 {
        pub(crate) fn new(value: u64) -> AtomicU64 {
            AtomicU64(atomic::AtomicU64::new(value))
        }

        pub(crate) fn load(&self, order: Ordering) -> u64 {
            sc(order);
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: u64, order: Ordering) {
            self.0.store(value, order);
            sc(order);
        }

        pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            let before = self.0.fetch_add(value, order);
            sc(order);
            before
        }

        pub(crate) fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
            let before = self.0.fetch_sub(value, order);
            sc(order);
            before
        }

        pub(crate) fn compare_exchange(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            let done = self.0.compare_exchange(current, new, success, failure);
            sc(if done.is_ok() { success } else { failure });
            done
        }
    }

    pub(crate) struct AtomicWords(Vec<AtomicU64>);

    pub(crate) type AtomicWord<'a> = &'a AtomicU64;

    impl AtomicWords {
        pub(crate) fn new(count: usize, value: u64) -> AtomicWords {
            AtomicWords((0..count).map(|_| AtomicU64::new(value)).collect())
        }

        pub(crate) fn word(&self, index: usize) -> AtomicWord<'_> {
            &self.0[index]
        }
    }

    pub(crate) struct Cell<T>(loom::cell::UnsafeCell<T>);

    impl<T> Cell<T> {
        pub(crate) fn new(value: T) -> Cell<T> {
            Cell(loom::cell::UnsafeCell::new(value))
        }

        pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
            self.0.with(f)
        }

        pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            self.0.with_mut(f)
        }
    }
}

type Bodies = Slab<Arc<u64>>;

/// One live entry with a body that holds 7.
fn one() -> Arc<Bodies> {
    let slab = Arc::new(Slab::new(1, 1));
    slab.build(0);
    slab.publish(0, Arc::new(7), 0);
    slab
}

/// Reads the body if the entry is alive, as a lookup does.
fn read(slab: &Bodies) -> Option<u64> {
    let state = slab.state(0);
    let held = state.is_live().then(|| slab.lease(0, state, 0))??;
    Some(**held.body())
}

/// As who finds it dead: takes it apart when it can.
fn take(slab: &Bodies) -> bool {
    let Some(body) = slab.take(0) else { return false };
    // Loom's cell reports whoever reads the body beside this.
    drop(body);
    slab.free(0);
    true
}

#[test]
fn a_leased_body_is_not_taken_apart() {
    loom::model(|| {
        let slab = one();
        let reader = {
            let slab = Arc::clone(&slab);
            thread::spawn(move || assert!(matches!(read(&slab), None | Some(7))))
        };
        let state = slab.state(0);
        assert!(slab.kill(0, state));
        let taken = take(&slab);
        reader.join().expect("it does not panic");
        assert!(taken || take(&slab), "the lease has ended");
    });
}

#[test]
fn an_entry_that_is_used_again_is_another() {
    loom::model(|| {
        let slab = one();
        let old = slab.state(0);
        let reader = {
            let slab = Arc::clone(&slab);
            thread::spawn(move || {
                // Of the first generation, or not at all: it was seen before.
                if let Some(held) = slab.lease(0, old, 0) {
                    assert_eq!(**held.body(), 7);
                }
                assert!(matches!(read(&slab), None | Some(7 | 8)));
            })
        };
        assert!(slab.kill(0, old));
        if take(&slab) {
            assert_eq!(slab.build(0).generation(), old.generation() + 1);
            slab.publish(0, Arc::new(8), 0);
        }
        reader.join().expect("it does not panic");
    });
}

#[test]
fn an_entry_dies_once() {
    loom::model(|| {
        let slab = one();
        let killers: Vec<_> = (0..2)
            .map(|_| {
                let slab = Arc::clone(&slab);
                thread::spawn(move || {
                    let state = slab.state(0);
                    slab.kill(0, state)
                })
            })
            .collect();
        let kills = killers.into_iter().map(|k| k.join().expect("it does not panic"));
        assert_eq!(kills.filter(|killed| *killed).count(), 1);
        assert_eq!(slab.state(0).phase(), Phase::Dead);
    });
}

#[test]
fn leases_without_a_slot_keep_the_body_too() {
    loom::model(|| {
        let slab = one();
        let state = slab.state(0);
        // Every slot is taken, so that the reader's is counted in the entry.
        let all: Vec<_> = (0..8).map_while(|_| slab.lease(0, state, 0)).collect();
        assert_eq!(all.len(), 8);
        let reader = {
            let slab = Arc::clone(&slab);
            thread::spawn(move || assert!(matches!(read(&slab), None | Some(7))))
        };
        assert!(slab.kill(0, state));
        assert!(!take(&slab));
        drop(all);
        let taken = take(&slab);
        reader.join().expect("it does not panic");
        assert!(taken || take(&slab));
    });
}
