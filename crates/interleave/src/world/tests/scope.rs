// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scoped virtual threads borrow: `scope` does not end, neither by returning nor by unwinding, before their
//! closures are gone.

use std::cell::{Cell, RefCell};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::time::Duration;

use super::inside;
use crate::birth::Born;
use crate::lockdep::Report;
use crate::world::{Id, Op, OpKind, World};
use crate::*;

/// The same on every Linux.
const SIGABRT: i32 = 6;

type Body = Box<dyn FnOnce() + Send>;

/// What a join does to the virtual thread, which has not run before.
#[derive(Clone, Copy, Default, PartialEq)]
enum AtJoin {
    #[default]
    Runs,
    /// The first join unwinds the joining thread; the joins after that drop the threads.
    Unwinds,
    /// A broken engine.
    Nothing,
}

/// Starts virtual threads as late as it can.
#[derive(Default)]
struct Late {
    at_join: Cell<AtJoin>,
    refuses: Cell<bool>,
    bodies: RefCell<Vec<Option<Body>>>,
    aborting: Cell<bool>,
    joins: Cell<u32>,
}

fn late(at_join: AtJoin) -> &'static Late {
    let world: &'static Late = Box::leak(Box::default());
    world.at_join.set(at_join);
    world
}

impl World for Late {
    fn birth(&self, _: &Born) -> Id {
        0
    }

    fn point(&self, op: &Op) -> bool {
        let OpKind::Join(id) = op.kind else { return true };
        self.joins.set(self.joins.get() + 1);
        match self.at_join.get() {
            AtJoin::Nothing => {}
            AtJoin::Unwinds if !self.aborting.replace(true) => resume_unwind(Box::new("the engine's")),
            AtJoin::Unwinds => drop(self.bodies.borrow_mut()[id as usize].take()),
            AtJoin::Runs => {
                let body = self.bodies.borrow_mut()[id as usize].take();
                if let Some(body) = body {
                    body();
                }
            }
        }
        true
    }

    fn noted(&self, _: &Op) {}

    fn done(&self, _: &Op, _: u64) {}

    fn spawn(&self, _: &Op, _: &str, body: Body) -> Id {
        if self.refuses.get() {
            resume_unwind(Box::new("the engine's"));
        }
        let mut bodies = self.bodies.borrow_mut();
        bodies.push(Some(body));
        bodies.len() as Id - 1
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn aborting(&self) -> bool {
        self.aborting.get()
    }

    fn reported(&self, report: &Report) {
        panic!("{report}");
    }
}

/// Counts itself when it is dropped, in memory that a closure borrows.
struct Counted<'a>(&'a std::sync::Mutex<u32>);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        *self.0.lock().expect("not poisoned") += 1;
    }
}

/// Two threads that borrow `gone`, and count themselves there when their closures go. Then `end`.
fn two_threads(gone: &std::sync::Mutex<u32>, end: impl FnOnce()) {
    MaySleep::enter(|cx| {
        scope(cx, |s, _| {
            for name in ["one", "two"] {
                let counted = Counted(gone);
                s.spawn(name, move |_| drop(counted));
            }
            assert_eq!(*gone.lock().expect("not poisoned"), 0, "nobody has run");
            end();
        });
    });
}

#[test]
fn a_scope_that_returns_waits_for_all() {
    let world = late(AtJoin::Runs);
    let _inside = inside(world);
    let gone = std::sync::Mutex::new(0);
    two_threads(&gone, || ());
    assert_eq!((*gone.lock().expect("not poisoned"), world.joins.get()), (2, 2));
}

#[test]
fn a_scope_that_panics_waits_for_all() {
    let world = late(AtJoin::Runs);
    let _inside = inside(world);
    let gone = std::sync::Mutex::new(0);
    let panicked = catch_unwind(AssertUnwindSafe(|| two_threads(&gone, || panic!("on purpose"))));
    assert!(panicked.is_err());
    assert_eq!((*gone.lock().expect("not poisoned"), world.joins.get()), (2, 2));
}

#[test]
fn a_scope_that_the_engine_unwinds_while_it_waits_waits_on() {
    let world = late(AtJoin::Unwinds);
    let _inside = inside(world);
    let gone = std::sync::Mutex::new(0);
    let unwound = catch_unwind(AssertUnwindSafe(|| two_threads(&gone, || ())));
    let payload = unwound.expect_err("the engine's payload goes on").downcast::<&str>().expect("a str");
    assert_eq!(*payload, "the engine's");
    assert_eq!((*gone.lock().expect("not poisoned"), world.joins.get()), (2, 3));
}

#[test]
fn a_start_that_is_unwound_leaves_nothing_behind() {
    let world = late(AtJoin::Runs);
    world.refuses.set(true);
    let _inside = inside(world);
    let gone = std::sync::Mutex::new(0);
    let unwound = catch_unwind(AssertUnwindSafe(|| two_threads(&gone, || ())));
    assert!(unwound.is_err());
    assert_eq!((*gone.lock().expect("not poisoned"), world.joins.get()), (1, 0), "the one that was to start");
}

#[test]
fn an_engine_that_leaves_a_borrowing_thread_behind_kills_the_process() {
    const CHILD: &str = "INTERLEAVE_TEST_SCOPE_CHILD";
    const NAME: &str =
        "world::tests::scope::an_engine_that_leaves_a_borrowing_thread_behind_kills_the_process";
    if std::env::var_os(CHILD).is_some() {
        let _inside = inside(late(AtJoin::Nothing));
        two_threads(&std::sync::Mutex::new(0), || ());
        return;
    }
    let program = std::env::current_exe().expect("the test's own program");
    let child = Command::new(program).args(["--exact", NAME]).env(CHILD, "1").output().expect("it starts");
    assert_eq!(child.status.signal(), Some(SIGABRT), "{child:?}");
}
