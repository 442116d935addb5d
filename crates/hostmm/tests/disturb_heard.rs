// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two sources hear of each event what the catalogue declares, and the kvm source in time: before the changing
//! system call has returned and before another thread can see the new bytes.

use std::cell::Cell;
use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::disturb::{Arena, Change, DisturbError, Event, Observer, Via, catalogue};
use hostmm::kvm::{KvmSource, Options};
use hostmm::testing::{in_child, require, scratch, skip, skip_rest};
use hostmm::uffd::{self, UffdSource};
use interleave::{AtomicBool, Ordering};
use mmu_notifier::PageAddr;

const DEADLINE: Duration = Duration::from_secs(90);

/// Run `body` for every event that this machine can make, each in a child; fail with all that failed.
fn for_every_event(test: &str, body: impl Fn(&Event, &mut Arena)) {
    let mut failed = Vec::new();
    for event in catalogue() {
        let run = || {
            let mut arena = Arena::new(scratch(env!("CARGO_TARGET_TMPDIR")));
            match event.needs.iter().find_map(|need| Some((need.capability(), need.missing(&arena)?))) {
                Some((capability, why)) => skip(capability, &why),
                None => body(event, &mut arena),
            }
        };
        let name = format!("{test}#{}", event.name);
        let run = std::panic::AssertUnwindSafe(|| in_child(&name, DEADLINE, run));
        if let Err(panic) = std::panic::catch_unwind(run) {
            failed.push(panic.downcast_ref::<String>().cloned().unwrap_or_default());
        }
    }
    assert!(failed.is_empty(), "{} events:\n{}", failed.len(), failed.join("\n"));
}

/// A kernel thread that has better things to do is no failure of ours; anything else is.
fn not_today(event: &Event, error: &DisturbError) -> ! {
    if event.via == Via::KernelThread && matches!(error, DisturbError::Timeout { .. }) {
        skip_rest("kernel_thread", &error.to_string());
    }
    panic!("{}: {error}", event.name)
}

#[test]
fn kvm_hears_what_is_declared_and_in_time() {
    if !require(Capability::DevKvm) || !require(Capability::KvmTracepoint) {
        return;
    }
    for_every_event("kvm_hears_what_is_declared_and_in_time", |event, arena| {
        let mut scene = event.setup(arena).unwrap_or_else(|e| not_today(event, &e));
        let options =
            Options { window: Some(scene.changed()), buckets: None, age: true, ..Options::default() };
        let source = KvmSource::open(&options).unwrap();
        let watch = source.watch(scene.changed()).unwrap();
        let (seq, age) = (watch.snapshot().unwrap(), watch.age_snapshot().unwrap().unwrap());
        // Ageing is a notification of its own kind; reclaim and DAMON age the pages of other events too.
        let ageing = event.name == "page_ageing";
        let heard = || if ageing { watch.aged_since(age) } else { watch.changed_since(seq) };
        let at_return = Cell::new(None);
        let observer = Observer::new(scene.watched(), scene.before());
        // What the source said at the first sight; there is one if there was a sight.
        let at_sight = AtomicBool::new(false);
        let visible = scene.is_visible();
        let mut act = || {
            let done = scene.disturb(&mut || at_return.set(Some(heard())));
            done.unwrap_or_else(|e| not_today(event, &e))
        };
        let change = if visible {
            let seen = |_| {
                at_sight.store(heard(), Ordering::Release);
            };
            let (change, sight) = observer.during(&seen, act);
            assert!(sight.is_some(), "{}: the observer must see it", event.name);
            change
        } else {
            act()
        };
        let declared = event.expect.kvm_delivers;
        println!("{:30} heard {}", event.name, heard());
        assert_eq!(change, Change::Happened, "{}", event.name);
        assert_eq!(at_return.get(), Some(declared), "{}: when the call had returned", event.name);
        assert_eq!(heard(), declared, "{}: in the end", event.name);
        if visible {
            assert_eq!(
                at_sight.load(Ordering::Acquire),
                declared,
                "{}: when another thread saw it",
                event.name
            );
        }
    });
}

#[test]
fn uffd_hears_what_is_declared() {
    if !require(Capability::Userfaultfd) {
        return;
    }
    for_every_event("uffd_hears_what_is_declared", |event, arena| {
        let mut scene = event.setup(arena).unwrap_or_else(|e| not_today(event, &e));
        let source = UffdSource::open(&uffd::Options::default()).unwrap();
        let watched = source.watch(scene.changed()).and_then(|watch| Ok((watch.snapshot()?, watch)));
        let refused = watched.as_ref().err().map(ToString::to_string);
        let change = scene.disturb(&mut || {}).unwrap_or_else(|e| not_today(event, &e));
        assert_eq!(change, Change::Happened, "{}", event.name);
        let heard = watched.is_ok_and(|(seq, watch)| watch.changed_since_strict(seq));
        println!("{:30} heard {heard} refused {refused:?}", event.name);
        assert_eq!(heard, event.expect.uffd_delivers, "{}", event.name);
    });
}

/// A sight is an answer to the change, not to the looking.
#[test]
fn an_observer_sees_nothing_where_nothing_changes() {
    in_child("an_observer_sees_nothing_where_nothing_changes", DEADLINE, || {
        let word = Box::new([7_u64; 1024]);
        let page = PageAddr::containing(word.as_ptr() as u64 + 4096).unwrap();
        let observer = Observer::new(mmu_notifier::Range::page(page), 7);
        let (three, sight) = observer.during(&|_| panic!("saw a change"), || 3);
        assert_eq!((three, sight), (3, None));
    });
}
