// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr answer`: the table of drivers beside paths, one cell explained, the callbacks that a driver cannot do without.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use comfy_table::Table;
use drivers::Callbacks;
use interleave::MaySleep;
use interleave::explore::Strategy;
use mmu_check::answer::{Answer, Question, Reach, Row, answer, never_effective, rows, sufficient};
use mmu_check::explain::explain;
use mmu_check::oracle::Rule;
use mmu_check::path::{self, PATHS};
use mmu_check::scenario::{self, Cell};
use mmu_notifier::Access;
use serde::Serialize;
use softmm::KernelProfile;

use crate::args::AnswerArgs;
use crate::{Error, print_json};

/// Preemptions while callbacks are switched off.
const CALLBACKS_BOUND: u32 = 1;
/// Time for one exploration of these.
const CALLBACKS_TIME: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &AnswerArgs) -> Result<ExitCode, Error> {
    if let Some(name) = &args.explain {
        return one(args, name);
    }
    let question = question(args)?;
    if args.callbacks {
        return callbacks(&question, args.json);
    }
    let terminal = std::io::stderr().is_terminal();
    let progress = |bound, done, all| {
        if terminal {
            eprint!("\r{bound} preemptions: {done} of {all} cells ");
        }
    };
    let answers = MaySleep::enter(|cx| answer(cx, &question, &progress));
    if terminal {
        eprintln!();
    }
    if args.json {
        print_json(&answers.iter().map(Line::of).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    for profile in &question.profiles {
        println!("{}\n{}\n", profile.name, table(&question, profile, &answers));
    }
    println!(
        "A number is a bound: every order of at most so many preemptions was tried and no rule broke. ? not one bound was \
         finished. - the driver does not take this memory. Rules:"
    );
    let broken = |rule: &Rule| answers.iter().any(|a| a.broken.iter().any(|(r, _)| r == rule));
    for rule in Rule::ALL.into_iter().filter(broken) {
        println!("  {} {rule}: {}", short(rule), rule.source());
    }
    dead(&question, &answers);
    Ok(ExitCode::SUCCESS)
}

fn question(args: &AnswerArgs) -> Result<Question, Error> {
    let named = |wanted: &Option<String>, name: &str| wanted.as_ref().is_none_or(|text| name.contains(text));
    let profiles = args.profile.iter().map(|name| profile(name, name)).collect::<Result<_, _>>()?;
    let rows: Vec<Row> = rows().into_iter().filter(|row| named(&args.driver, row.kind.name)).collect();
    let paths: Vec<_> = PATHS.iter().filter(|path| named(&args.path, path.name)).collect();
    if rows.is_empty() || paths.is_empty() {
        let name = format!("{:?} {:?}", args.driver, args.path);
        return Err(Error::NoCell { name, what: "no driver or no path has that in its name".into() });
    }
    let time = Duration::from_secs(args.seconds);
    Ok(Question { rows, paths, profiles, bound: args.bound, time, ..Question::default() })
}

fn profile(of: &str, name: &str) -> Result<KernelProfile, Error> {
    let known = || KernelProfile::ALL.map(|profile| profile.name).join(", ");
    let what = || format!("profiles are {}", known());
    KernelProfile::named(name).ok_or_else(|| Error::NoCell { name: of.into(), what: what() })
}

/// `driver/access/path/profile`.
fn cell(name: &str) -> Result<Cell, Error> {
    let bad = |what: &str| Error::NoCell { name: name.into(), what: what.into() };
    let [driver, access, at, kernel] = name.split('/').collect::<Vec<_>>()[..] else {
        return Err(bad("it has four parts"));
    };
    let kind =
        drivers::DRIVERS.iter().find(|kind| kind.name == driver).ok_or_else(|| bad("no such driver"))?;
    let access = match access {
        "read" => Access::Read,
        "write" => Access::Write,
        _ => return Err(bad("access is read or write")),
    };
    let path = path::named(at).ok_or_else(|| bad("no such path"))?;
    Ok(Cell { kind, access, path, profile: profile(name, kernel)?, callbacks: Callbacks::ALL })
}

fn one(args: &AnswerArgs, name: &str) -> Result<ExitCode, Error> {
    let cell = cell(name)?;
    if let Some(text) = &args.replay {
        let failure = scenario::replay(&cell, text).ok_or_else(|| Error::NoSchedule(text.clone()))?;
        match failure.and_then(|f| Rule::of_failure(f.kind, &f.message).map(|rule| (rule, f))) {
            Some((rule, failure)) => println!("{}", explain(&cell, rule, &failure)),
            None => println!("{cell}: no rule breaks in this schedule"),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut executions = 0;
    for bound in 0..=args.bound {
        let time = Some(Duration::from_secs(args.seconds));
        let outcome = scenario::explore(&cell, Strategy::Preemptions(bound), time);
        executions += outcome.report.executions;
        if let Some(refused) = outcome.facts.refused {
            println!("{cell}: the driver does not take this memory: {refused}");
            return Ok(ExitCode::SUCCESS);
        }
        if !outcome.failures.is_empty() {
            for (rule, failure) in &outcome.failures {
                println!("{}\n", explain(&cell, *rule, failure));
            }
            return Ok(ExitCode::SUCCESS);
        }
        let far = if outcome.report.exhausted { "exhausted" } else { "not finished in time" };
        println!("{cell}: no rule breaks with {bound} preemptions ({far}; {executions} executions)");
    }
    Ok(ExitCode::SUCCESS)
}

fn callbacks(question: &Question, json: bool) -> Result<ExitCode, Error> {
    let mut lines = Vec::new();
    for row in &question.rows {
        for profile in &question.profiles {
            let kept = sufficient(*row, *profile, CALLBACKS_BOUND, CALLBACKS_TIME);
            let (name, all) = (label(row), row.kind.callbacks);
            if !json {
                println!("{name:<34} {:<12} {kept} (of {all})", profile.name);
            }
            lines.push((name, profile.name, kept.to_string(), all.to_string()));
        }
    }
    if json {
        print_json(&lines)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn label(row: &Row) -> String {
    let access = if row.access == Access::Write { "write" } else { "read" };
    format!("{} {access}", row.kind.name)
}

/// One letter for the three harms of a stale translation, more for the rest.
fn short(rule: Rule) -> &'static str {
    match rule {
        Rule::Coherence => "C",
        Rule::Isolation => "I",
        Rule::MemorySafety => "U",
        Rule::WritePermission => "W",
        Rule::Dirty => "D",
        other => other.name(),
    }
}

fn in_short(answer: &Answer) -> String {
    if answer.facts.refused.is_some() {
        return "-".into();
    }
    if !answer.broken.is_empty() {
        return answer.broken.iter().map(|(rule, _)| short(*rule)).collect::<Vec<_>>().join(" ");
    }
    match answer.reach {
        _ if !answer.odd.is_empty() => "odd".into(),
        Reach::Nothing => "?".into(),
        Reach::Preemptions(bound) => bound.to_string(),
    }
}

fn table(question: &Question, profile: &KernelProfile, answers: &[Answer]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    let names = question.paths.iter().map(|path| path.name);
    table.set_header(std::iter::once("driver").chain(names));
    for row in &question.rows {
        let mine = answers.iter().filter(|answer| {
            std::ptr::eq(answer.cell.kind, row.kind)
                && answer.cell.access == row.access
                && answer.cell.profile.name == profile.name
        });
        table.add_row(std::iter::once(label(row)).chain(mine.map(in_short)));
    }
    table
}

/// Callbacks that were run and never had an effect.
fn dead(question: &Question, answers: &[Answer]) {
    for profile in &question.profiles {
        for row in &question.rows {
            let mine = answers.iter().filter(|answer| {
                std::ptr::eq(answer.cell.kind, row.kind)
                    && answer.cell.access == row.access
                    && answer.cell.profile.name == profile.name
            });
            for callback in never_effective(mine) {
                println!("{} under {}: {callback} never had an effect", label(row), profile.name);
            }
        }
    }
}

#[derive(Serialize)]
struct Line {
    cell: String,
    broken: Vec<Found>,
    odd: Vec<String>,
    refused: Option<String>,
    /// Preemptions up to which every order was tried.
    bound: Option<u32>,
    executions: u64,
    accesses: u64,
    callbacks: u64,
    effects: u64,
    retries: u64,
    unbinds: u64,
    repins: u64,
}

#[derive(Serialize)]
struct Found {
    rule: &'static str,
    how: String,
    preemptions: usize,
    replay: String,
}

impl Line {
    fn of(answer: &Answer) -> Line {
        let found = |(rule, failure): &(Rule, interleave::explore::Failure)| Found {
            rule: rule.name(),
            how: failure.message.clone(),
            preemptions: failure.preemptions,
            replay: failure.replay.clone(),
        };
        let facts = &answer.facts;
        Line {
            cell: answer.cell.name(),
            broken: answer.broken.iter().map(found).collect(),
            odd: answer.odd.iter().map(ToString::to_string).collect(),
            refused: facts.refused.map(|refused| refused.to_string()),
            bound: match answer.reach {
                Reach::Nothing => None,
                Reach::Preemptions(bound) => Some(bound),
            },
            executions: answer.executions,
            accesses: facts.accesses,
            callbacks: facts.callbacks.iter().sum(),
            effects: facts.effects.iter().sum(),
            retries: facts.retries,
            unbinds: facts.unbinds,
            repins: facts.repins,
        }
    }
}
