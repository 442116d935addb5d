// SPDX-License-Identifier: MIT OR Apache-2.0
//! Users of one driver beside each other, with no path of the mm at all: what the locks of binding, submitting and closing are
//! for. What a driver leaves in its device's TLB when a user has taken a binding away. An unmap that frees its pages before its
//! end, as one of many pages does. And what a driver of the library holds when nobody asks any more.

use super::young::{Scene, end, scene};
use crate::oracle::{Oracle, mapped};
use crate::path::{Path, Stage, X, Y, page, range};
use crate::scenario::{Cell, Facts};
use drivers::{Binding, DeviceOp, Driver};
use interleave::explore::violation;
use interleave::{MaySleep, scope};
use std::cell::RefCell;
use std::sync::Arc;

/// Two users, each with a page of its own, at the same time; a third one closes the driver.
pub static USERS: Path = Path { name: "users", kernel: "ioctl beside ioctl", ..super::young::YOUNG };

/// Two users of one binding.
pub static SHARED: Path = Path { name: "shared", kernel: "submit beside submit", ..super::young::YOUNG };

/// One user: what the device has cached afterwards.
pub static UNBOUND: Path = Path { name: "unbound", kernel: "unbind", ..super::young::YOUNG };

/// One user beside an unmap whose batch is full at once.
pub static GATHER: Path =
    Path { name: "gather", kernel: "tlb_flush_mmu before the end", explicit: true, ..super::young::YOUNG };

/// Two users of one binding, of whom one takes it away and makes another; the other one has memory that is a hole, too.
pub static AGAIN: Path = Path { name: "again", kernel: "unbind beside submit", ..super::young::YOUNG };

/// One user beside an unmap: what is held once everybody has been told.
pub static GIVEN_UP: Path =
    Path { name: "given-up", kernel: "unpin_user_pages", explicit: true, ..super::young::YOUNG };

/// One user, and the process ends: what is held afterwards.
pub static EXITED: Path = Path { name: "exited", kernel: "exit_mmap", ..GIVEN_UP };

/// Two users, of whom one touches the page by the CPU first, beside an unmap that may be half way.
pub static TOUCHED: Path = Path { name: "touched", kernel: "madvise beside fault", ..GIVEN_UP };

/// Where nothing is mapped.
const HOLE: u64 = Y + 2;

/// The device reads a page. Whether it finds it is the path's business: it may be closed, or gone, by now.
fn read(cx: &mut MaySleep<'_>, driver: &dyn Driver, binding: Binding, page: u64) {
    let _ = driver.access(cx, binding, DeviceOp::Read(page << 12));
}

/// Binds a page, uses it, takes it away.
fn turn(cx: &mut MaySleep<'_>, cell: &Cell, driver: &dyn Driver, page: u64) {
    let Ok(binding) = driver.bind(cx, range(page), cell.access) else { return };
    read(cx, driver, binding, page);
    let _ = driver.unbind(cx, binding);
}

/// One execution of a cell of [`USERS`].
pub(super) fn beside(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    scope(cx, |s, _| {
        s.spawn("first", |cx| turn(cx, cell, &*driver, X));
        s.spawn("second", |cx| turn(cx, cell, &*driver, Y));
        s.spawn("closer", |cx| driver.close(cx));
    });
    end(cx, &stage, &*driver, facts);
}

/// One execution of a cell of [`SHARED`].
pub(super) fn shared(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    if let Ok(binding) = driver.bind(cx, range(X), cell.access) {
        scope(cx, |s, _| {
            for name in ["first", "second"] {
                s.spawn(name, |cx| read(cx, &*driver, binding, X));
            }
        });
    }
    end(cx, &stage, &*driver, facts);
}

/// One execution of a cell of [`GATHER`].
pub(super) fn gather(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    let oracle = Arc::new(Oracle::new(cell.kind.holds, cell.path.explicit, false));
    let Some(Scene { stage, driver }) = scene(cx, cell, oracle, 1) else { return };
    if let Ok(binding) = driver.bind(cx, range(X), cell.access) {
        let read = |cx: &mut MaySleep<'_>| read(cx, &*driver, binding, X);
        read(cx);
        scope(cx, |s, _| {
            s.spawn("mm", |cx| stage.dontneed(cx, range(X)));
            s.spawn("device", read);
        });
    }
    end(cx, &stage, &*driver, facts);
}

/// One execution of a cell of [`UNBOUND`].
pub(super) fn unbound(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    turn(cx, cell, &*driver, X);
    let left = driver.context().cached(cx).len();
    if left > 0 {
        violation(|| format!("unbound: the device has {left} translations left in its TLB"));
    }
    end(cx, &stage, &*driver, facts);
}

/// One execution of a cell of [`AGAIN`].
pub(super) fn again(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    if let Ok(binding) = driver.bind(cx, range(X), cell.access) {
        let read = |cx: &mut MaySleep<'_>| read(cx, &*driver, binding, X);
        read(cx);
        scope(cx, |s, _| {
            s.spawn("first", |cx| {
                let _ = driver.unbind(cx, binding);
                turn(cx, cell, &*driver, X);
            });
            s.spawn("second", |cx| {
                read(cx);
                turn(cx, cell, &*driver, HOLE);
            });
        });
    }
    end(cx, &stage, &*driver, facts);
}

/// When everybody has been told, nothing is held but what the process has.
fn judge_held(cx: &mut MaySleep<'_>, stage: &Stage, driver: &dyn Driver) {
    while driver.run_work(cx) {}
    let frames = stage.machine.frames();
    let used = frames.total_frames() - frames.free_frames();
    let pages = [X, Y].iter().filter(|&&n| mapped(&stage.mm, page(n)).is_some()).count();
    if used > pages {
        violation(|| format!("given up: {used} pages are held, of which the process has {pages}"));
    }
}

/// One execution of a cell of [`EXITED`].
pub(super) fn exited(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    if let Ok(binding) = driver.bind(cx, range(X), cell.access) {
        read(cx, &*driver, binding, X);
        stage.exit(cx);
        judge_held(cx, &stage, &*driver);
    }
    end(cx, &stage, &*driver, facts);
}

/// One execution of a cell of [`GIVEN_UP`].
pub(super) fn given_up(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    if let Ok(binding) = driver.bind(cx, range(X), cell.access) {
        let read = |cx: &mut MaySleep<'_>| read(cx, &*driver, binding, X);
        scope(cx, |s, _| {
            s.spawn("mm", |cx| stage.dontneed(cx, range(X)));
            s.spawn("device", read);
        });
        judge_held(cx, &stage, &*driver);
    }
    end(cx, &stage, &*driver, facts);
}

/// One execution of a cell of [`TOUCHED`].
pub(super) fn touched(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    let oracle = Arc::new(Oracle::new(cell.kind.holds, cell.path.explicit, false));
    let Some(Scene { stage, driver }) = scene(cx, cell, oracle, 8) else { return };
    if let Ok(binding) = driver.bind(cx, range(X), cell.access) {
        let read = |cx: &mut MaySleep<'_>| read(cx, &*driver, binding, X);
        scope(cx, |s, _| {
            s.spawn("mm", |cx| stage.dontneed(cx, range(X)));
            s.spawn("first", read);
            s.spawn("second", |cx| {
                stage.store(cx, X, 2);
                read(cx);
            });
        });
    }
    end(cx, &stage, &*driver, facts);
}
