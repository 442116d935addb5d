// SPDX-License-Identifier: MIT OR Apache-2.0
//! The index against a plain vector.

use super::node::{FANOUT, MIN, NOWHERE};
use super::*;
use crate::PAGE_SIZE;
use proptest::prelude::*;

impl<T> IntervalIndex<T> {
    /// Panics where an invariant of the module documentation does not hold.
    fn check(&self) {
        if self.root == NONE {
            assert_eq!(self.len, 0);
            assert_eq!(self.free_nodes.len(), self.nodes.len(), "every node is free");
            return;
        }
        assert_eq!(self.nodes[self.root as usize].parent, NONE);
        let mut leaf_depths = Vec::new();
        let mut starts = Vec::new();
        let mut seen = 0;
        self.check_node(self.root, 0, true, &mut leaf_depths, &mut starts, &mut seen);
        leaf_depths.dedup();
        assert_eq!(leaf_depths.len(), 1, "leaves at several depths");
        assert!(starts.is_sorted());
        assert_eq!(starts.len(), self.len);
        assert_eq!(seen + self.free_nodes.len(), self.nodes.len(), "a node leaked");
    }

    fn check_node(
        &self,
        at: u32,
        depth: usize,
        spine: bool,
        leaf_depths: &mut Vec<usize>,
        starts: &mut Vec<u64>,
        seen: &mut usize,
    ) {
        *seen += 1;
        let node = &self.nodes[at as usize];
        assert!(depth < MAX_DEPTH && (1..=FANOUT).contains(&node.len()));
        assert!(spine || node.len() >= MIN, "{} entries off the right spine", node.len());
        assert!(at != self.root || node.leaf || node.len() > 1);
        for i in node.len()..FANOUT {
            assert_eq!((node.starts[i], node.ends[i], node.ptrs[i]), (NOWHERE, 0, NONE));
        }
        if node.leaf {
            leaf_depths.push(depth);
        }
        for i in 0..node.len() {
            let e = node.entry(i);
            if node.leaf {
                let slot = &self.slots[e.ptr as usize];
                assert!(slot.value.is_some() && slot.leaf == at && e.start < e.end);
                starts.push(e.start);
            } else {
                let s = self.summary(e.ptr);
                assert_eq!((e.start, e.end, at), (s.start, s.end, self.nodes[e.ptr as usize].parent));
                let spine = spine && i + 1 == node.len();
                self.check_node(e.ptr, depth + 1, spine, leaf_depths, starts, seen);
            }
        }
    }
}

fn range() -> impl Strategy<Value = Range> {
    let pages = prop_oneof![4 => 1..4u64, 1 => 1..200u64];
    (0..300u64, pages).prop_map(|(at, pages)| Range::new(at * PAGE_SIZE, pages * PAGE_SIZE).unwrap())
}

#[derive(Debug, Clone)]
enum Step {
    Insert(Range),
    InsertMany(Range, usize),
    Ascending(u64, usize),
    Remove(prop::sample::Index),
    RemoveMany(prop::sample::Index, usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => range().prop_map(Step::Insert),
        1 => (range(), 1..60usize).prop_map(|(r, n)| Step::InsertMany(r, n)),
        1 => (0..300u64, 1..60usize).prop_map(|(at, n)| Step::Ascending(at, n)),
        3 => any::<prop::sample::Index>().prop_map(Step::Remove),
        1 => (any::<prop::sample::Index>(), 1..120usize).prop_map(|(i, n)| Step::RemoveMany(i, n)),
    ]
}

proptest! {
    #[test]
    fn finds_what_a_vector_finds(
        steps in prop::collection::vec(step(), 0..120),
        probes in prop::collection::vec(range(), 1..20),
    ) {
        let mut index = IntervalIndex::new();
        let mut naive: Vec<(Key, Range, u32)> = Vec::new();
        let mut id = 0;
        let mut insert = |index: &mut IntervalIndex<u32>, naive: &mut Vec<_>, range| {
            naive.push((index.insert(range, id), range, id));
            id += 1;
        };
        for step in steps {
            match step {
                Step::Insert(range) => insert(&mut index, &mut naive, range),
                Step::InsertMany(range, n) => (0..n).for_each(|_| insert(&mut index, &mut naive, range)),
                Step::Ascending(at, n) => {
                    for i in 0..n as u64 {
                        insert(&mut index, &mut naive, Range::new((at + i) * PAGE_SIZE, PAGE_SIZE).unwrap());
                    }
                }
                Step::Remove(i) if !naive.is_empty() => {
                    let (key, range, id) = naive.remove(i.index(naive.len()));
                    prop_assert_eq!(index.get(key), Some((range, &id)));
                    prop_assert_eq!(index.remove(key), Some(id));
                    prop_assert_eq!(index.remove(key), None);
                    prop_assert_eq!(index.get(key), None);
                }
                Step::RemoveMany(i, n) if !naive.is_empty() => {
                    let from = i.index(naive.len());
                    for (key, _, id) in naive.drain(from..(from + n).min(naive.len())).collect::<Vec<_>>() {
                        prop_assert_eq!(index.remove(key), Some(id));
                    }
                }
                Step::Remove(_) | Step::RemoveMany(..) => {}
            }
            index.check();
            prop_assert_eq!(index.len(), naive.len());
        }
        for probe in probes {
            let got: Vec<_> = index.overlaps(probe).map(|(k, r, &id)| (k, r, id)).collect();
            let mut want: Vec<_> = naive.iter().copied().filter(|(_, r, _)| r.overlaps(probe)).collect();
            want.sort_by_key(|(_, r, id)| (r.start(), *id));
            prop_assert_eq!(got, want);
        }
    }
}

#[test]
fn many_then_none() {
    let mut index = IntervalIndex::new();
    let at = |i: u64| Range::new(i * PAGE_SIZE, PAGE_SIZE).unwrap();
    let keys: Vec<_> = (0..50_000u64).map(|i| index.insert(at(i * 7919 % 50_000), i)).collect();
    index.check();
    assert_eq!(index.overlaps(at(123)).count(), 1);
    assert_eq!(index.overlaps(Range::ALL).count(), 50_000);
    for &key in keys.iter().rev() {
        index.remove(key).unwrap();
    }
    index.check();
    assert!(index.is_empty() && index.overlaps(Range::ALL).next().is_none());
}
