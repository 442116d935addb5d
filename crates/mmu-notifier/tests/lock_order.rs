// SPDX-License-Identifier: MIT OR Apache-2.0
//! What lockdep learns from the fake lock around starts and ends: every mistake here is reported the first time that
//! both halves of it have happened, in whatever order, and no thread has to hang for it.

use std::sync::Arc;

use interleave::lockdep::{ReportKind, reports_about};
use interleave::{LockClass, LockMap, MaySleep, Mutex};
use mmu_notifier::*;

/// A driver whose callbacks take its lock.
struct Driver(Mutex<()>);

impl Driver {
    fn new(class: &'static LockClass) -> Arc<Driver> {
        Arc::new(Driver(Mutex::new(class, ())))
    }
}

impl Invalidate for Driver {
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        _: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        let _table = self.0.lock(cx);
        Ok(seq.set())
    }
}

impl MmuNotifier for Driver {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        let _table = self.0.lock(cx);
        Ok(())
    }
}

fn range() -> Range {
    Range::new(0x10_0000, 0x1000).unwrap()
}

fn invalidate(cx: &mut MaySleep<'_>, mm: &NotifierSubscriptions) {
    mm.invalidate_range_start(cx, Invalidation::new(range(), Event::Unmap)).invalidate_range_end(cx);
}

fn assert_inversion(class: &'static LockClass, with: &LockClass) {
    let reports = reports_about(class);
    let found =
        reports.iter().any(|r| r.kind == ReportKind::Inversion && r.classes.iter().any(|c| c == with.name()));
    assert!(found, "no inversion of {} and {} in {reports:?}", class.name(), with.name());
}

#[test]
fn a_callback_lock_must_not_be_held_while_memory_is_allocated() {
    static CLASS: LockClass = LockClass::new("driver that allocates");
    static RECLAIM: LockMap = LockMap::new(&FS_RECLAIM);
    MaySleep::enter(|cx| {
        let (mm, driver) = (NotifierSubscriptions::new(Rules::default()), Driver::new(&CLASS));
        let _notifier = mm.insert_interval(cx, range(), driver.clone()).unwrap();
        invalidate(cx, &mm);
        assert!(reports_about(&CLASS).is_empty(), "nothing is wrong yet");
        let table = driver.0.lock(cx);
        drop(RECLAIM.acquire(cx));
        drop(table);
        assert_inversion(&CLASS, &FS_RECLAIM);
    });
}

#[test]
fn read_begin_must_not_be_called_with_a_lock_that_the_callback_takes() {
    static CLASS: LockClass = LockClass::new("driver that reads");
    MaySleep::enter(|cx| {
        let (mm, driver) = (NotifierSubscriptions::new(Rules::default()), Driver::new(&CLASS));
        let notifier = mm.insert_interval(cx, range(), driver.clone()).unwrap();
        invalidate(cx, &mm);
        let table = driver.0.lock(cx);
        notifier.read_begin(cx).unwrap();
        drop(table);
        assert_inversion(&CLASS, &INVALIDATE_START);
    });
}

#[test]
fn remove_must_not_be_called_with_a_lock_that_the_callback_takes() {
    static CLASS: LockClass = LockClass::new("driver that removes");
    MaySleep::enter(|cx| {
        let (mm, driver) = (NotifierSubscriptions::new(Rules::default()), Driver::new(&CLASS));
        let notifier = mm.insert_interval(cx, range(), driver.clone()).unwrap();
        invalidate(cx, &mm);
        let table = driver.0.lock(cx);
        notifier.remove(cx).unwrap();
        drop(table);
        assert_inversion(&CLASS, &INVALIDATE_START);
    });
}

#[test]
fn unregister_must_not_be_called_with_a_lock_that_the_callback_takes() {
    static CLASS: LockClass = LockClass::new("driver that unregisters");
    MaySleep::enter(|cx| {
        let (mm, driver) = (NotifierSubscriptions::new(Rules::default()), Driver::new(&CLASS));
        let registration = mm.register(cx, driver.clone()).unwrap();
        invalidate(cx, &mm);
        let table = driver.0.lock(cx);
        registration.unregister(cx).unwrap();
        drop(table);
        assert_inversion(&CLASS, &INVALIDATE_START);
    });
}
