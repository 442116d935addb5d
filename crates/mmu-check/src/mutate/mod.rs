// SPDX-License-Identifier: MIT OR Apache-2.0
//! Would it be noticed? Each lock, retry check, flush, wait, sequence bump and callback of a driver is switched off, one at
//! a time, and the driver's cells are explored until one breaks. The library's cache and objects are drivers here.
//!
//! 1. *Baseline*: every cell of the driver in its own kernel, and which places of the driver's source were run in which cell.
//!    What breaks here is left out, and said.
//! 2. *Mutants*: every place and every callback. What "off" means: [`interleave::explore::mutated`] for places, a driver
//!    that never registered the callback for callbacks.
//! 3. Each mutant is explored in the cells in which its place was run, the cheap ones first, up to the same bound, and what survives
//!    that with one preemption more in the scenes, which are short. The first failure of any kind is enough. A mutant that nothing notices has *survived*: either the paths do not put it to the test, or the driver
//!    does not need it. [`survivors`] says which, as far as anybody has found out.
//!
//! Everything is bounded by numbers of executions and never by time, so that the answer is the same on every machine
//! and for any number of threads.

pub mod source;
pub mod survivors;
mod users;
mod young;

pub use users::{AGAIN, EXITED, GATHER, GIVEN_UP, SHARED, TOUCHED, UNBOUND, USERS};
pub use young::YOUNG;

use crate::answer::{Row, rows_of};
use crate::driver::{cache, objects};
use crate::oracle::Rule;
use crate::path::{MORE, PATHS, Path, VARIANTS};
use crate::scenario::{Cell, Facts, execute};
use drivers::{Callback, Callbacks, Kind};
use interleave::explore::{self, Config, Failure, FailureKind, Mutant, Report, SiteKind, Strategy};
use interleave::{LockClass, MaySleep, Mutex, scope};
use softmm::KernelProfile;
use std::cell::RefCell;
use std::fmt;

static QUEUE: LockClass = LockClass::new("mutants");

/// Files of the crate `drivers` that are the device, the kernel around a driver, or this very machinery.
const NO_DRIVER: [&str; 7] =
    ["device.rs", "driver.rs", "engine.rs", "listener.rs", "site.rs", "work.rs", "counters.rs"];

/// A driver, and the kernels in which it is looked at: one in which it lived, and for one with change_pte also the one in which
/// that is all it has.
#[derive(Debug, Clone, Copy)]
pub struct Subject {
    /// The driver; or the rows of the table that are the same source, over different primary MMUs. A place of it is needed if
    /// one of them needs it.
    pub kinds: &'static [&'static Kind],
    /// The kernels.
    pub profiles: &'static [KernelProfile],
    /// Paths of the mm by name; all, if empty.
    pub paths: &'static [&'static str],
    /// Scenes beside them.
    pub scenes: &'static [&'static Path],
}

impl Subject {
    /// The name of the first row.
    pub fn name(&self) -> &'static str {
        self.kinds.first().map_or("", |kind| kind.name)
    }
}

const fn subject(kinds: &'static [&'static Kind], profiles: &'static [KernelProfile]) -> Subject {
    Subject { kinds, profiles, paths: &[], scenes: &SCENES }
}

const V3_16: KernelProfile = KernelProfile::V3_16;
const V5_10: KernelProfile = KernelProfile::V5_10;
const V6_18: KernelProfile = KernelProfile::V6_18;

/// What is meant to be safe: drivers, the cache and the objects of the library; where one is not is found out, and left out.
pub static SUBJECTS: &[Subject] = &[
    subject(&[&drivers::i915_v5_13::KIND], &[V5_10]),
    subject(&[&drivers::kvm_v3_16::KIND], &[V3_16, KernelProfile::UNWRAPPED_A]),
    subject(&[&drivers::kvm_v6_18::KIND], &[V6_18]),
    subject(&[&drivers::amd_iommu_v2_3_16::KIND], &[V3_16, KernelProfile::UNWRAPPED_A]),
    subject(&[&drivers::amd_iommu_invalidate_range::KIND_3_19], &[KernelProfile::V3_19]),
    subject(&[&drivers::amd_iommu_invalidate_range::KIND], &[V6_18]),
    subject(&[&drivers::rdma_odp::KIND], &[V6_18]),
    subject(&[&drivers::vfio::KIND], &[V6_18]),
    subject(&[&drivers::design_start_with_seq::KIND], &[V3_16]),
    subject(&[&drivers::design_atomic_change_pte::KIND], &[V3_16, KernelProfile::UNWRAPPED_A]),
    Subject { scenes: &OWN_SCENES, ..subject(&[&cache::KIND, &cache::LATE], &[V6_18]) },
    Subject { scenes: &OWN_SCENES, ..subject(&[&objects::KIND, &objects::EXACT], &[V6_18]) },
];

/// Scenes for every driver.
static SCENES: [&Path; 4] = [&USERS, &SHARED, &UNBOUND, &GATHER];

/// Scenes for the library, which finds what is registered by range and must let go of what is given up.
static OWN_SCENES: [&Path; 7] = [&USERS, &SHARED, &UNBOUND, &GATHER, &AGAIN, &GIVEN_UP, &TOUCHED];

/// How far to go.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Preemptions at most.
    pub bound: u32,
    /// Executions of one cell at most, for each bound.
    pub executions: u64,
    /// OS threads.
    pub threads: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { bound: 1, executions: 1500, threads: 2 }
    }
}

/// What is switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Off {
    /// An operation, by its place.
    Site(Mutant),
    /// A callback.
    Callback(Callback),
}

impl fmt::Display for Off {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Off::Site(mutant) => {
                let (file, line) = (source::file_name(mutant.site), mutant.site.line());
                let function = source::function(mutant.site).unwrap_or("?");
                write!(f, "{} in {function} at {file}:{line}", mutant.kind)
            }
            Off::Callback(callback) => write!(f, "callback {callback}"),
        }
    }
}

/// What gave a mutant away.
#[derive(Debug, Clone)]
pub struct Noticed {
    /// Where.
    pub cell: Cell,
    /// The rule that broke; `None` for a race, a panic of the model, or a pin that was never put.
    pub rule: Option<Rule>,
    /// How.
    pub failure: Failure,
}

impl Noticed {
    /// The rule, or what else it was, in a word or two.
    pub fn by(&self) -> String {
        self.rule.map_or_else(|| self.failure.kind.to_string(), |rule| rule.to_string())
    }
}

/// What became of a mutant.
#[derive(Debug, Clone)]
pub struct Fate {
    /// The driver; of a place in the source of several rows, the first.
    pub kind: &'static Kind,
    /// What was off.
    pub off: Off,
    /// What gave it away; `None`: it survived.
    pub noticed: Option<Noticed>,
    /// Cells in which it was looked for.
    pub cells: usize,
    /// Executions.
    pub executions: u64,
    /// All cells were explored up to the bound.
    pub exhausted: bool,
}

impl Fate {
    /// Why it survived, if anybody knows.
    pub fn why(&self) -> Option<&'static str> {
        survivors::why(self.kind, self.off)
    }
}

/// A cell that was left out.
#[derive(Debug, Clone)]
pub struct LeftOut {
    /// Which.
    pub cell: Cell,
    /// What breaks there, unmutated.
    pub failure: Failure,
}

/// All of it.
#[derive(Debug, Clone, Default)]
pub struct Mutation {
    /// One for each mutant, in the order of the subjects and of their source.
    pub fates: Vec<Fate>,
    /// Cells in which the driver itself breaks.
    pub left_out: Vec<LeftOut>,
}

impl Mutation {
    /// How many mutants were noticed.
    pub fn noticed(&self) -> usize {
        self.fates.iter().filter(|fate| fate.noticed.is_some()).count()
    }

    /// Was at least 95 of 100 noticed?
    pub fn enough(&self) -> bool {
        !self.fates.is_empty() && self.noticed() * 100 >= self.fates.len() * 95
    }
}

/// A cell that does not break by itself, and what of the driver it runs.
struct Ground {
    cell: Cell,
    sites: Vec<Mutant>,
    callbacks: Callbacks,
    executions: u64,
}

struct Task {
    kind: &'static Kind,
    off: Off,
    cells: Vec<Cell>,
}

/// Switches off everything there is in `subjects`, one by one. `progress` hears: done, of how many.
pub fn mutate(
    cx: &mut MaySleep<'_>,
    subjects: &[Subject],
    limits: &Limits,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Mutation {
    let cells: Vec<Cell> = subjects.iter().flat_map(cells).collect();
    let baseline = each(cx, &cells, limits.threads, &|cell| ground(cell, limits), &|_| ());
    let mut left_out = Vec::new();
    let mut grounds = Vec::new();
    for outcome in baseline {
        match outcome {
            Ok(ground) => grounds.extend(ground),
            Err(out) => left_out.push(*out),
        }
    }
    let tasks: Vec<Task> = subjects.iter().flat_map(|subject| tasks(subject, &grounds)).collect();
    let all = tasks.len();
    let fates = each(cx, &tasks, limits.threads, &|task| fate(task, limits), &|done| progress(done, all));
    Mutation { fates, left_out }
}

/// `f` of each of `items`, in their order, on several OS threads. `done` hears how many there are by now.
fn each<T: Sync, R: Send>(
    cx: &mut MaySleep<'_>,
    items: &[T],
    threads: usize,
    f: &(dyn Fn(&T) -> R + Sync),
    done: &(dyn Fn(usize) + Sync),
) -> Vec<R> {
    let queue = Mutex::new(&QUEUE, (items.iter().enumerate(), Vec::new()));
    let work = |cx: &mut MaySleep<'_>| {
        loop {
            let Some((at, item)) = queue.lock(cx).0.next() else { return };
            let result = f(item);
            let mut queue = queue.lock(cx);
            queue.1.push((at, result));
            done(queue.1.len());
        }
    };
    scope(cx, |s, _| {
        for _ in 0..threads.max(1) {
            s.spawn("mutation", work);
        }
    });
    let (_, mut results) = queue.into_inner();
    results.sort_by_key(|(at, _)| *at);
    results.into_iter().map(|(_, result)| result).collect()
}

fn cells(subject: &Subject) -> Vec<Cell> {
    let mut cells = Vec::new();
    for kind in subject.kinds.iter().copied() {
        let ages = kind.callbacks.contains(Callback::ClearFlushYoung).then_some(&YOUNG);
        let paths = PATHS.iter().chain(MORE).chain(VARIANTS);
        let paths = paths.filter(|path| subject.paths.is_empty() || subject.paths.contains(&path.name));
        let hears_the_end =
            [Callback::Release, Callback::Invalidate].iter().any(|&c| kind.callbacks.contains(c));
        let exits = hears_the_end.then_some(&EXITED);
        let paths = paths.chain(ages).chain(exits).chain(subject.scenes.iter().copied());
        let callbacks = kind.callbacks;
        for profile in subject.profiles.iter().copied() {
            for Row { access, .. } in rows_of(kind) {
                cells.extend(paths.clone().map(|path| Cell { kind, access, path, profile, callbacks }));
            }
        }
    }
    cells
}

fn search(cell: &Cell, config: Config) -> (Report, Facts) {
    let facts = RefCell::new(Facts::default());
    let report = explore::explore(&config, |cx| match cell.path.name {
        name if name == YOUNG.name => young::execute(cx, cell, &facts),
        name if name == USERS.name => users::beside(cx, cell, &facts),
        name if name == SHARED.name => users::shared(cx, cell, &facts),
        name if name == GATHER.name => users::gather(cx, cell, &facts),
        name if name == UNBOUND.name => users::unbound(cx, cell, &facts),
        name if name == AGAIN.name => users::again(cx, cell, &facts),
        name if name == EXITED.name => users::exited(cx, cell, &facts),
        name if name == TOUCHED.name => users::touched(cx, cell, &facts),
        name if name == GIVEN_UP.name => users::given_up(cx, cell, &facts),
        _ => execute(cx, cell, &facts),
    });
    (report, facts.into_inner())
}

fn config(bound: u32, limits: &Limits) -> Config {
    Config::new(Strategy::Preemptions(bound)).minimise(0).max_executions(limits.executions)
}

/// Nothing is known of a cell that the driver refuses.
fn ground(cell: &Cell, limits: &Limits) -> Result<Option<Ground>, Box<LeftOut>> {
    let (report, facts) = search(cell, config(limits.bound, limits).find_sites());
    if let Some(failure) = report.failures.into_iter().next() {
        return Err(Box::new(LeftOut { cell: *cell, failure }));
    }
    if facts.refused.is_some() {
        return Ok(None);
    }
    let sites = report.sites.into_iter().filter(of_a_driver).collect();
    let run: Vec<Callback> =
        cell.callbacks.iter().filter(|&kind| facts.callbacks[kind as usize] > 0).collect();
    Ok(Some(Ground { cell: *cell, sites, callbacks: Callbacks::of(&run), executions: report.executions }))
}

/// A function that names its caller's place does so for the locks too that it takes itself: those are not the driver's.
fn of_a_driver(mutant: &Mutant) -> bool {
    if mutant.kind == SiteKind::Lock
        && !source::text(mutant.site).is_some_and(|text| text.starts_with("lock"))
    {
        return false;
    }
    source::is_checked(mutant.site) && !NO_DRIVER.contains(&source::file_name(mutant.site))
}

fn tasks(subject: &Subject, grounds: &[Ground]) -> Vec<Task> {
    let of = |kind: &Kind, ground: &Ground| ground.cell.kind.name == kind.name;
    let mine = |ground: &&Ground| subject.kinds.iter().any(|kind| of(kind, ground));
    let mut grounds: Vec<&Ground> = grounds.iter().filter(mine).collect();
    grounds.sort_by_key(|ground| ground.executions);
    let mut sites: Vec<Mutant> = grounds.iter().flat_map(|ground| ground.sites.iter().copied()).collect();
    sites.sort();
    sites.dedup();
    let mut tasks = Vec::new();
    for site in sites {
        let there = grounds.iter().filter(|ground| ground.sites.binary_search(&site).is_ok());
        let cells = there.map(|ground| ground.cell).collect();
        tasks.extend(subject.kinds.first().map(|kind| Task { kind, off: Off::Site(site), cells }));
    }
    for kind in subject.kinds.iter().copied() {
        for callback in kind.callbacks.iter() {
            let there = grounds.iter().filter(|g| of(kind, g) && g.callbacks.contains(callback));
            let callbacks = kind.callbacks.without(callback);
            let cells: Vec<Cell> = there.map(|ground| Cell { callbacks, ..ground.cell }).collect();
            if !cells.is_empty() {
                tasks.push(Task { kind, off: Off::Callback(callback), cells });
            }
        }
    }
    tasks
}

fn fate(task: &Task, limits: &Limits) -> Fate {
    let Task { kind, off, ref cells } = *task;
    let mut fate = Fate { kind, off, noticed: None, cells: cells.len(), executions: 0, exhausted: true };
    let is_scene = |cell: &&Cell| OWN_SCENES.iter().chain([&&EXITED]).any(|s| s.name == cell.path.name);
    let scenes = cells.iter().filter(is_scene);
    let further = Limits { executions: 4 * limits.executions, ..*limits };
    let once_more = scenes.map(|cell| (limits.bound + 1, cell, &further));
    let bounded = (0..=limits.bound).flat_map(|bound| cells.iter().map(move |cell| (bound, cell, limits)));
    for (bound, cell, limits) in bounded.chain(once_more) {
        let config = config(bound, limits);
        let (report, _) = search(
            cell,
            match off {
                Off::Site(mutant) => config.without(mutant),
                Off::Callback(_) => config,
            },
        );
        fate.executions += report.executions;
        fate.exhausted &= report.exhausted;
        let failure = report.failures.into_iter().next();
        if let Some(failure) = failure.filter(|f| f.kind != FailureKind::Nondeterminism) {
            let rule = Rule::of_failure(failure.kind, &failure.message);
            fate.noticed = Some(Noticed { cell: *cell, rule, failure });
            return fate;
        }
    }
    fate
}
