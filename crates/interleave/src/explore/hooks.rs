// SPDX-License-Identifier: MIT OR Apache-2.0
//! Panics of virtual threads: kept for the report, not printed.
//!
//! The panic hook of the process is wrapped once, at the first exploration. For threads that explore nothing it does
//! what the hook before it did.

use std::any::Any;
use std::cell::RefCell;
use std::sync::Once;

use crate::world;

thread_local! {
    /// Where the last panic of a virtual thread of this OS thread was, and what it said.
    static LAST: RefCell<(String, String)> = const { RefCell::new((String::new(), String::new())) };
}

pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if world::active().is_none() {
                return before(info);
            }
            let site = info.location().map(ToString::to_string).unwrap_or_default();
            let text = text(info.payload()).unwrap_or("(not a string)").to_owned();
            LAST.with(|last| *last.borrow_mut() = (site, text));
        }));
    });
}

fn text(payload: &dyn Any) -> Option<&str> {
    payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str))
}

/// The last panic, in words.
pub(super) fn last() -> String {
    LAST.with(|last| {
        let (site, text) = &*last.borrow();
        format!("at {site}: {text}")
    })
}

/// A panic with `payload`, in words; its place if it was the last.
pub(super) fn message(payload: &(dyn Any + Send)) -> String {
    let text = text(payload).unwrap_or("(not a string)");
    let known = LAST.with(|last| last.borrow().1 == text);
    if known { last() } else { format!("with: {text}") }
}
