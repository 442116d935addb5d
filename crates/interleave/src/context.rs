// SPDX-License-Identifier: MIT OR Apache-2.0
//! Contexts as types: what the running code may do is said by the token that it holds.
//!
//! | token | stands for | sleeping lock | spin lock | try-lock |
//! |---|---|---|---|---|
//! | [`MaySleep`] | process context | yes | yes | yes |
//! | [`NonBlock`] | process context between the kernel's `non_block_start` and `non_block_end` | no | yes | yes |
//! | [`Atomic`] | a spin lock is held, or preemption is off | no | yes | yes |
//!
//! Invariants: a token is lent for one call and cannot be copied, stored, sent or forged; a section that lends a
//! narrower token keeps the wider one borrowed until it ends. The types are backed by a per-thread count that
//! [`might_sleep`] reads, for the ways around the types: a second [`MaySleep::enter`], or
//! [`forge_may_sleep_against_the_rules`].
//!
//! A token does not outlive the call that lent it:
//! ```compile_fail,E0521
//! use interleave::MaySleep;
//! let mut kept: Option<&mut MaySleep<'_>> = None;
//! MaySleep::enter(|cx| kept = Some(cx));
//! ```
//! and does not leave its thread:
//! ```compile_fail,E0277
//! use interleave::MaySleep;
//! MaySleep::enter(|cx| {
//!     std::thread::scope(|s| {
//!         s.spawn(move || { let _cx: &mut MaySleep<'_> = cx; });
//!     });
//! });
//! ```
//! nor does one token stand in for another of a different call:
//! ```compile_fail
//! use interleave::MaySleep;
//! fn shorten<'s, 'l: 's>(cx: &'s mut MaySleep<'l>) -> &'s mut MaySleep<'s> { cx }
//! ```

use std::cell::Cell;
use std::marker::PhantomData;
use std::panic::Location;

use crate::lockdep;
use crate::task::{self, Section};

/// Makes a token invariant in its lifetime, and neither `Send` nor `Sync`.
type Brand<'c> = PhantomData<(Cell<&'c ()>, *mut ())>;

mod sealed {
    pub trait Sealed {}
}

/// Any context. Each of them may take spin locks and try-locks.
pub trait Context: sealed::Sealed {}

/// Process context: the holder may sleep.
#[derive(Debug)]
pub struct MaySleep<'c>(Brand<'c>);

/// Atomic context: a spin lock is held or preemption is off, and the holder must not sleep.
#[derive(Debug)]
pub struct Atomic<'c>(Brand<'c>);

/// Process context that must not block: try-locks and spin locks only (the kernel's `non_block_start`, since 5.4).
#[derive(Debug)]
pub struct NonBlock<'c>(Brand<'c>);

impl sealed::Sealed for MaySleep<'_> {}
impl Context for MaySleep<'_> {}
impl sealed::Sealed for Atomic<'_> {}
impl Context for Atomic<'_> {}
impl sealed::Sealed for NonBlock<'_> {}
impl Context for NonBlock<'_> {}

/// The thread is in a section that must not sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the thread must not sleep: {section} since {site}; leave that section first, or use a context that does not sleep"
)]
pub struct AtomicContext {
    /// What forbids it.
    pub section: Section,
    /// Where the outermost such section began.
    pub site: &'static Location<'static>,
}

impl MaySleep<'_> {
    /// Runs `f` in process context. This is the one root of all contexts, meant for thread entry points; it nests.
    ///
    /// # Panics
    /// If the thread is in an atomic or non-blocking section: the message names the place where that began.
    #[track_caller]
    pub fn enter<R>(f: impl FnOnce(&mut MaySleep<'_>) -> R) -> R {
        match MaySleep::try_enter(f) {
            Ok(r) => r,
            Err(e) => panic!("MaySleep::enter: {e}"),
        }
    }

    /// [`enter`](Self::enter) for code that does not know where it is called from.
    ///
    /// # Errors
    /// [`AtomicContext`] if the thread is in an atomic or non-blocking section; `f` is not called.
    pub fn try_enter<R>(f: impl FnOnce(&mut MaySleep<'_>) -> R) -> Result<R, AtomicContext> {
        if let Some((section, site)) = task::sleep_forbidden() {
            return Err(AtomicContext { section, site });
        }
        Ok(f(&mut MaySleep(PhantomData)))
    }

    /// Runs `f` where it must not block; [`might_sleep`] reports whoever sleeps in it all the same.
    #[track_caller]
    pub fn non_block<R>(&mut self, f: impl FnOnce(&mut NonBlock<'_>) -> R) -> R {
        let _section = task::enter(Section::NonBlock, Location::caller());
        f(&mut NonBlock(PhantomData))
    }
}

impl<'c> Atomic<'c> {
    /// For guards that have raised the preempt count themselves.
    pub(crate) fn lent() -> Atomic<'c> {
        Atomic(PhantomData)
    }
}

/// Runs `f` with preemption off.
#[track_caller]
pub fn preempt_disable<C: Context + ?Sized, R>(_cx: &mut C, f: impl FnOnce(&mut Atomic<'_>) -> R) -> R {
    let _section = task::enter(Section::Atomic, Location::caller());
    f(&mut Atomic::lent())
}

/// Says that the caller may sleep here. In a section that must not, this is a report of
/// [`SleepInAtomic`](lockdep::ReportKind::SleepInAtomic), or a panic under [`Policy::Panic`](lockdep::Policy::Panic).
/// Every operation of this crate that takes a [`MaySleep`] calls it.
#[track_caller]
#[inline]
pub fn might_sleep() {
    if let Some((section, site)) = task::sleep_forbidden() {
        lockdep::sleep_in_atomic(section, site, Location::caller());
    }
}

/// Forges the right to sleep out of any context, for drivers in a corpus that break the rule on purpose.
/// [`might_sleep`] still catches them.
pub fn forge_may_sleep_against_the_rules<C: Context + ?Sized, R>(
    _cx: &mut C,
    f: impl FnOnce(&mut MaySleep<'_>) -> R,
) -> R {
    f(&mut MaySleep(PhantomData))
}

/// The context of a callback that may sleep or may only try, as its caller decides at run time.
#[derive(Debug)]
pub enum Sleep<'a, 'c> {
    /// It may sleep.
    May(&'a mut MaySleep<'c>),
    /// Try-locks only: what would block must fail.
    TryOnly(&'a mut NonBlock<'c>),
}

impl<'c> Sleep<'_, 'c> {
    /// Lends the same context to a callee.
    pub fn reborrow(&mut self) -> Sleep<'_, 'c> {
        match self {
            Sleep::May(cx) => Sleep::May(cx),
            Sleep::TryOnly(cx) => Sleep::TryOnly(cx),
        }
    }
}

impl sealed::Sealed for Sleep<'_, '_> {}
impl Context for Sleep<'_, '_> {}

/// The context of a callback that is called with or without a spin lock held, depending on the kernel modelled.
#[derive(Debug)]
pub enum PageContext<'a, 'c> {
    /// It may sleep.
    May(&'a mut MaySleep<'c>),
    /// A spin lock is held.
    Atomic(&'a mut Atomic<'c>),
}

impl<'c> PageContext<'_, 'c> {
    /// Lends the same context to a callee.
    pub fn reborrow(&mut self) -> PageContext<'_, 'c> {
        match self {
            PageContext::May(cx) => PageContext::May(cx),
            PageContext::Atomic(cx) => PageContext::Atomic(cx),
        }
    }
}

impl sealed::Sealed for PageContext<'_, '_> {}
impl Context for PageContext<'_, '_> {}
