// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr check`: a known bug where it is, and where it was mended.

use std::process::ExitCode;

use mmu_check::corpus::{self, BUGS, Bug, ELSEWHERE, Found};
use mmu_check::explain::explain;
use mmu_check::scenario::{Cell, Outcome};

use crate::Error;
use crate::args::CheckArgs;

/// Preemptions that the search goes up to where the bug is; one fewer where it was mended, for time.
const BOUND: u32 = 2;

pub(crate) fn run(args: &CheckArgs) -> Result<ExitCode, Error> {
    let bugs: Vec<&Bug> = match &args.bug {
        Some(id) => vec![corpus::named(id).ok_or_else(|| unknown(id))?],
        None => BUGS.iter().collect(),
    };
    let mut holds = true;
    for bug in bugs {
        println!("bug {}: {}", bug.id, bug.title);
        holds &= is_found(bug) & is_mended(bug);
    }
    Ok(ExitCode::from(u8::from(!holds)))
}

fn unknown(id: &str) -> Error {
    let known = BUGS.iter().map(|bug| bug.id).collect::<Vec<_>>().join(", ");
    let elsewhere = ELSEWHERE.iter().find(|(number, _)| *number == id);
    let why = elsewhere.map_or("no such bug", |(_, why)| why);
    Error::NoBug { id: id.to_owned(), why, known }
}

fn is_found(bug: &Bug) -> bool {
    match bug.find(BOUND, None) {
        Some(Found::Broken(cell, rule, failure)) => println!("{}\n", explain(&cell, rule, &failure)),
        Some(Found::Dead(callback, run)) => {
            println!("{callback} ran {run} times on all paths and never had an effect\n");
        }
        Some(Found::Nothing(cell)) => {
            println!("{cell}: not found in {BOUND} preemptions\n");
            return false;
        }
        None => return false,
    }
    true
}

fn is_mended(bug: &Bug) -> bool {
    let Some((cell, outcome)) = bug.check_mended(BOUND - 1, None) else { return false };
    println!("{}\n", quiet(&cell, &outcome));
    bug.is_mended(&outcome) && outcome.report.exhausted
}

/// What "nothing" was found in.
fn quiet(cell: &Cell, outcome: &Outcome) -> String {
    let facts = &outcome.facts;
    if let Some((rule, failure)) = outcome.failures.first() {
        return explain(cell, *rule, failure);
    }
    if let Some(refused) = facts.refused {
        return format!("{cell}: refused: {refused}");
    }
    format!(
        "{cell}: silent; {} executions, every order of {} preemption: {} callbacks, {} retries, {} device accesses",
        outcome.report.executions,
        BOUND - 1,
        facts.callbacks.iter().sum::<u64>(),
        facts.retries,
        facts.accesses
    )
}
