// SPDX-License-Identifier: MIT OR Apache-2.0
//! Users of one driver beside each other, with no path of the mm at all: what the locks of binding, submitting and closing are
//! for. What a driver leaves in its device's TLB when a user has taken a binding away. And an unmap that frees its pages before its
//! end, as one of many pages does.

use super::young::{Scene, scene};
use crate::oracle::Oracle;
use crate::path::{Path, X, Y, range};
use crate::scenario::Cell;
use drivers::{DeviceOp, Driver};
use interleave::explore::violation;
use interleave::{MaySleep, scope};
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

/// Binds a page, uses it, takes it away.
fn turn(cx: &mut MaySleep<'_>, cell: &Cell, driver: &dyn Driver, page: u64) {
    let Ok(binding) = driver.bind(cx, range(page), cell.access) else { return };
    // It may be closed by now.
    let _ = driver.access(cx, binding, DeviceOp::Read(page << 12));
    let _ = driver.unbind(cx, binding);
}

/// One execution of a cell of [`USERS`].
pub(super) fn beside(cx: &mut MaySleep<'_>, cell: &Cell) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    scope(cx, |s, _| {
        s.spawn("first", |cx| turn(cx, cell, &*driver, X));
        s.spawn("second", |cx| turn(cx, cell, &*driver, Y));
        s.spawn("closer", |cx| driver.close(cx));
    });
    stage.exit(cx);
}

/// One execution of a cell of [`SHARED`].
pub(super) fn shared(cx: &mut MaySleep<'_>, cell: &Cell) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    if let Ok(binding) = driver.bind(cx, range(X), cell.access) {
        scope(cx, |s, _| {
            for name in ["first", "second"] {
                s.spawn(name, |cx| {
                    let _ = driver.access(cx, binding, DeviceOp::Read(X << 12));
                });
            }
        });
    }
    driver.close(cx);
    stage.exit(cx);
}

/// One execution of a cell of [`GATHER`].
pub(super) fn gather(cx: &mut MaySleep<'_>, cell: &Cell) {
    let oracle = Arc::new(Oracle::new(cell.kind.holds, cell.path.explicit, false));
    let Some(Scene { stage, driver }) = scene(cx, cell, oracle, 1) else { return };
    if let Ok(binding) = driver.bind(cx, range(X), cell.access) {
        let read = |cx: &mut MaySleep<'_>| {
            let _ = driver.access(cx, binding, DeviceOp::Read(X << 12));
        };
        read(cx);
        scope(cx, |s, _| {
            s.spawn("mm", |cx| stage.dontneed(cx, range(X)));
            s.spawn("device", read);
        });
    }
    driver.close(cx);
    stage.exit(cx);
}

/// One execution of a cell of [`UNBOUND`].
pub(super) fn unbound(cx: &mut MaySleep<'_>, cell: &Cell) {
    let Some(Scene { stage, driver }) = scene(cx, cell, Arc::new(()), 8) else { return };
    turn(cx, cell, &*driver, X);
    let left = driver.context().cached(cx).len();
    if left > 0 {
        violation(|| format!("unbound: the device has {left} translations left in its TLB"));
    }
    driver.close(cx);
    stage.exit(cx);
}
