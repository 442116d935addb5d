// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small world that writes down all that it is told.

mod baton;
mod scope;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use super::{Id, Op, OpKind, World, active, install};
use crate::birth::Born;
use crate::lockdep::Report;
use crate::*;

static CLASS: LockClass = LockClass::new("world-test");
static INNER: LockClass = LockClass::new("world-test-inner");

/// In the world while this lives.
struct Inside(Option<&'static dyn World>);

fn inside(world: &'static dyn World) -> Inside {
    Inside(install(Some(world)))
}

impl Drop for Inside {
    fn drop(&mut self) {
        install(self.0);
    }
}

/// Grants all that is free, runs threads at once to their end, and wakes every waiter at once.
#[derive(Default)]
struct Recorder {
    log: RefCell<Vec<String>>,
    born: Cell<Id>,
    held: RefCell<BTreeMap<Id, bool>>,
    aborting: Cell<bool>,
    /// Run at the next point, as the engine's other threads would be.
    others: RefCell<Option<Box<dyn FnOnce()>>>,
    clock: Cell<Duration>,
}

impl Recorder {
    fn leaked() -> &'static Recorder {
        Box::leak(Box::default())
    }

    fn log(&self, line: String) {
        self.log.borrow_mut().push(line);
    }

    fn take(&self) -> Vec<String> {
        self.log.take()
    }
}

impl World for Recorder {
    fn birth(&self, born: &Born) -> Id {
        let id = self.born.replace(self.born.get() + 1);
        assert!(born.site.file().ends_with("world/tests.rs"), "{}", born.site);
        let class = born.class.map_or("-", LockClass::name);
        self.log(format!("born {:?} {id} {class} {}", born.kind, born.value.unwrap_or(0)));
        id
    }

    fn point(&self, op: &Op) -> bool {
        assert!(op.site.file().ends_with("world/tests.rs"), "{op:?}");
        let class = op.class.map_or(String::new(), |class| format!(" {}", class.name()));
        let object = op.object.map_or(String::new(), |id| format!(" {id}"));
        self.log(format!("{:?}{object}{class}", op.kind));
        if let Some(others) = self.others.take() {
            others();
        }
        let held = |value| self.held.borrow_mut().insert(op.object.unwrap_or(Id::MAX), value);
        match op.kind {
            OpKind::Lock | OpKind::LockShared => held(true) != Some(true),
            OpKind::TryLock | OpKind::TryLockShared => held(true) != Some(true),
            OpKind::Unlock | OpKind::UnlockShared => held(false) == Some(true),
            OpKind::Sleep(duration) => {
                self.clock.set(self.clock.get() + duration);
                true
            }
            OpKind::WaitCancel => false,
            OpKind::Wait(timeout) => timeout.is_none(),
            _ => true,
        }
    }

    fn noted(&self, op: &Op) {
        self.log(format!("{:?} {}", op.kind, op.class.map_or("-", LockClass::name)));
    }

    fn done(&self, op: &Op, value: u64) {
        let last = self.log.borrow_mut().pop().unwrap_or_default();
        assert!(last.starts_with(&format!("{:?}", op.kind)), "{last} is not {op:?}");
        self.log(format!("{last} = {value}"));
    }

    fn spawn(&self, op: &Op, name: &str, body: Box<dyn FnOnce() + Send>) -> Id {
        assert_eq!(op.kind, OpKind::Spawn);
        self.log(format!("Spawn {name}"));
        body();
        7
    }

    fn now(&self) -> Duration {
        self.clock.get()
    }

    fn aborting(&self) -> bool {
        self.aborting.get()
    }

    fn reported(&self, report: &Report) {
        self.log(format!("{:?}", report.kind));
    }
}

#[test]
fn a_world_hears_of_every_operation_before_it_happens() {
    let world = Recorder::leaked();
    let _inside = inside(world);
    MaySleep::enter(|cx| {
        let mutex = Mutex::with_digest(&CLASS, 5, |v| *v);
        *mutex.lock(cx) += 1;
        let guard = mutex.try_lock(cx).expect("free");
        assert!(mutex.try_lock(cx).is_none());
        drop(guard);
        assert_eq!(
            world.take(),
            [
                "born Mutex 0 world-test 5",
                "Lock 0 world-test",
                "Unlock 0 world-test = 6",
                "TryLock 0 world-test",
                "TryLock 0 world-test",
                "Unlock 0 world-test = 6",
            ]
        );

        let lock = RwLock::new(&CLASS, ());
        drop(lock.read(cx));
        drop(WriteGuard::downgrade(lock.write(cx)));
        drop(lock.try_read(cx).expect("free"));
        drop(lock.try_write(cx).expect("free"));
        assert_eq!(
            world.take(),
            [
                "born RwLock 1 world-test 0",
                "LockShared 1 world-test",
                "UnlockShared 1 world-test = 0",
                "Lock 1 world-test",
                "Downgrade 1 world-test = 0",
                "UnlockShared 1 world-test = 0",
                "TryLockShared 1 world-test",
                "UnlockShared 1 world-test = 0",
                "TryLock 1 world-test",
                "Unlock 1 world-test = 0",
            ]
        );

        let spin = SpinLock::new(&CLASS, ());
        drop(spin.lock(cx));
        drop(spin.try_lock(cx).expect("free"));
        let semaphore = Semaphore::new(&CLASS, 1);
        semaphore.down(cx);
        semaphore.up();
        assert!(semaphore.try_down(cx));
        assert_eq!(
            world.take(),
            [
                "born SpinLock 2 world-test 0",
                "Lock 2 world-test",
                "Unlock 2 world-test = 0",
                "TryLock 2 world-test",
                "Unlock 2 world-test = 0",
                "born Semaphore 3 world-test 1",
                "Down 3 world-test",
                "Up 3 world-test = 0",
                "TryDown 3 world-test",
            ]
        );

        let queue = WaitQueue::new(&CLASS);
        let mut tests = 0;
        queue.wait_event(cx, || {
            tests += 1;
            tests == 2
        });
        assert!(!queue.wait_event_timeout(cx, Duration::from_secs(1), || false));
        queue.wake_one();
        queue.wake_all();
        let guard = mutex.lock(cx);
        drop(queue.wait(cx, guard));
        assert_eq!(
            world.take(),
            [
                "born WaitQueue 4 world-test 0",
                "WaitPrepare 4 world-test",
                "Wait(None) 4 world-test",
                "WaitPrepare 4 world-test",
                "WaitCancel 4 world-test",
                "WaitPrepare 4 world-test",
                "Wait(Some(1s)) 4 world-test",
                "WakeOne 4 world-test",
                "WakeAll 4 world-test",
                "Lock 0 world-test",
                "WaitPrepare 4 world-test",
                "Unlock 0 world-test = 6",
                "Wait(None) 4 world-test",
                "Lock 0 world-test",
                "Unlock 0 world-test = 6",
            ]
        );
    });
}

#[test]
fn a_world_hears_of_atomics_threads_time_and_the_rest() {
    static STORAGE: PerThread<Cell<u32>> = PerThread::new(|| Cell::new(0));
    let world = Recorder::leaked();
    let _inside = inside(world);
    MaySleep::enter(|cx| {
        let atomic = AtomicU64::new(3);
        assert_eq!(atomic.load(Ordering::Acquire), 3);
        atomic.store(4, Ordering::Release);
        assert_eq!(atomic.fetch_add(1, Ordering::Relaxed), 4);
        assert_eq!(atomic.swap(9, Ordering::Relaxed), 5);
        assert_eq!(atomic.compare_exchange(1, 2, Ordering::SeqCst, Ordering::SeqCst), Err(9));
        fence(Ordering::SeqCst);
        let count = RefCount::new();
        count.get();
        assert!(!count.put());
        assert!(count.get_unless_zero());
        assert_eq!(
            world.take(),
            [
                "born Atomic 0 - 3",
                "Load 0 = 3",
                "Store 0 = 4",
                "Rmw 0 = 5",
                "Rmw 0 = 9",
                "Rmw 0 = 9",
                "Fence",
                "born Atomic 1 - 1",
                "Rmw 1 = 2",
                "Rmw 1 = 1",
                "Load 1 = 1",
                "Rmw 1 = 2",
            ]
        );

        let thread = spawn("worker", |_| 42);
        assert_eq!(thread.join(cx).expect("it does not panic"), 42);
        let panicked = spawn("bad", |_| -> () { panic!("on purpose") }).join(cx).expect_err("it panics");
        assert_eq!((panicked.thread.as_str(), panicked.message.as_str()), ("bad", "on purpose"));
        let mut borrowed = 1;
        scope(cx, |s, _| {
            s.spawn("scoped", |_| borrowed += 1);
        });
        assert_eq!(borrowed, 2);
        yield_now();
        spin_hint();
        let before = time::now();
        time::sleep(cx, Duration::from_secs(3600));
        assert_eq!(before.elapsed(), Duration::from_secs(3600));
        STORAGE.with(|n| n.set(1));
        let once = OnceCell::new();
        assert_eq!(once.get_or_init(cx, |_| 5), &5);
        assert_eq!(once.get(), Some(&5));
        assert_eq!(
            world.take(),
            [
                "Spawn worker",
                "Join(7)",
                "Spawn bad",
                "Join(7)",
                "Spawn scoped",
                "Join(7)",
                "Yield",
                "SpinHint",
                "Now",
                "Sleep(3600s)",
                "Now",
                "PerThread",
                "born Once 2 - 0",
                "Load 2",
                "Lock 2",
                "Unlock 2 = 0",
                "Load 2",
            ]
        );

        let (outer, inner) = (Mutex::new(&CLASS, ()), SpinLock::new(&INNER, ()));
        let _outer = outer.lock(cx);
        let _inner = inner.lock(cx);
        world.take();
        might_sleep();
        assert_eq!(world.take(), ["SleepInAtomic"]);
    });
}

#[test]
fn an_aborting_world_is_left_alone() {
    let world = Recorder::leaked();
    let _inside = inside(world);
    let (mutex, atomic, queue) = (Mutex::new(&CLASS, 1), AtomicU32::new(1), WaitQueue::new(&CLASS));
    let semaphore = Semaphore::new(&CLASS, 1);
    MaySleep::enter(|cx| {
        let guard = mutex.lock(cx);
        world.aborting.set(true);
        world.take();
        drop(guard);
        *mutex.lock(cx) += 1;
        atomic.fetch_add(1, Ordering::Relaxed);
        queue.wake_all();
        queue.wait_event(cx, || false);
        semaphore.down(cx);
        time::sleep(cx, Duration::from_secs(3600));
        yield_now();
        drop(SpinLock::new(&CLASS, ()).lock(cx));
    });
    assert_eq!(world.take(), [""; 0]);
    assert_eq!((mutex.into_inner(), atomic.into_inner()), (2, 2));
}

#[test]
fn an_aborting_world_is_asked_about_a_lock_that_another_thread_still_holds() {
    let world = Recorder::leaked();
    let _inside = inside(world);
    let mutex: &'static Mutex<u32> = Box::leak(Box::new(Mutex::new(&CLASS, 1)));
    MaySleep::enter(|cx| {
        // The holder is another thread to lockdep: its part of the thread's state is put aside.
        let guard = mutex.lock(cx);
        task::load(&task::Task::new());
        world.aborting.set(true);
        world.take();
        *world.others.borrow_mut() = Some(Box::new(move || drop(guard)));
        *mutex.lock(cx) += 1;
    });
    assert_eq!(world.take(), ["Lock 0 world-test"], "asked once, and nothing but that");
    world.aborting.set(false);
    MaySleep::enter(|cx| assert_eq!(*mutex.lock(cx), 2));
}

#[test]
fn a_lock_map_is_noted_and_is_no_scheduling_point() {
    static MAP: LockMap = LockMap::new(&INNER);
    let world = Recorder::leaked();
    let _inside = inside(world);
    MaySleep::enter(|cx| {
        let outer = Mutex::new(&CLASS, ());
        let _outer = outer.lock(cx);
        world.take();
        let section = MAP.acquire(cx);
        assert_eq!(lockdep::held().len(), 2, "part of the lock set");
        drop(section);
    });
    let log = world.take();
    assert_eq!(log[..2], ["MapAcquire world-test-inner", "MapRelease world-test-inner"]);
}

#[test]
fn each_object_has_one_world() {
    let message = |f: &mut dyn FnMut()| {
        let payload = catch_unwind(AssertUnwindSafe(f)).expect_err("the worlds differ");
        *payload.downcast::<String>().expect("with a message")
    };
    static CONST: AtomicU32 = AtomicU32::const_new(0);
    let plain = (line!() + 1, AtomicU32::new(0));
    let world = Recorder::leaked();
    let explored = {
        let _inside = inside(world);
        let text = message(&mut || plain.1.store(1, Ordering::Relaxed));
        let here = line!() - 1;
        assert!(text.contains("born outside exploration") && text.contains("used under it"), "{text}");
        assert!(text.contains(&format!("tests.rs:{}:", plain.0 - 1)), "{text}");
        assert!(text.contains(&format!("tests.rs:{here}:")), "{text}");
        let text = message(&mut || CONST.store(1, Ordering::Relaxed));
        assert!(text.contains("by a constant initialiser"), "{text}");
        AtomicBool::default().store(true, Ordering::Relaxed);
        (line!(), Mutex::new(&CLASS, 0))
    };
    assert!(active().is_none());
    let text = message(&mut || MaySleep::enter(|cx| drop(explored.1.lock(cx))));
    assert!(text.contains("born under exploration") && text.contains("used outside it"), "{text}");
    assert!(text.contains(&format!("tests.rs:{}:", explored.0)), "{text}");
    plain.1.store(2, Ordering::Relaxed);
    assert_eq!(size_of::<AtomicU32>(), 8);
}

#[test]
fn a_switch_of_virtual_threads_exchanges_all_that_a_thread_is() {
    static STORAGE: PerThread<Cell<u32>> = PerThread::new(|| Cell::new(0));
    let (tasks, slots) = ([task::Task::new(), task::Task::new()], per_thread::Slots::default());
    let running = Cell::new(0);
    let switch = || {
        task::save(&tasks[running.get()]);
        running.set(1 - running.get());
        task::load(&tasks[running.get()]);
        per_thread::swap(&slots);
    };
    let (a, b) = (Mutex::new(&CLASS, ()), SpinLock::new(&INNER, ()));
    MaySleep::enter(|cx| {
        let guard = a.lock(cx);
        let spin = b.lock(cx);
        STORAGE.with(|n| n.set(1));
        switch();
        assert!(lockdep::held().is_empty());
        assert!(task::sleep_forbidden().is_none());
        assert_eq!(STORAGE.with(Cell::get), 0);
        STORAGE.with(|n| n.set(2));
        switch();
        assert_eq!(lockdep::held().len(), 2);
        assert!(task::sleep_forbidden().is_some());
        assert_eq!(STORAGE.with(Cell::get), 1);
        drop((spin, guard));
    });
    assert!(lockdep::held().is_empty());
    switch();
    assert_eq!(STORAGE.with(Cell::get), 2);
}
