// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one thing that no rule of the oracle is about and that callbacks are there for: the mm asks whether a page is in use,
//! and a page that the device has just used is. A driver that says no keeps nothing safe less; its pages go first.

use crate::path::{Path, Stage, User, X, page, range};
use crate::scenario::{Cell, Facts};
use drivers::{Callback, Device, DeviceOp, Driver, Observer, Options, WorkMode};
use interleave::MaySleep;
use interleave::explore::violation;
use softmm::{FileKind, Machine};
use std::cell::RefCell;
use std::sync::Arc;

/// Stands in a cell for the question, and is none of the paths: one thread asks, after each use by the device.
pub static YOUNG: Path = Path {
    name: "young",
    kernel: "page_referenced, page_idle, test_young",
    file: FileKind::Regular,
    explicit: false,
    leaves_memory: true,
    writable: true,
    pages: 1,
    user: User::Uses,
    prepare: |cx, stage| stage.filled(cx),
    bound: |_, _| {},
    run: |_, _| {},
    other: None,
};

/// A process with two pages, and the driver of a cell open on it.
pub(super) struct Scene {
    pub(super) stage: Stage,
    pub(super) driver: Arc<dyn Driver>,
}

/// `gather`: pages that an unmap keeps before it flushes and frees.
pub(super) fn scene(
    cx: &mut MaySleep<'_>,
    cell: &Cell,
    observer: Arc<dyn Observer>,
    gather: usize,
) -> Option<Scene> {
    let machine = Machine::new(softmm::Config {
        frames: 10,
        tables: 12,
        swap_slots: 3,
        cpus: 2,
        words_per_page: 2,
        gather_batch: gather,
        fault_around: 1,
        profile: cell.profile,
    });
    let user = machine.new_mm().ok()?;
    let stage = Stage::new(machine, user, cell.path.file);
    (cell.path.prepare)(cx, &stage);
    let options = Options { callbacks: cell.callbacks, work: WorkMode::Manual, ..Options::default() };
    let driver = (cell.kind.open)(cx, &stage.mm, &Device::new(observer), options).ok()?;
    Some(Scene { stage, driver })
}

/// The driver is closed, and then the process ends.
pub(super) fn end(cx: &mut MaySleep<'_>, stage: &Stage, driver: &dyn Driver, facts: &RefCell<Facts>) {
    driver.close(cx);
    facts.borrow_mut().add(&driver.counts());
    stage.exit(cx);
}

/// One execution of a cell of [`YOUNG`].
pub(super) fn execute(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    if let Ok(binding) = driver.bind(cx, range(X), cell.access) {
        let mut asked = |what: &str, of: Callback, ask: &dyn Fn(&mut MaySleep<'_>) -> bool| {
            let used = driver.access(cx, binding, DeviceOp::Read(X << 12)).is_ok();
            if used && cell.kind.callbacks.contains(of) && !ask(cx) {
                violation(|| format!("young: {what} says that nobody uses what the device has just read"));
            }
        };
        let referenced = |cx: &mut MaySleep<'_>| match crate::oracle::mapped(&stage.mm, page(X)) {
            Some((frame, _)) => stage.machine.page_referenced(cx, frame),
            None => true,
        };
        // The first answer is the CPU's own.
        for _ in 0..3 {
            asked("page_referenced", Callback::ClearFlushYoung, &referenced);
        }
        asked("test_young", Callback::TestYoung, &|cx| stage.mm.test_young(cx, page(X)));
        asked("page_idle", Callback::ClearYoung, &|cx| {
            let frame = crate::oracle::mapped(&stage.mm, page(X));
            frame.is_none_or(|(frame, _)| stage.machine.page_idle_clear_refs(cx, frame) != Some(false))
        });
    }
    end(cx, &stage, &*driver, facts);
}
