// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lease slots under weak memory: src/cache/slab itself, over loom's atomics and cells instead of our own.
//!
//! interleave explores sequentially consistent memory; the slots are what the cache has of weaker orders and of `unsafe`.

use std::sync::Arc;

use loom::thread;
use slab::{Phase, Slab, State, USERS};
use sync::{Here, Ordering, SLOTS};

#[allow(dead_code, unused_imports, reason = "the cache uses more of it")]
#[path = "../src/cache/slab/mod.rs"]
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

        pub(crate) fn load_here(&self, _: Here, order: Ordering) -> u64 {
            self.load(order)
        }

        pub(crate) fn store_here(&self, _: Here, value: u64, order: Ordering) {
            self.store(value, order);
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

    /// The slots of threads are given out by number, which loom's threads take from here.
    #[derive(Clone, Copy)]
    pub(crate) struct Here;

    loom::thread_local! {
        static NUMBER: std::cell::Cell<usize> = std::cell::Cell::new(usize::MAX);
    }

    impl Here {
        pub(crate) fn ask() -> Here {
            Here
        }

        pub(crate) fn set_thread(number: usize) {
            NUMBER.with(|n| n.set(number));
        }

        pub(crate) fn known_thread(self) -> usize {
            NUMBER.with(std::cell::Cell::get)
        }

        pub(crate) fn thread(self) -> Option<usize> {
            Some(self.known_thread()).filter(|number| *number != usize::MAX)
        }
    }

    /// What both sides are promised, said with a full fence on each: membarrier is that for all threads at once.
    pub(crate) struct AsymmetricFence;

    #[derive(Debug)]
    pub(crate) struct NoBarrier;

    impl AsymmetricFence {
        pub(crate) fn new() -> AsymmetricFence {
            AsymmetricFence
        }

        pub(crate) fn light(&self) {
            fence(Ordering::SeqCst);
        }

        pub(crate) fn heavy(&self) -> Result<(), NoBarrier> {
            fence(Ordering::SeqCst);
            Ok(())
        }
    }

    pub(crate) const SLOTS: usize = 2;

    pub(crate) struct AtomicWords(Vec<AtomicU64>);

    pub(crate) type AtomicWord<'a> = &'a AtomicU64;

    /// Four of them.
    #[derive(Clone, Copy)]
    pub(crate) struct AtomicQuad<'a>(&'a [AtomicU64]);

    impl<'a> AtomicQuad<'a> {
        pub(crate) fn word(self, n: usize) -> AtomicWord<'a> {
            &self.0[n]
        }
    }

    impl AtomicWords {
        pub(crate) fn new(count: usize, value: u64) -> AtomicWords {
            AtomicWords((0..count).map(|_| AtomicU64::new(value)).collect())
        }

        pub(crate) fn word(&self, n: usize) -> AtomicWord<'_> {
            &self.0[n]
        }

        pub(crate) fn get_quad(&self, n: usize) -> Option<AtomicQuad<'_>> {
            self.0.get(4 * n..4 * n + 4).map(AtomicQuad)
        }

        pub(crate) fn quad(&self, n: usize) -> AtomicQuad<'_> {
            AtomicQuad(&self.0[4 * n..][..4])
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

/// One live entry with a body that holds 7, whose range a lookup reads beside it, and slots for so many threads.
fn one(threads: usize) -> Arc<Bodies> {
    let slab = Arc::new(Slab::new(1, threads));
    bring_up(&slab, 7);
    slab
}

fn bring_up(slab: &Bodies, body: u64) {
    slab.build(0);
    slab.words(0).word(USERS).store(body, Ordering::Release);
    slab.publish(0, Arc::new(body), 0);
}

/// Reads the body if the entry is alive, as a lookup does, and finds the words of the same life.
fn read(slab: &Bodies) -> Option<u64> {
    let (here, words) = (Here::ask(), slab.words(0));
    let state = State::of(here, words);
    let word = words.word(USERS).load_here(here, Ordering::Acquire);
    let claim = state.is_live().then(|| slab.claim(here, 0, words, state))??;
    let body = **slab.body(&claim);
    assert_eq!(word, body, "the words are another life's");
    slab.end(here, claim);
    Some(body)
}

/// As who finds it dead: takes it apart when it can.
fn take(slab: &Bodies) -> bool {
    let mut dead = Vec::new();
    slab.count_dead(std::iter::once(0), &mut dead);
    // Loom's cell reports whoever reads the body beside this.
    slab.take(&mut dead, |_, body| drop(body)).expect("there is a fence");
    if dead.is_empty() {
        slab.free(0);
    }
    dead.is_empty()
}

/// As a lookup of a batch does.
fn glance(slab: &Bodies) -> Option<u64> {
    let here = Here::ask();
    let pin = slab.pin();
    let seen = pin.see(here, 0)?;
    let word = slab.words(0).word(USERS).load_here(here, Ordering::Acquire);
    let body = **seen.body()?;
    assert_eq!(word, body, "the words are another life's");
    Some(body)
}

/// A lookup beside somebody who takes the entry apart and uses it again.
fn a_lookup_beside_a_taker(look: fn(&Bodies) -> Option<u64>, threads: usize) {
    loom::model(move || {
        let slab = one(threads);
        let reader = {
            let slab = Arc::clone(&slab);
            thread::spawn(move || {
                Here::set_thread(0);
                assert!(matches!(look(&slab), None | Some(7 | 8)));
            })
        };
        let state = slab.state(0);
        assert!(slab.kill(0, state));
        let taken = take(&slab);
        if taken {
            bring_up(&slab, 8);
        }
        reader.join().expect("it does not panic");
        assert!(taken || take(&slab), "the lease has ended");
    });
}

// With slots of its own, and without.
#[test]
fn a_leased_body_is_not_taken_apart() {
    [1, 0].into_iter().for_each(|threads| a_lookup_beside_a_taker(read, threads));
}

#[test]
fn what_is_seen_alive_under_a_pin_is_not_taken_apart() {
    [1, 0].into_iter().for_each(|threads| a_lookup_beside_a_taker(glance, threads));
}

#[test]
fn a_pin_of_a_later_epoch_keeps_nothing() {
    loom::model(|| {
        let slab = one(1);
        Here::set_thread(0);
        assert!(slab.kill(0, slab.state(0)));
        let mut dead = Vec::new();
        slab.count_dead(std::iter::once(0), &mut dead);
        let pin = slab.pin();
        assert!(pin.see(Here::ask(), 0).is_some_and(|seen| seen.body().is_none()), "it was dead before");
        let kept = slab.take(&mut dead, |_, body| drop(body)).expect("there is a fence");
        assert!(dead.is_empty() && !kept.by_pins);
    });
}

#[test]
fn an_entry_that_is_used_again_is_another() {
    loom::model(|| {
        let slab = one(1);
        let old = slab.state(0);
        let reader = {
            let slab = Arc::clone(&slab);
            thread::spawn(move || {
                Here::set_thread(0);
                // Of the first generation, or not at all: it was seen before.
                if let Some(held) = slab.lease(0, old) {
                    assert_eq!(**held.body(), 7);
                }
                assert!(matches!(read(&slab), None | Some(7 | 8)));
            })
        };
        assert!(slab.kill(0, old));
        if take(&slab) {
            bring_up(&slab, 8);
            assert_eq!(slab.state(0).generation(), old.generation() + 1);
        }
        reader.join().expect("it does not panic");
    });
}

/// Its reads must be over for whoever takes the entry apart after its slot was claimed again, by the thread that owns it.
#[test]
fn a_lease_may_end_in_another_thread_and_its_slot_be_claimed_again() {
    loom::model(|| {
        let slab: &'static Bodies = Box::leak(Box::new(Slab::new(2, 1)));
        bring_up(slab, 7);
        slab.build(1);
        slab.publish(1, Arc::new(9), 0);
        Here::set_thread(0);
        let (state, other) = (slab.state(0), slab.state(1));
        let held = slab.lease(0, state).expect("it is alive");
        let ender = thread::spawn(move || assert_eq!(**held.body(), 7));
        assert!(slab.kill(0, state));
        drop(slab.lease(1, other));
        let taken = take(slab);
        ender.join().expect("it does not panic");
        assert!(taken || take(slab));
    });
}

#[test]
fn an_entry_dies_once() {
    loom::model(|| {
        let slab = one(0);
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
        let slab = one(0);
        let state = slab.state(0);
        // Every slot is taken, so that the reader's is counted in the entry.
        let all: Vec<_> = (0..SLOTS).map_while(|_| slab.lease(0, state)).collect();
        assert_eq!(all.len(), SLOTS);
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
