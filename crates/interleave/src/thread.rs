// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads: of the system, or virtual ones under exploration. Each starts in process context and has a name.

use std::any::Any;
use std::cell::RefCell;
use std::io;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::thread::Builder;

use crate::lockdep::Site;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};
use crate::world::{self, Id, Op, OpKind, World};
use crate::{MaySleep, might_sleep};

/// A thread panicked.
#[derive(Debug, thiserror::Error)]
#[error("thread `{thread}` panicked: {message}")]
pub struct Panicked {
    /// The name of the thread.
    pub thread: String,
    /// The message of the panic, where it was a string.
    pub message: String,
    /// What was thrown, for [`resume_unwind`].
    pub payload: Box<dyn Any + Send>,
}

impl Panicked {
    fn new(thread: String, payload: Box<dyn Any + Send>) -> Panicked {
        let message = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
            (Some(text), _) => (*text).to_owned(),
            (_, Some(text)) => text.clone(),
            _ => "(not a string)".to_owned(),
        };
        Panicked { thread, message, payload }
    }
}

/// A thread that can be waited for. Dropped, it lets the thread run on.
#[derive(Debug)]
pub struct JoinHandle<T> {
    name: String,
    thread: Running<std::thread::JoinHandle<T>, T>,
}

#[derive(Debug)]
enum Running<Plain, T> {
    Plain(Plain),
    Explored(Virtual<T>),
}

/// A virtual thread, with what it will have returned.
#[derive(Debug)]
struct Virtual<T> {
    id: Id,
    born: Site,
    outcome: Arc<Mutex<Option<std::thread::Result<T>>>>,
    progress: Arc<Progress>,
}

/// How far a virtual thread is, whatever it returns.
#[derive(Debug, Default)]
struct Progress {
    /// Its closure is gone, and all that it borrowed or returned is gone or handed over.
    gone: AtomicBool,
    /// It panicked, and nobody has been told.
    panicked: AtomicBool,
}

impl<T> JoinHandle<T> {
    /// Sleeps until the thread has ended.
    ///
    /// # Errors
    /// [`Panicked`] if it panicked.
    #[track_caller]
    pub fn join(self, _cx: &mut MaySleep<'_>) -> Result<T, Panicked> {
        might_sleep();
        let result = match self.thread {
            Running::Plain(thread) => thread.join(),
            Running::Explored(thread) => thread.join(Location::caller()),
        };
        result.map_err(|payload| Panicked::new(self.name, payload))
    }

    /// The name of the thread.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl<T> Virtual<T> {
    fn join(self, site: Site) -> std::thread::Result<T> {
        let Some(world) = world::active() else {
            panic!("a thread started under exploration at {} is joined outside it at {site}", self.born);
        };
        if !world.aborting() {
            world.point(&op(OpKind::Join(self.id), site));
        }
        self.progress.panicked.store(false, Ordering::Relaxed);
        self.outcome.lock().take().unwrap_or_else(|| Err(Box::new("its execution was abandoned")))
    }
}

fn op(kind: OpKind, site: Site) -> Op {
    Op { kind, object: None, class: None, site }
}

/// Starts a thread in process context.
///
/// # Panics
/// If the system refuses a thread; [`try_spawn`] returns that as an error.
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

/// Starts a thread in process context. The system may cut its copy of the name (Linux: 15 bytes).
///
/// # Errors
/// The system's, if it refuses a thread, or `InvalidInput` if `name` has a zero byte.
#[track_caller]
pub fn try_spawn<T: Send + 'static>(
    name: &str,
    f: impl FnOnce(&mut MaySleep<'_>) -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let thread = match world::active() {
        None => Running::Plain(builder(name)?.spawn(|| MaySleep::enter(f))?),
        Some(world) => {
            let (body, thread) = body(f);
            Running::Explored(thread.start(world, name, Box::new(move || body.run()), Location::caller()))
        }
    };
    Ok(JoinHandle { name: name.to_owned(), thread })
}

fn builder(name: &str) -> io::Result<Builder> {
    if name.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a thread name with a zero byte"));
    }
    Ok(Builder::new().name(name.to_owned()))
}

/// What a virtual thread runs. Fields drop in order: `end` says that all before it is gone.
struct Body<F, T> {
    f: Option<F>,
    outcome: Arc<Mutex<Option<std::thread::Result<T>>>>,
    end: End,
}

struct End(Arc<Progress>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.gone.store(true, Ordering::Release);
    }
}

/// A thread that is not started yet.
struct Unborn<T> {
    outcome: Arc<Mutex<Option<std::thread::Result<T>>>>,
    progress: Arc<Progress>,
}

fn body<F, T>(f: F) -> (Body<F, T>, Unborn<T>) {
    let outcome = Arc::new(Mutex::new(None));
    let progress = Arc::new(Progress::default());
    let unborn = Unborn { outcome: Arc::clone(&outcome), progress: Arc::clone(&progress) };
    (Body { f: Some(f), outcome, end: End(progress) }, unborn)
}

impl<T> Unborn<T> {
    fn start(self, world: &dyn World, name: &str, body: Box<dyn FnOnce() + Send>, born: Site) -> Virtual<T> {
        let id = world.spawn(&op(OpKind::Spawn, born), name, body);
        Virtual { id, born, outcome: self.outcome, progress: self.progress }
    }
}

impl<F: FnOnce(&mut MaySleep<'_>) -> T, T> Body<F, T> {
    fn run(mut self) {
        let Some(f) = self.f.take() else { return };
        let result = catch_unwind(AssertUnwindSafe(|| MaySleep::enter(f)));
        if world::active().is_some_and(|world| world.aborting())
            && let Err(payload) = result
        {
            // The engine unwinds this very thread, and waits for its own payload at the bottom of the stack.
            resume_unwind(payload);
        }
        if let (Some(world), Err(payload)) = (world::active(), &result) {
            world.panicked(&**payload);
        }
        self.end.0.panicked.store(result.is_err(), Ordering::Relaxed);
        *self.outcome.lock() = Some(result);
    }
}

/// Threads that may borrow what lives longer than the scope.
pub struct Scope<'scope, 'env: 'scope> {
    kind: ScopeKind<'scope, 'env>,
}

enum ScopeKind<'scope, 'env: 'scope> {
    Plain(&'scope std::thread::Scope<'scope, 'env>),
    Explored(&'scope Children),
}

/// The virtual threads of a scope.
struct Children {
    world: &'static dyn World,
    site: Site,
    started: RefCell<Vec<(Id, Arc<Progress>)>>,
}

impl Children {
    /// Waits for the end of all. Whether one panicked and nobody was told.
    fn wait_for_all(&self) -> bool {
        let mut unwound = None;
        let mut panicked = false;
        for (id, progress) in self.started.take() {
            self.wait(id, &progress, &mut unwound);
            panicked |= progress.panicked.load(Ordering::Relaxed);
        }
        if let Some(payload) = unwound
            && !std::thread::panicking()
        {
            resume_unwind(payload);
        }
        panicked
    }

    /// Waits for the end of one. A thread that the engine unwinds must wait on, so its unwinding is put off.
    fn wait(&self, id: Id, progress: &Progress, unwound: &mut Option<Box<dyn Any + Send>>) {
        let gone = || progress.gone.load(Ordering::Acquire);
        // The join of one that is gone is a point too, unless there is nothing left to schedule.
        if !gone() || !(self.world.aborting() || unwound.is_some()) {
            let join = || self.world.point(&op(OpKind::Join(id), self.site));
            for _ in 0..2 {
                match catch_unwind(AssertUnwindSafe(join)) {
                    Ok(_) => break,
                    Err(payload) => *unwound = Some(payload),
                }
                if gone() {
                    break;
                }
            }
        }
        if !gone() {
            tracing::error!("virtual thread {id} outlives its scope at {}", self.site);
            std::process::abort();
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.wait_for_all();
    }
}

/// Dies if a thread that borrows may have been made while nobody knows of it.
struct Unlisted<'a>(&'a Progress);

impl Drop for Unlisted<'_> {
    fn drop(&mut self) {
        if !self.0.gone.load(Ordering::Acquire) {
            tracing::error!("the start of a scoped virtual thread was unwound and its closure kept");
            std::process::abort();
        }
    }
}

/// A thread of a [`Scope`].
#[derive(Debug)]
pub struct ScopedJoinHandle<'scope, T> {
    thread: Running<std::thread::ScopedJoinHandle<'scope, T>, T>,
}

/// Runs `f`, which may start threads that borrow, and waits for them all. `f` gets the context back, to lock and join.
///
/// ```
/// use interleave::MaySleep;
/// let words = ["mm", "vma"];
/// let lengths: usize = MaySleep::enter(|cx| {
///     interleave::scope(cx, |s, cx| {
///         let threads = words.map(|word| s.spawn(word, move |_| word.len()));
///         threads.into_iter().filter_map(|thread| thread.join(cx).ok()).sum()
///     })
/// });
/// assert_eq!(lengths, 5);
/// ```
/// What they borrow must outlive the scope, not merely `f`:
/// ```compile_fail,E0373
/// interleave::MaySleep::enter(|cx| {
///     interleave::scope(cx, |s, _cx| {
///         let local = 1;
///         s.spawn("t", |_| local + 1);
///     });
/// });
/// ```
///
/// # Panics
/// If a thread panicked that was not joined.
#[track_caller]
pub fn scope<'env, R>(
    cx: &mut MaySleep<'_>,
    f: impl for<'scope> FnOnce(&Scope<'scope, 'env>, &mut MaySleep<'_>) -> R,
) -> R {
    might_sleep();
    let site = Location::caller();
    let Some(world) = world::active() else {
        return std::thread::scope(|plain| f(&Scope { kind: ScopeKind::Plain(plain) }, cx));
    };
    let children = Children { world, site, started: RefCell::new(Vec::new()) };
    let result = f(&Scope { kind: ScopeKind::Explored(&children) }, cx);
    let panicked = children.wait_for_all();
    assert!(!panicked, "a thread of the scope at {site} panicked");
    result
}

impl<'scope> Scope<'scope, '_> {
    /// Starts a thread in process context.
    ///
    /// # Panics
    /// If the system refuses a thread.
    #[track_caller]
    pub fn spawn<T: Send + 'scope>(
        &self,
        name: &str,
        f: impl FnOnce(&mut MaySleep<'_>) -> T + Send + 'scope,
    ) -> ScopedJoinHandle<'scope, T> {
        let thread = match &self.kind {
            ScopeKind::Plain(plain) => {
                match builder(name).and_then(|b| b.spawn_scoped(plain, || MaySleep::enter(f))) {
                    Ok(thread) => Running::Plain(thread),
                    Err(e) => panic!("cannot start thread `{name}`: {e}"),
                }
            }
            ScopeKind::Explored(children) => {
                let (body, unborn) = body(f);
                let closure: Box<dyn FnOnce() + Send + 'scope> = Box::new(move || body.run());
                // SAFETY: the closure is called a `'static` one, and borrows for `'scope` only. It is dropped before
                // `'scope` ends: its last field says when it is gone, and `Children::drop`, which runs before `scope`
                // returns or unwinds, waits for that and aborts the process if it does not come to pass. Between
                // `start` and the entry in `started`, which `Children::drop` goes by, only `start` can unwind, and
                // `Unlisted` aborts if the closure survives that.
                let closure: Box<dyn FnOnce() + Send + 'static> = unsafe { std::mem::transmute(closure) };
                let progress = Arc::clone(&unborn.progress);
                let unlisted = Unlisted(&progress);
                let thread = unborn.start(children.world, name, closure, Location::caller());
                std::mem::forget(unlisted);
                children.started.borrow_mut().push((thread.id, progress));
                Running::Explored(thread)
            }
        };
        ScopedJoinHandle { thread }
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
        match self.thread {
            Running::Plain(thread) => {
                let name = thread.thread().name().map(str::to_owned);
                thread.join().map_err(|payload| Panicked::new(name.unwrap_or_default(), payload))
            }
            Running::Explored(thread) => {
                let id = thread.id;
                thread.join(Location::caller()).map_err(|payload| {
                    let name = world::active().map(|world| world.thread_name(id));
                    Panicked::new(name.unwrap_or_default(), payload)
                })
            }
        }
    }
}

/// Lets others run.
#[track_caller]
pub fn yield_now() {
    if world::note(OpKind::Yield).is_none() {
        std::thread::yield_now();
    }
}

/// Says that the caller spins until another thread does something.
#[track_caller]
#[inline]
pub fn spin_hint() {
    if world::note(OpKind::SpinHint).is_none() {
        std::hint::spin_loop();
    }
}
