// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr check`: a known bug where it is, and where it was mended.

use std::process::ExitCode;

use interleave::explore::Strategy;
use mmu_check::corpus::{self, BUGS, Bug};
use mmu_check::scenario::{Cell, Outcome, explore};

use crate::Error;
use crate::args::CheckArgs;

/// Preemptions that the search goes up to where the bug is; one fewer where it was mended, for time.
const BOUND: u32 = 2;

pub(crate) fn run(args: &CheckArgs) -> Result<ExitCode, Error> {
    let known = || BUGS.iter().map(|bug| bug.number.to_string()).collect::<Vec<_>>().join(", ");
    let bugs: Vec<&Bug> = match args.bug {
        Some(number) => {
            vec![corpus::numbered(number).ok_or_else(|| Error::NoBug { number, known: known() })?]
        }
        None => BUGS.iter().collect(),
    };
    let mut holds = true;
    for bug in bugs {
        println!("bug {}: {}", bug.number, bug.title);
        if let Some(cell) = bug.broken() {
            let found = (0..=BOUND).map(|bound| search(&cell, bound)).find(|o| !o.failures.is_empty());
            match found.as_ref().and_then(|outcome| outcome.failures.first()) {
                Some((rule, failure)) => println!("{}\n", mmu_check::explain::explain(&cell, *rule, failure)),
                None => {
                    holds = false;
                    println!("{cell}: not found in {BOUND} preemptions\n");
                }
            }
        }
        if let Some(cell) = bug.mended() {
            let outcome = search(&cell, BOUND - 1);
            let silent = outcome.failures.is_empty() && outcome.odd.is_empty() && outcome.report.exhausted;
            holds &= silent && outcome.facts.accesses > 0;
            println!("{}\n", quiet(&cell, &outcome));
        }
    }
    Ok(ExitCode::from(u8::from(!holds)))
}

fn search(cell: &Cell, bound: u32) -> Outcome {
    explore(cell, Strategy::Preemptions(bound), None)
}

/// What "nothing" was found in.
fn quiet(cell: &Cell, outcome: &Outcome) -> String {
    let facts = &outcome.facts;
    if let Some((rule, failure)) = outcome.failures.first() {
        return mmu_check::explain::explain(cell, *rule, failure);
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
