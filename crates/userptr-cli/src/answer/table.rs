// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr answer`: the table.

use std::process::ExitCode;

use comfy_table::Table;
use interleave::MaySleep;
use interleave::explore::Failure;
use mmu_check::answer::table::{Mark, across, letter};
use mmu_check::answer::{Answer, Question, Reach, Row, answer, never_effective};
use mmu_check::oracle::Rule;
use mmu_check::path::Path;
use serde::Serialize;
use softmm::KernelProfile;

use super::Bar;
use crate::{Error, print_json};

/// Paths side by side: three profiles that disagree take some fourteen columns.
const ABREAST: usize = 6;

pub(super) fn run(question: &Question, json: bool) -> Result<ExitCode, Error> {
    let bar = Bar::new();
    let answers =
        MaySleep::enter(|cx| answer(cx, question.cells(), question.effort, &|progress| bar.show(progress)));
    drop(bar);
    if json {
        print_json(&answers.iter().map(Line::of).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    let profiles: Vec<_> = question.profiles.iter().map(|profile| profile.name).collect();
    println!("Each cell: {}; one word where all say the same.\n", profiles.join(", "));
    for paths in question.paths.chunks(ABREAST) {
        println!("{}\n", table(question, paths, &answers));
    }
    legend(&answers);
    dead(question, &answers);
    Ok(ExitCode::SUCCESS)
}

fn table(question: &Question, paths: &[&'static Path], answers: &[Answer]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(std::iter::once("driver").chain(paths.iter().map(|path| path.name)));
    for row in question.rows.iter().filter(|row| answers.iter().any(|a| row.has(&a.cell))) {
        let cells = paths.iter().map(|path| {
            let mark = |profile: &KernelProfile| {
                let mut mine =
                    answers.iter().filter(|a| row.has(&a.cell) && std::ptr::eq(a.cell.path, *path));
                mine.find(|a| a.cell.profile.name == profile.name).map_or(Mark::Elsewhere, Mark::of)
            };
            across(&question.profiles.iter().map(mark).collect::<Vec<_>>())
        });
        table.add_row(std::iter::once(row.name()).chain(cells));
    }
    table
}

fn legend(answers: &[Answer]) {
    println!(
        "ok*  no rule breaks in any order\n\
         okN  no rule breaks in any order of at most N preemptions\n\
         ?    not even the orders without preemptions were finished in the time; odd: the model failed\n\
         -    the driver does not take this memory\n\
         .    the driver was never in that kernel, and nobody asks (`--anachronisms` does)\n\
         Letters are the rules that break, the number is how many preemptions that takes:"
    );
    let broken = |rule: &Rule| answers.iter().any(|a| a.rules().any(|r| r == *rule));
    for rule in Rule::ALL.into_iter().filter(broken) {
        println!("  {}  {:<17} {}", letter(rule), rule.name(), rule.source());
    }
    let of = |wanted: fn(&Mark) -> bool| answers.iter().filter(|a| wanted(&Mark::of(a))).count();
    let broken = of(|mark| matches!(mark, Mark::Breaks(..)));
    let exhausted = of(|mark| *mark == Mark::Holds(Reach::Everything));
    let bounded = of(|mark| matches!(mark, Mark::Holds(Reach::Preemptions(_))));
    let unknown = of(|mark| *mark == Mark::Unknown);
    println!(
        "{} cells: in {broken} a rule breaks, {exhausted} are exhausted ({}% of those in which none does), {bounded} hold up to a \
         bound, {unknown} are not finished. {} executions. `userptr answer --explain DRIVER/write/PATH/PROFILE` shows one.",
        answers.len(),
        exhausted * 100 / (exhausted + bounded + unknown).max(1),
        answers.iter().map(|a| a.executions).sum::<u64>(),
    );
}

/// Callbacks that were run and never had an effect.
fn dead(question: &Question, answers: &[Answer]) {
    for profile in &question.profiles {
        let of = |row: &Row| {
            let mine = answers.iter().filter(|a| row.has(&a.cell) && a.cell.profile.name == profile.name);
            never_effective(mine)
        };
        for (row, callback) in question.rows.iter().flat_map(|row| of(row).into_iter().map(move |c| (row, c)))
        {
            println!("{} under {}: {callback} never had an effect", row.name(), profile.name);
        }
    }
}

#[derive(Serialize)]
struct Line {
    cell: String,
    broken: Vec<Found>,
    odd: Vec<String>,
    refused: Option<String>,
    /// Every order was tried.
    exhausted: bool,
    /// Preemptions up to which every order was tried, if not every order at all.
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
        let found = |(rule, failure): &(Rule, Failure)| Found {
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
            exhausted: answer.reach == Reach::Everything,
            bound: match answer.reach {
                Reach::Preemptions(bound) => Some(bound),
                Reach::Nothing | Reach::Everything => None,
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
