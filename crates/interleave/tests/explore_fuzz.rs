// SPDX-License-Identifier: MIT OR Apache-2.0
//! The checker checked: random small programs have the same outcomes, deadlocks included, under every exhaustive
//! strategy as under plain enumeration.
//!
//! An outcome is what each thread saw, up to where it ended or hangs, and what is left in the end. A thread that calls
//! `forget` between two operations promises that what it saw before does not matter: of such programs the shared
//! states are compared that each thread can come to at each of its operations, and whether there is a deadlock.
//!
//! Debug builds try fewer programs; `EXPLORE_FUZZ=n` sets the number, `EXPLORE_SEED=n` where to begin.
#![expect(clippy::disallowed_types, reason = "what is seen is written down behind the explorer's back")]

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Mutex as Plain;
use std::time::Duration;

use interleave::explore::{self, Config, FailureKind, Ghost, Report, Strategy, explore, replay};
use interleave::{
    AtomicU32, Digest, LockClass, MaySleep, Mutex, Ordering, RwLock, Semaphore, WaitQueue, scope, time,
};

const SC: Ordering = Ordering::SeqCst;

static M: [LockClass; 2] = [LockClass::new("m0"), LockClass::new("m1")];
static RW: LockClass = LockClass::new("rw");
static SEM: LockClass = LockClass::new("sem");
static Q: LockClass = LockClass::new("q");

/// What one thread does.
#[derive(Clone, Debug)]
enum Do {
    Load(usize),
    Store(usize, u32),
    Add(usize),
    Cas(usize, u32),
    Lock(usize, Vec<Do>),
    TryLock(usize, Vec<Do>),
    Read(Vec<Do>),
    Write(Vec<Do>),
    TryRead(Vec<Do>),
    TryWrite(Vec<Do>),
    Down(Vec<Do>),
    TryDown,
    Up,
    WaitFor(usize),
    WakeOne,
    WakeAll,
    Ghost,
    GhostRead,
    Sleep(u64),
    Forget,
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    /// About `budget` operations from `menu`.
    fn block(&mut self, menu: &[u64], budget: &mut u64) -> Vec<Do> {
        let mut block = Vec::new();
        while *budget > 0 {
            *budget -= 1;
            let which = self.below(2) as usize;
            let inner = |rng: &mut Rng, budget: &mut u64| {
                let mut mine = rng.below(*budget + 1);
                *budget -= mine;
                let block = rng.block(menu, &mut mine);
                *budget += mine;
                block
            };
            block.push(match menu[self.below(menu.len() as u64) as usize] {
                0 => Do::Load(which),
                1 => Do::Store(which, self.below(3) as u32),
                2 => Do::Add(which),
                3 => Do::Cas(which, self.below(2) as u32),
                4 | 5 => Do::Lock(which, inner(self, budget)),
                6 => Do::TryLock(which, inner(self, budget)),
                7 => Do::Read(inner(self, budget)),
                8 => Do::Write(inner(self, budget)),
                9 => Do::TryRead(inner(self, budget)),
                10 => Do::TryWrite(inner(self, budget)),
                11 => Do::Down(inner(self, budget)),
                12 => Do::TryDown,
                13 => Do::Up,
                14 => Do::WaitFor(which),
                15 => Do::WakeOne,
                16 => Do::WakeAll,
                17 => Do::Ghost,
                18 => Do::GhostRead,
                _ => Do::Sleep(self.below(3)),
            });
            if self.below(4) == 0 {
                break;
            }
        }
        block
    }

    /// Two to four threads, that draw on a few kinds of operations so that they meet.
    fn program(&mut self) -> Vec<Vec<Do>> {
        let threads = 2 + (self.below(5).min(3) as usize).saturating_sub(1);
        let kinds = 2 + self.below(4);
        let mut menu: Vec<u64> = (0..kinds).map(|_| self.below(20)).collect();
        menu.push(self.below(5));
        let size = if threads == 2 { 4 } else { 2 };
        (0..threads)
            .map(|_| {
                let mut budget = 1 + self.below(size);
                let mut thread = Vec::new();
                while budget > 0 {
                    thread.extend(self.block(&menu, &mut budget));
                }
                thread
            })
            .collect()
    }
}

/// The same program with boundaries between some operations of its threads.
fn with_boundaries(program: &[Vec<Do>], rng: &mut Rng) -> Vec<Vec<Do>> {
    let mut bounded = |thread: &Vec<Do>| {
        let steps = thread.iter().cloned();
        steps.flat_map(|step| [Some(step), (rng.below(3) > 0).then_some(Do::Forget)]).flatten().collect()
    };
    program.iter().map(&mut bounded).collect()
}

/// The objects of one execution.
struct Shared {
    atomics: [AtomicU32; 2],
    mutexes: [Mutex<u32>; 2],
    rw: RwLock<u32>,
    semaphore: Semaphore,
    queue: WaitQueue,
    ghost: Ghost<u32>,
}

impl Shared {
    fn new(hashed: bool) -> Shared {
        let digest: fn(&u32) -> u64 = Digest::digest;
        let mutex = |i: usize| {
            if hashed { Mutex::with_digest(&M[i], 0, digest) } else { Mutex::new(&M[i], 0) }
        };
        Shared {
            atomics: [AtomicU32::new(0), AtomicU32::new(0)],
            mutexes: [mutex(0), mutex(1)],
            rw: if hashed { RwLock::with_digest(&RW, 0, digest) } else { RwLock::new(&RW, 0) },
            semaphore: Semaphore::new(&SEM, 1),
            queue: WaitQueue::new(&Q),
            ghost: if hashed { Ghost::with_digest(0, digest) } else { Ghost::new(0) },
        }
    }
}

/// What the threads of the present execution have seen, and the outcomes of those before.
#[derive(Default)]
struct Seen {
    now: Vec<Vec<u32>>,
    outcomes: BTreeSet<Vec<Vec<u32>>>,
    /// What the objects hold: the atomics, the mutexes, the readers-writer lock, the ghost.
    held: [u32; 6],
    /// A thread, how far it is, and what the objects held then.
    states: BTreeSet<(usize, usize, [u32; 6])>,
}

struct Runner<'a> {
    shared: &'a Shared,
    seen: &'a Plain<Seen>,
    me: usize,
    /// A hundred for each boundary, and one for each operation made since the last.
    made: Cell<usize>,
}

impl Runner<'_> {
    fn new<'a>(shared: &'a Shared, seen: &'a Plain<Seen>, me: usize) -> Runner<'a> {
        Runner { shared, seen, me, made: Cell::new(0) }
    }

    /// The thread has made an operation, by which object `slot` holds `value`.
    fn holds(&self, slot: usize, value: u32) {
        self.seen.lock().expect("no panics").held[slot] = value;
    }

    fn made(&self) {
        self.made.set(self.made.get() + 1);
        let seen = &mut *self.seen.lock().expect("no panics");
        seen.states.insert((self.me, self.made.get(), seen.held));
    }

    fn saw(&self, what: u32) {
        self.seen.lock().expect("no panics").now[self.me].push(what);
    }

    fn run(&self, block: &[Do], cx: &mut MaySleep<'_>) {
        for step in block {
            self.one(step, cx);
            self.made();
        }
    }

    /// Adds one to guarded data, so that the order of critical sections is seen.
    fn bump(&self, slot: usize, data: &mut u32) {
        self.saw(*data);
        *data += 1;
        self.holds(slot, *data);
        self.made();
    }

    fn one(&self, step: &Do, cx: &mut MaySleep<'_>) {
        let s = self.shared;
        match step {
            Do::Load(a) => self.saw(s.atomics[*a].load(SC)),
            Do::Store(a, v) => {
                s.atomics[*a].store(*v, SC);
                self.holds(*a, *v);
            }
            Do::Add(a) => {
                let was = s.atomics[*a].fetch_add(1, SC);
                self.holds(*a, was + 1);
                self.saw(was);
            }
            Do::Cas(a, v) => {
                let was = s.atomics[*a].compare_exchange(*v, *v + 1, SC, SC);
                if was.is_ok() {
                    self.holds(*a, *v + 1);
                }
                self.saw(was.unwrap_or_else(|v| v + 100));
            }
            Do::Lock(m, block) => {
                let mut guard = s.mutexes[*m].lock(cx);
                self.bump(2 + *m, &mut guard);
                self.run(block, cx);
            }
            Do::TryLock(m, block) => match s.mutexes[*m].try_lock(cx) {
                None => self.saw(1000),
                Some(mut guard) => {
                    self.bump(2 + *m, &mut guard);
                    self.run(block, cx);
                }
            },
            Do::Read(block) => {
                let guard = s.rw.read(cx);
                self.saw(*guard);
                self.run(block, cx);
            }
            Do::Write(block) => {
                let mut guard = s.rw.write(cx);
                self.bump(4, &mut guard);
                self.run(block, cx);
            }
            Do::TryRead(block) => match s.rw.try_read(cx) {
                None => self.saw(1001),
                Some(guard) => {
                    self.saw(*guard);
                    self.run(block, cx);
                }
            },
            Do::TryWrite(block) => match s.rw.try_write(cx) {
                None => self.saw(1002),
                Some(mut guard) => {
                    self.bump(4, &mut guard);
                    self.run(block, cx);
                }
            },
            Do::Down(block) => {
                s.semaphore.down(cx);
                self.run(block, cx);
                s.semaphore.up();
            }
            Do::TryDown => self.saw(1003 + u32::from(s.semaphore.try_down(cx))),
            Do::Up => s.semaphore.up(),
            Do::WaitFor(a) => s.queue.wait_event(cx, || s.atomics[*a].load(SC) != 0),
            Do::WakeOne => s.queue.wake_one(),
            Do::WakeAll => s.queue.wake_all(),
            Do::Ghost => s.ghost.update(|v| self.bump(5, v)),
            Do::GhostRead => self.saw(s.ghost.read(|v| *v)),
            Do::Forget => {
                explore::forget();
                // What was made before, and so how much, is forgotten.
                self.made.set((self.made.get() / 100 + 1) * 100);
            }
            Do::Sleep(n) => time::sleep(cx, Duration::from_millis(*n)),
        }
    }
}

fn scenario(program: &[Vec<Do>], hashed: bool, seen: &Plain<Seen>, cx: &mut MaySleep<'_>) {
    {
        let seen = &mut *seen.lock().expect("no panics");
        let before = std::mem::replace(&mut seen.now, vec![Vec::new(); program.len() + 1]);
        seen.outcomes.insert(before);
        seen.held = [0; 6];
    }
    let shared = &Shared::new(hashed);
    scope(cx, |s, _| {
        for (me, block) in program.iter().enumerate() {
            s.spawn(&format!("t{me}"), move |cx| Runner::new(shared, seen, me).run(block, cx));
        }
    });
    let main = Runner::new(shared, seen, program.len());
    for atomic in &shared.atomics {
        main.saw(atomic.load(SC));
    }
    for mutex in &shared.mutexes {
        main.saw(*mutex.lock(cx));
    }
    main.saw(*shared.rw.read(cx));
    main.saw(shared.ghost.read(|v| *v));
}

fn seen(program: &[Vec<Do>], config: &Config, hashed: bool) -> (Seen, Report) {
    let seen = Plain::new(Seen::default());
    let report = explore(config, |cx| scenario(program, hashed, &seen, cx));
    let mut seen = seen.into_inner().expect("no panics");
    seen.outcomes.insert(std::mem::take(&mut seen.now));
    seen.outcomes.remove(&Vec::new());
    (seen, report)
}

fn outcomes(program: &[Vec<Do>], config: &Config, hashed: bool) -> (BTreeSet<Vec<Vec<u32>>>, Report) {
    let (seen, report) = seen(program, config, hashed);
    (seen.outcomes, report)
}

fn config(strategy: Strategy) -> Config {
    Config::new(strategy).lockdep(false).failures(usize::MAX).minimise(0)
}

#[derive(Default, Debug)]
struct Totals {
    programs: u64,
    too_big: u64,
    deadlocks: u64,
    /// Seen by programs with boundaries.
    states: u64,
    executions: Vec<(&'static str, u64)>,
}

impl Totals {
    fn add(&mut self, name: &'static str, executions: u64) {
        match self.executions.iter_mut().find(|(n, _)| *n == name) {
            Some((_, total)) => *total += executions,
            None => self.executions.push((name, executions)),
        }
    }
}

/// Wrong outcomes, in words; nothing if the program is too big to enumerate.
fn check(program: &[Vec<Do>], totals: &mut Totals) -> Option<String> {
    let (expected, plain) =
        outcomes(program, &config(Strategy::Plain).all_points().max_executions(1_000), false);
    if !plain.exhausted {
        totals.too_big += 1;
        return None;
    }
    totals.programs += 1;
    totals.deadlocks += u64::from(!plain.failures.is_empty());
    totals.add("plain", plain.executions);
    if let Some(failure) = plain.failures.iter().find(|f| f.kind != FailureKind::Deadlock) {
        return Some(format!("plain: {failure}"));
    }
    let modes = [
        ("plain, contended points", Strategy::Plain, false),
        ("sleep", Strategy::Sleep, false),
        ("dpor", Strategy::Dpor, false),
        ("cache without digests", Strategy::ValueCache, false),
        ("cache", Strategy::ValueCache, true),
        ("preemptions", Strategy::CachedPreemptions(40), true),
    ];
    for (name, strategy, hashed) in modes {
        if name == "preemptions" && !totals.programs.is_multiple_of(4) {
            continue;
        }
        let (got, report) = outcomes(program, &config(strategy), hashed);
        totals.add(name, report.executions);
        if !report.exhausted || got != expected {
            let missed: Vec<_> = expected.difference(&got).take(2).collect();
            let extra: Vec<_> = got.difference(&expected).take(2).collect();
            return Some(format!(
                "{name}: {} of {} outcomes, exhausted {}; missed {missed:?}, extra {extra:?}",
                got.len(),
                expected.len(),
                report.exhausted
            ));
        }
        if let Some(failure) = report.failures.iter().find(|f| f.kind != FailureKind::Deadlock) {
            return Some(format!("{name}: {failure}"));
        }
        if plain.failures.is_empty() != report.failures.is_empty() {
            return Some(format!(
                "{name}: deadlocks {} instead of {}",
                report.failures.len(),
                plain.failures.len()
            ));
        }
        for failure in &report.failures {
            let again = replay(&config(strategy), &failure.replay, |cx| {
                scenario(program, hashed, &Plain::new(Seen::default()), cx);
            });
            let message = again.and_then(|again| again.failure).map(|failure| failure.message);
            if message.as_ref() != Some(&failure.message) {
                return Some(format!(
                    "{name}: replay of `{}` gives {message:?} for {failure}",
                    failure.replay
                ));
            }
        }
    }
    None
}

/// Shared states that are missed when threads forget, in words.
fn check_boundaries(program: &[Vec<Do>], totals: &mut Totals) -> Option<String> {
    let (expected, plain) = seen(program, &config(Strategy::Plain).max_executions(1_000), true);
    if !plain.exhausted {
        return None;
    }
    totals.add("plain, boundaries", plain.executions);
    let modes = [
        ("cache, boundaries", Strategy::ValueCache, true),
        ("cache without digests, boundaries", Strategy::ValueCache, false),
        ("preemptions, boundaries", Strategy::CachedPreemptions(40), true),
    ];
    for (name, strategy, hashed) in modes {
        let (got, report) = seen(program, &config(strategy), hashed);
        totals.add(name, report.executions);
        totals.states += got.states.len() as u64;
        if !report.exhausted
            || got.states != expected.states
            || plain.failures.is_empty() != report.failures.is_empty()
        {
            return Some(format!(
                "{name}: {} of {} states, {} and {} deadlocks, exhausted {}; missed {:?}, extra {:?}",
                got.states.len(),
                expected.states.len(),
                report.failures.len(),
                plain.failures.len(),
                report.exhausted,
                expected.states.difference(&got.states).next(),
                got.states.difference(&expected.states).next(),
            ));
        }
    }
    None
}

#[test]
fn every_strategy_has_the_outcomes_of_plain_enumeration() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let programs = number("EXPLORE_FUZZ").unwrap_or(if cfg!(debug_assertions) { 200 } else { 20_000 });
    let first = number("EXPLORE_SEED").unwrap_or(0);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    // Explorations on several OS threads at once do not disturb each other.
    let (mut wrong, mut all) = (Vec::new(), Totals::default());
    std::thread::scope(|s| {
        let worker = |n: u64| move || worker(first + n, workers, programs / workers);
        let running: Vec<_> = (0..workers).map(|n| s.spawn(worker(n))).collect();
        for thread in running {
            let (mistakes, totals) = thread.join().expect("a worker does not panic");
            wrong.extend(mistakes);
            all.programs += totals.programs;
            all.too_big += totals.too_big;
            all.deadlocks += totals.deadlocks;
            all.states += totals.states;
            totals.executions.iter().for_each(|(name, n)| all.add(name, *n));
        }
    });
    wrong.sort_by_key(|(_, program, _)| format!("{program:?}").len());
    let (many, smallest) = (wrong.len(), wrong.first());
    assert!(wrong.is_empty(), "{many} of {programs} wrong; the smallest: {smallest:?}\n{all:?}");
    let tried = all.programs < 100
        || all.deadlocks > 0 && all.states > 0 && all.executions.iter().all(|(_, n)| *n > 0);
    assert!(tried, "{all:?}");
}

/// A reader of a ghost without a digest was said to have seen the same before and after a change.
#[test]
fn a_program_that_was_wrong_once() {
    let (wrong, totals) = worker(23_282, 1, 1);
    assert!(wrong.is_empty() && totals.programs == 1, "{wrong:?} {totals:?}");
}

type Mistake = (u64, Vec<Vec<Do>>, String);

/// Checks programs of each `stride`-th seed.
fn worker(first: u64, stride: u64, programs: u64) -> (Vec<Mistake>, Totals) {
    let (mut wrong, mut totals, mut seed) = (Vec::new(), Totals::default(), first);
    while totals.programs < programs {
        let program = Rng(seed.wrapping_mul(0x1234_5678_9abc_def1)).program();
        if let Some(what) = check(&program, &mut totals) {
            wrong.push((seed, program, what));
            seed += stride;
            continue;
        }
        if seed % 4 < 2 {
            let bounded = with_boundaries(&program, &mut Rng(seed));
            if let Some(what) = check_boundaries(&bounded, &mut totals) {
                wrong.push((seed, bounded, what));
            }
        }
        seed += stride;
    }
    (wrong, totals)
}
