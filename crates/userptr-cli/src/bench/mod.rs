// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr bench`: our registration cache beside UCX's, on this machine, now.
//!
//! Each cache lives in a process of its own ([`side`]) and they take turns, batch by batch, so that what else the
//! machine does falls on all of them. Numbers are medians over the batches.

mod change;
mod contestant;
mod goals;
mod plot;
mod report;
mod side;
mod table;
mod work;

use std::path::Path;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};

use crate::args::{BenchArgs, BenchPart};
use crate::{Error, print_json};
use contestant::{How, Side};
use report::{Cell, Column, Point, Report, What};
use side::Process;
use work::{Measured, Turn, WIDE};

pub(crate) use change::answer as answer_change;
pub(crate) use side::serve;

const SIZES: [usize; 3] = [1, 1000, 100_000];
const JEMALLOC: &str = "libjemalloc.so.2";

/// How much of everything.
struct Effort {
    batches: usize,
    millis: u64,
    sizes: &'static [usize],
    unmaps: usize,
    churns: u64,
}

impl Effort {
    fn of(args: &BenchArgs) -> Effort {
        if args.quick {
            return Effort { batches: 1, millis: 5, sizes: &SIZES[..2], unmaps: 20, churns: 400 };
        }
        Effort { batches: args.batches, millis: 60, sizes: &SIZES, unmaps: 300, churns: 4000 }
    }
}

/// The sides that run, and why others do not.
struct Sides {
    running: Vec<(Side, Process)>,
    missing: Vec<(Side, String)>,
}

impl Sides {
    fn start(preload: Option<&str>, but: &[(Side, String)]) -> Sides {
        let (mut running, mut missing) = (Vec::new(), Vec::new());
        for side in Side::ALL {
            if but.iter().any(|(s, _)| *s == side) {
                continue;
            }
            match Process::start(side, preload) {
                Ok(process) => running.push((side, process)),
                Err(why) => missing.push((side, why)),
            }
        }
        Sides { running, missing }
    }

    /// Every side in turn, `batches` times; a side for each way of asking in which it differs, if `hows`.
    fn measure(
        &mut self,
        point: Point,
        batches: usize,
        hows: bool,
        turn: impl Fn(How) -> Turn,
        before: &mut dyn FnMut(),
    ) -> Vec<Cell> {
        let columns = |side: Side| if hows { side.hows() } else { &side.hows()[..1] };
        let mut results: Vec<(Column, Vec<Result<Measured, String>>)> = Vec::new();
        for (side, _) in &self.running {
            results.extend(columns(*side).iter().map(|how| (Column { side: *side, how: *how }, Vec::new())));
        }
        for _ in 0..batches {
            for (column, batches) in &mut results {
                before();
                let process = self.running.iter_mut().find(|(side, _)| *side == column.side);
                if let Some((_, process)) = process {
                    batches.push(process.ask(&turn(column.how)));
                }
            }
        }
        results.into_iter().map(|(column, batches)| Cell::new(point, column, batches)).collect()
    }

    /// New memory for all.
    fn fill(&mut self, registrations: usize) {
        for (_, process) in &mut self.running {
            // One that cannot says so at each of its measurements.
            let _ = process.ask(&Turn::Fill(registrations));
        }
    }
}

/// All of it.
pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode, Error> {
    if let Some(dir) = &args.plots {
        std::fs::create_dir_all(dir).map_err(|source| Error::File { path: dir.clone(), source })?;
    }
    let effort = Effort::of(args);
    let load = load();
    let mut sides = Sides::start(None, &[]);
    if !sides.running.iter().any(|(side, _)| *side != Side::Ucx) {
        let why: Vec<String> =
            sides.missing.iter().map(|(side, why)| format!("{}: {why}", side.name())).collect();
        return Err(Error::Machine(format!("no source for a cache of ours ({})", why.join("; "))));
    }
    let progress = progress();
    let (mut cells, mut changes) = (Vec::new(), Vec::new());
    for part in &args.part {
        progress.set_message(format!("{part:?}").to_lowercase());
        progress.tick();
        match part {
            BenchPart::Hit => cells.extend(hits(&mut sides, &effort)),
            BenchPart::Miss => cells.extend(misses(&mut sides, &effort)),
            BenchPart::Unmap => cells.extend(unmaps(&mut sides, &effort)),
            BenchPart::Churn => cells.extend(churns(&mut sides, &effort)),
            BenchPart::Pressure => cells.extend(pressure(&mut sides, &effort)),
            BenchPart::Changes => {
                let running: Vec<Side> = sides.running.iter().map(|(side, _)| *side).collect();
                for event in change::events(args.quick) {
                    progress.set_message(event.name);
                    changes.push(change::row(event, &running));
                    progress.tick();
                }
            }
        }
    }
    progress.finish_and_clear();
    let mut report = Report {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        cpus: cpus(),
        load: [load, self::load()],
        batches: effort.batches,
        goals: Vec::new(),
        cells,
        changes,
        missing: sides.missing,
    };
    report.goals = goals::judge(&report);
    if let Some(dir) = &args.plots {
        plots(&report, dir)?;
    }
    if args.json {
        print_json(&report)?;
    } else {
        table::print(&report);
    }
    Ok(ExitCode::from(report.exit_code(args.check)))
}

fn hits(sides: &mut Sides, effort: &Effort) -> Vec<Cell> {
    let mut cells = Vec::new();
    for registrations in effort.sizes {
        sides.fill(*registrations);
        for threads in thread_counts() {
            let point = Point { what: What::Hit, registrations: *registrations, threads };
            let turn = |how| Turn::Hit { how, threads, millis: effort.millis };
            cells.extend(sides.measure(point, effort.batches, true, turn, &mut || ()));
        }
    }
    cells
}

fn misses(sides: &mut Sides, effort: &Effort) -> Vec<Cell> {
    let point = Point { what: What::Miss, registrations: 1000, threads: 1 };
    sides.measure(point, effort.batches, false, |_| Turn::Fill(1000), &mut || ())
}

fn unmaps(sides: &mut Sides, effort: &Effort) -> Vec<Cell> {
    sides.fill(1000);
    let mut cells = Vec::new();
    for (what, registered) in [(What::UnmapUnregistered, false), (What::Unmap, true)] {
        let point = Point { what, registrations: 1000, threads: 1 };
        let turn = |_| Turn::Unmap { registered, rounds: effort.unmaps };
        cells.extend(sides.measure(point, effort.batches, false, turn, &mut || ()));
    }
    cells
}

fn churns(sides: &mut Sides, effort: &Effort) -> Vec<Cell> {
    let mut cells = Vec::new();
    for threads in [1, 2 * cpus()] {
        let point = Point { what: What::Churn, registrations: 0, threads };
        let turn = |_| Turn::Churn { threads, rounds: effort.churns };
        cells.extend(sides.measure(point, effort.batches, false, turn, &mut || ()));
    }
    cells
}

/// Hits while something else keeps the mm busy.
fn pressure(sides: &mut Sides, effort: &Effort) -> Vec<Cell> {
    let point = |what| Point { what, registrations: 1000, threads: 1 };
    let under = |how| Turn::HitUnderAllocator { how, millis: effort.millis };
    sides.fill(1000);
    let mut cells = sides.measure(point(What::HitUnderGlibc), effort.batches, true, under, &mut || ());
    if let Some(jemalloc) = find_library(JEMALLOC) {
        let mut preloaded = Sides::start(Some(&jemalloc), &sides.missing);
        preloaded.fill(1000);
        cells.extend(preloaded.measure(
            point(What::HitUnderJemalloc),
            effort.batches,
            true,
            under,
            &mut || (),
        ));
    }
    // Another process with a VM of its own: the tracepoint that the kvm source counts at is the machine's.
    if let Ok(mut other) = Process::start(Side::Kvm, None) {
        let mut busy = false;
        for (what, pages) in [(What::HitUnderOtherVm, 4), (What::HitUnderOtherVmWide, WIDE)] {
            let mut storm = || {
                // The turn before has lasted about as long as the storm: its answer is near.
                if std::mem::take(&mut busy) {
                    let _ = other.answer::<Measured>();
                }
                busy = other.tell(&Turn::Storm { millis: 2 * effort.millis, pages }).is_ok();
            };
            let turn = |how| Turn::Hit { how, threads: 1, millis: effort.millis };
            sides.fill(1000);
            cells.extend(sides.measure(point(what), effort.batches, true, turn, &mut storm));
        }
    }
    cells
}

fn thread_counts() -> Vec<usize> {
    let mut counts = vec![1, cpus()];
    counts.dedup();
    counts
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Where the loader has it, as far as anybody can tell without it.
fn find_library(name: &str) -> Option<String> {
    let dirs = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"];
    dirs.iter().map(|dir| format!("{dir}/{name}")).find(|path| Path::new(path).exists())
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn plots(report: &Report, dir: &Path) -> Result<(), Error> {
    for (name, svg) in plot::all(report) {
        let path = dir.join(name);
        std::fs::write(&path, svg).map_err(|source| Error::File { path: path.clone(), source })?;
    }
    Ok(())
}

fn progress() -> ProgressBar {
    // Draws on standard error, and not at all if that is no terminal.
    let style = ProgressStyle::with_template("{spinner} {elapsed} {msg}");
    ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
}
