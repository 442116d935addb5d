// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr live --race`: threads that reuse each other's addresses, against each source and against the controls.
//!
//! The controls are what gives the race teeth: nothing at all (the kvm source with its VM off), and the uffd source
//! without its probe. Where a control must lose and does not, the race proves nothing, and that is a failure too.

use std::process::ExitCode;
use std::time::Duration;

use comfy_table::{Cell, Color, ContentArrangement, Table, presets};
use hostmm::kvm::KvmSource;
use hostmm::primary::HostMm;
use hostmm::race::{self, Length, Nothing, Outcome, RaceError, Subject, Way};
use hostmm::uffd::{UffdSource, raced};
use serde::{Deserialize, Serialize};

use super::Listener;
use crate::args::{LiveArgs, RaceRowArgs, Sources};
use crate::{Error, Saved, child, print_json};

/// A control needs no more rounds than this, if it loses.
const CONTROL_ROUNDS: u64 = 20_000;
/// Rounds with busy CPUs wait for time slices.
const BUSY_SHARE: u64 = 20;
/// Threads that only burn CPU time.
const HOGS: usize = 3;

/// Why a race was not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RaceRowError {
    /// The kernel or the source refused.
    #[error(transparent)]
    Race(#[from] RaceError),
    /// No such race.
    #[error("there is no race {0}")]
    NoRace(String),
    /// No such contestant.
    #[error("there is no contestant {0}")]
    NoContestant(String),
    /// The kvm source does not open.
    #[error("the kvm source does not open: {0}")]
    Kvm(#[from] hostmm::kvm::OpenError),
    /// The uffd source does not open.
    #[error("the uffd source does not open: {0}")]
    Uffd(#[from] hostmm::uffd::OpenError),
    /// The parts around a source are not there.
    #[error(transparent)]
    Host(#[from] hostmm::primary::HostError),
}

/// One race against one contestant.
#[derive(Debug, Serialize, Deserialize)]
struct Raced {
    race: String,
    threads: usize,
    contestant: String,
    /// Is it a control, and if so must it lose?
    control: Option<bool>,
    rounds: u64,
    lookups: u64,
    stale: u64,
    microseconds_per_round: f64,
    /// Why it was not run.
    failed: Option<String>,
}

impl Raced {
    fn holds(&self) -> bool {
        self.failed.is_none()
            && match self.control {
                None => self.stale == 0 && self.lookups > 0,
                Some(must_lose) => !must_lose || self.stale > 0,
            }
    }
}

/// The document that `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    holds: bool,
    rounds: u64,
    races: Vec<Raced>,
}

/// Rounds, looks in the cache, stale answers, seconds: what a child prints.
#[derive(Debug, Serialize, Deserialize)]
struct Numbers {
    rounds: u64,
    lookups: u64,
    stale: u64,
    seconds: f64,
}

/// What one child does.
pub(crate) fn answer(args: &RaceRowArgs) -> Result<ExitCode, Error> {
    let out = race(args)?;
    print_json(&Numbers {
        rounds: out.rounds,
        lookups: out.lookups,
        stale: out.stale,
        seconds: out.elapsed.as_secs_f64(),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn race(args: &RaceRowArgs) -> Result<Outcome, RaceRowError> {
    match args.source.as_str() {
        "nothing" => against(&Nothing, args),
        "uffd without probe" => against(&raced::Ordered(UffdSource::open(&Default::default())?), args),
        "uffd" => against(&HostMm::new(UffdSource::open(&Default::default())?, 1)?, args),
        "kvm" => against(&HostMm::new(KvmSource::open(&Default::default())?, 1)?, args),
        other => Err(RaceRowError::NoContestant(other.into())),
    }
}

fn against<S: Subject>(subject: &S, args: &RaceRowArgs) -> Result<Outcome, RaceRowError> {
    let race: &dyn Fn(u64) -> Result<Outcome, RaceError> = match args.race.as_str() {
        "munmap" => &|rounds| race::reuse(subject, Way::Munmap, rounds, 0),
        "munmap, busy CPUs" => &|rounds| race::reuse(subject, Way::Munmap, rounds, HOGS),
        "mremap" => &|rounds| race::reuse(subject, Way::Mremap, rounds, 0),
        "malloc, get, free" => &|rounds| race::churn(subject, args.threads, rounds),
        other => return Err(RaceRowError::NoRace(other.into())),
    };
    let RaceRowArgs { rounds, seconds, until_stale, .. } = *args;
    let time = Duration::from_secs(seconds);
    Ok(race::repeat(Length { rounds, time, until_stale }, race)?)
}

/// Race, threads, contestant, whether it is a control and must lose, rounds.
type Plan = (&'static str, usize, &'static str, Option<bool>, u64);

fn plan(args: &LiveArgs) -> Vec<Plan> {
    let races = [("munmap", 2), ("munmap, busy CPUs", 2), ("mremap", 2)].into_iter();
    let churns = args.threads.iter().map(|threads| ("malloc, get, free", *threads));
    let mut plan = Vec::new();
    for (race, threads) in races.chain(churns) {
        let rounds = if race.contains("busy") { args.rounds.div_ceil(BUSY_SHARE) } else { args.rounds };
        let few = rounds.min(CONTROL_ROUNDS);
        // One thread that looks up what itself has freed meets only system calls that have returned.
        let probe_matters = threads > 1 && race::has_two_cpus();
        plan.push((race, threads, "nothing", Some(true), few));
        if args.source != Sources::Kvm {
            plan.push((race, threads, "uffd without probe", Some(probe_matters), few));
            plan.push((race, threads, "uffd", None, rounds));
        }
        if args.source != Sources::Uffd {
            plan.push((race, threads, "kvm", None, rounds));
        }
    }
    plan
}

/// All races.
pub(crate) fn run(args: &LiveArgs) -> Result<ExitCode, Error> {
    Listener::chosen(args.source)?;
    let saved = Saved::create(args.save.as_ref())?;
    let plan = plan(args);
    let progress = super::progress(plan.len());
    let races: Vec<Raced> = plan
        .into_iter()
        .map(|one| {
            let (race, threads, contestant, ..) = one;
            progress.set_message(format!("{race}, {threads} threads: {contestant}"));
            let raced = run_one(one, args.seconds);
            progress.inc(1);
            raced
        })
        .collect();
    progress.finish_and_clear();
    let report = Report { holds: races.iter().all(Raced::holds), rounds: args.rounds, races };
    saved.write(&report)?;
    if args.json {
        print_json(&report)?;
    } else {
        print(&report);
    }
    Ok(ExitCode::from(u8::from(!report.holds)))
}

fn run_one((race, threads, contestant, control, rounds): Plan, seconds: u64) -> Raced {
    let numbers = [rounds, seconds, threads as u64].map(|number| number.to_string());
    let mut words = vec!["live-race", race, contestant];
    words.extend(numbers.iter().map(String::as_str));
    // A control that loses now and then may have been lucky.
    words.extend((control == Some(true)).then_some("--until-stale"));
    // A hang must end all the same.
    let deadline = Duration::from_secs(2 * seconds + 60);
    let (numbers, failed) = match child::ask::<Numbers>(&words, deadline) {
        Ok(numbers) => (numbers, None),
        Err(e) => (Numbers { rounds, lookups: 0, stale: 0, seconds: 0.0 }, Some(e.to_string())),
    };
    Raced {
        race: race.into(),
        threads,
        contestant: contestant.into(),
        control,
        rounds: numbers.rounds,
        lookups: numbers.lookups,
        stale: numbers.stale,
        microseconds_per_round: numbers.seconds * 1e6 / numbers.rounds.max(1) as f64,
        failed,
    }
}

fn print(report: &Report) {
    use std::io::IsTerminal;
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if !std::io::stdout().is_terminal() {
        table.force_no_tty();
    }
    table.set_header(["race", "threads", "contestant", "rounds", "lookups", "stale", "us/round", ""]);
    for raced in &report.races {
        let verdict = match (raced.holds(), raced.control) {
            (true, None) => Cell::new("holds").fg(Color::Green),
            (true, Some(true)) => Cell::new("control, has teeth"),
            (true, Some(false)) => Cell::new("control, may win"),
            (false, None) => Cell::new("DOES NOT HOLD").fg(Color::Red),
            (false, Some(_)) => Cell::new("CONTROL WITHOUT TEETH").fg(Color::Red),
        };
        table.add_row([
            Cell::new(&raced.race),
            Cell::new(raced.threads),
            Cell::new(&raced.contestant),
            Cell::new(raced.rounds),
            Cell::new(raced.lookups),
            Cell::new(raced.stale),
            Cell::new(format!("{:.1}", raced.microseconds_per_round)),
            verdict,
        ]);
    }
    println!("{table}");
    for raced in &report.races {
        if let Some(why) = &raced.failed {
            println!("did not run: {}, {} threads, {}: {why}", raced.race, raced.threads, raced.contestant);
        }
    }
    println!(
        "{}",
        if report.holds { "0 stale with both sources; the controls lose" } else { "does not hold" }
    );
}
