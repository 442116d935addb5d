// SPDX-License-Identifier: MIT OR Apache-2.0
//! Users of one driver beside each other, with no path of the mm at all: what the locks of binding, submitting and closing are
//! for. And what a driver leaves in its device's TLB when a user has taken a binding away.

use super::young::{Scene, scene};
use crate::path::{Path, X, Y, range};
use crate::scenario::Cell;
use drivers::{DeviceOp, Driver};
use interleave::explore::violation;
use interleave::{MaySleep, scope};

/// Two users, each with a page of its own, at the same time; a third one closes the driver.
pub static USERS: Path = Path { name: "users", kernel: "ioctl beside ioctl", ..super::young::YOUNG };

/// One user: what the device has cached afterwards.
pub static UNBOUND: Path = Path { name: "unbound", kernel: "unbind", ..super::young::YOUNG };

/// Binds a page, uses it, takes it away.
fn turn(cx: &mut MaySleep<'_>, cell: &Cell, driver: &dyn Driver, page: u64) {
    let Ok(binding) = driver.bind(cx, range(page), cell.access) else { return };
    // It may be closed by now.
    let _ = driver.access(cx, binding, DeviceOp::Read(page << 12));
    let _ = driver.unbind(cx, binding);
}

/// One execution of a cell of [`USERS`].
pub(super) fn beside(cx: &mut MaySleep<'_>, cell: &Cell) {
    let Some(Scene { stage, driver }) = scene(cx, cell) else { return };
    scope(cx, |s, _| {
        s.spawn("first", |cx| turn(cx, cell, &*driver, X));
        s.spawn("second", |cx| turn(cx, cell, &*driver, Y));
        s.spawn("closer", |cx| driver.close(cx));
    });
    stage.exit(cx);
}

/// One execution of a cell of [`UNBOUND`].
pub(super) fn unbound(cx: &mut MaySleep<'_>, cell: &Cell) {
    let Some(Scene { stage, driver }) = scene(cx, cell) else { return };
    turn(cx, cell, &*driver, X);
    let left = driver.context().cached(cx).len();
    if left > 0 {
        violation(|| format!("unbound: the device has {left} translations left in its TLB"));
    }
    driver.close(cx);
    stage.exit(cx);
}
