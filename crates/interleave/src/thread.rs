// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads.
use std::any::Any;

use crate::{MaySleep, might_sleep};

/// A thread panicked.
#[derive(Debug, thiserror::Error)]
#[error("thread `{thread}` panicked: {message}")]
pub struct Panicked {
    /// The name of the thread.
    pub thread: String,
    /// The message of the panic, where it was a string.
    pub message: String,
    /// What was thrown.
    pub payload: Box<dyn Any + Send>,
}

impl Panicked {
    fn new(thread: String, payload: Box<dyn Any + Send>) -> Panicked {
        let message = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
            (Some(s), _) => (*s).to_owned(),
            (_, Some(s)) => s.clone(),
            _ => "(not a string)".to_owned(),
        };
        Panicked { thread, message, payload }
    }
}

/// A thread that can be waited for. Dropped, it lets the thread run on.
pub struct JoinHandle<T> {
    name: String,
    inner: std::thread::JoinHandle<T>,
}

impl<T> JoinHandle<T> {
    /// Sleeps until the thread has ended.
    ///
    /// # Errors
    /// [`Panicked`] if it panicked.
    #[track_caller]
    pub fn join(self, _cx: &mut MaySleep<'_>) -> Result<T, Panicked> {
        might_sleep();
        self.inner.join().map_err(|p| Panicked::new(self.name, p))
    }

    /// The name of the thread.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Starts a thread in process context.
///
/// # Panics
/// If the system refuses a thread; see [`try_spawn`].
#[track_caller]
pub fn spawn<T: Send + 'static>(
    name: &str,
    f: impl FnOnce(&mut MaySleep<'_>) -> T + Send + 'static,
) -> JoinHandle<T> {
    match try_spawn(name, f) {
        Ok(handle) => handle,
        Err(e) => panic!("cannot start thread `{name}`: {e}"),
    }
}

/// Starts a thread in process context.
///
/// # Errors
/// The error of the system if it refuses a thread.
#[track_caller]
pub fn try_spawn<T: Send + 'static>(
    name: &str,
    f: impl FnOnce(&mut MaySleep<'_>) -> T + Send + 'static,
) -> std::io::Result<JoinHandle<T>> {
    let inner = std::thread::Builder::new().name(name.to_owned()).spawn(|| MaySleep::enter(f))?;
    Ok(JoinHandle { name: name.to_owned(), inner })
}

/// Threads that may borrow from `'env`.
pub struct Scope<'scope, 'env: 'scope> {
    inner: &'scope std::thread::Scope<'scope, 'env>,
}

/// A thread of a [`Scope`].
pub struct ScopedJoinHandle<'scope, T> {
    name: String,
    inner: std::thread::ScopedJoinHandle<'scope, T>,
}

/// Runs `f`, which may start threads that borrow, and waits for them all. `f` gets the context back, to lock and to join with.
///
/// # Panics
/// If a thread panicked that was not joined.
#[track_caller]
pub fn scope<'env, R>(
    cx: &mut MaySleep<'_>,
    f: impl for<'scope> FnOnce(&Scope<'scope, 'env>, &mut MaySleep<'_>) -> R,
) -> R {
    might_sleep();
    std::thread::scope(|inner| f(&Scope { inner }, cx))
}

impl<'scope> Scope<'scope, '_> {
    /// Starts a thread in process context.
    #[track_caller]
    pub fn spawn<T: Send + 'scope>(
        &self,
        name: &str,
        f: impl FnOnce(&mut MaySleep<'_>) -> T + Send + 'scope,
    ) -> ScopedJoinHandle<'scope, T> {
        match std::thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(self.inner, || MaySleep::enter(f))
        {
            Ok(inner) => ScopedJoinHandle { name: name.to_owned(), inner },
            Err(e) => panic!("cannot start thread `{name}`: {e}"),
        }
    }
}

impl<T> ScopedJoinHandle<'_, T> {
    /// Sleeps until the thread has ended.
    ///
    /// # Errors
    /// [`Panicked`] if it panicked.
    #[track_caller]
    pub fn join(self, _cx: &mut MaySleep<'_>) -> Result<T, Panicked> {
        might_sleep();
        self.inner.join().map_err(|p| Panicked::new(self.name, p))
    }
}

/// Lets others run.
#[track_caller]
pub fn yield_now() {
    std::thread::yield_now();
}

/// Says that the caller spins.
#[track_caller]
#[inline]
pub fn spin_hint() {
    std::hint::spin_loop();
}
