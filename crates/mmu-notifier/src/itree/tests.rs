// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sequence of the interval notifiers against its definition, counted.

use interleave::Sleep;
use proptest::prelude::*;

use super::*;
use crate::{Invalidation, PAGE_SIZE, SeqMoved, SetSeq, WouldBlock};

#[derive(Debug, Clone)]
enum Step {
    Insert(Range),
    Remove(prop::sample::Index),
    Start(Range),
    End,
}

fn range() -> impl Strategy<Value = Range> {
    (0..12u64, 1..4u64).prop_map(|(at, n)| Range::new(at * PAGE_SIZE, n * PAGE_SIZE).unwrap())
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => range().prop_map(Step::Insert),
        2 => any::<prop::sample::Index>().prop_map(Step::Remove),
        3 => range().prop_map(Step::Start),
        3 => Just(Step::End),
    ]
}

/// Never called: the tests play the dispatch.
struct Nobody;

impl Invalidate for Nobody {
    fn invalidate(
        &self,
        _: Sleep<'_, '_>,
        _: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        Ok(seq.set())
    }
}

struct Counted {
    interval: Arc<Interval>,
    heard: u32,
    must_have_heard: u32,
    /// In the index; otherwise the insertion waits for the last end.
    placed: bool,
    /// Since the value became odd a range matched it, or it was inserted.
    collides: bool,
    /// Removed, and still called until the last end.
    leaving: bool,
}

proptest! {
    #[test]
    fn agrees_with_its_definition(steps in prop::collection::vec(step(), 0..80)) {
        let mut itree = Itree::new();
        let mut all: Vec<Counted> = Vec::new();
        let (mut active, mut odd) = (0, false);
        for step in steps {
            match step {
                Step::Insert(range) => {
                    let interval = itree.insert(range, Arc::new(Nobody));
                    let (placed, collides) = (!odd, active > 0);
                    odd |= collides;
                    all.push(Counted { interval, heard: 0, must_have_heard: 0, placed, collides, leaving: false });
                }
                Step::Remove(i) if !all.is_empty() => {
                    let i = i.index(all.len());
                    match itree.remove(&all[i].interval) {
                        Removal::Done(_) => {
                            prop_assert!(!odd || !all[i].placed, "a walk may be standing on it");
                            all.swap_remove(i);
                        }
                        Removal::AfterEndOf(seq) => {
                            prop_assert!(odd && all[i].placed);
                            prop_assert_eq!(seq.get(), itree.seq());
                            all[i].leaving = true;
                        }
                    }
                }
                Step::Start(range) => {
                    active += 1;
                    let (mut cursor, mut batch) = itree.start(range);
                    loop {
                        for hit in batch.iter().flatten() {
                            hit.seq.store(itree.seq(), Ordering::Release);
                            let c = all.iter_mut().find(|c| Arc::ptr_eq(&c.interval, hit)).expect("removed for good");
                            c.heard += 1;
                        }
                        if batch[batch.len() - 1].is_none() {
                            break;
                        }
                        batch = itree.more(&mut cursor);
                    }
                    for c in all.iter_mut().filter(|c| c.placed && c.interval.range.overlaps(range)) {
                        (c.must_have_heard, c.collides, odd) = (c.must_have_heard + 1, true, true);
                    }
                }
                Step::End if active > 0 => {
                    active -= 1;
                    let removed = itree.end();
                    let last = active == 0 && odd;
                    prop_assert_eq!(removed.is_some(), last, "the last end wakes, and only if somebody can wait");
                    if last {
                        odd = false;
                        prop_assert_eq!(removed.unwrap().len(), all.iter().filter(|c| c.leaving).count());
                        all.retain(|c| !c.leaving);
                        all.iter_mut().for_each(|c| (c.placed, c.collides) = (true, false));
                    }
                }
                Step::Remove(_) | Step::End => {}
            }
            prop_assert_eq!(itree.seq() & 1 == 1, odd);
            for c in &all {
                prop_assert_eq!(c.heard, c.must_have_heard);
                prop_assert_eq!(c.interval.seq.load(Ordering::Acquire) == itree.seq(), c.collides);
            }
        }
    }
}
