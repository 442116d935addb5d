// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr answer --explain CELL`: what breaks one cell, as lanes; or one schedule of it again.

use std::process::ExitCode;
use std::time::Duration;

use drivers::{Callback, Callbacks};
use interleave::explore::Strategy;
use mmu_check::explain::explain;
use mmu_check::oracle::Rule;
use mmu_check::path;
use mmu_check::scenario::{self, Cell};
use mmu_notifier::Access;

use super::{BOUND, profile};
use crate::Error;
use crate::args::AnswerArgs;

/// `driver/access/path/profile`.
fn cell(name: &str, without: &[String]) -> Result<Cell, Error> {
    let bad = |what: &str| Error::NoCell { name: name.into(), what: what.into() };
    let [driver, access, at, kernel] = name.split('/').collect::<Vec<_>>()[..] else {
        return Err(bad("it has four parts"));
    };
    let kind = mmu_check::driver::named(driver).ok_or_else(|| bad("no such driver"))?;
    let access = match access {
        "read" => Access::Read,
        "write" => Access::Write,
        _ => return Err(bad("access is read or write")),
    };
    let path = path::named(at).ok_or_else(|| bad("no such path"))?;
    let mut callbacks = Callbacks::ALL;
    for name in without {
        let known = || Callback::ALL.map(Callback::name).join(", ");
        let callback = Callback::from_name(name)
            .ok_or_else(|| Error::NoCallback { name: name.clone(), known: known() })?;
        callbacks = callbacks.without(callback);
    }
    Ok(Cell { kind, access, path, profile: profile(name, kernel)?, callbacks })
}

pub(super) fn run(args: &AnswerArgs, name: &str) -> Result<ExitCode, Error> {
    let cell = cell(name, &args.without)?;
    if let Some(text) = &args.replay {
        let failure = scenario::replay(&cell, text).ok_or_else(|| Error::NoSchedule(text.clone()))?;
        match failure.and_then(|f| Rule::of_failure(f.kind, &f.message).map(|rule| (rule, f))) {
            Some((rule, failure)) => println!("{}", explain(&cell, rule, &failure)),
            None => println!("{cell}: no rule breaks in this schedule"),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut executions = 0;
    let bounds = (0..=args.bound.unwrap_or(BOUND)).map(|bound| (Strategy::Preemptions(bound), Some(bound)));
    for (strategy, bound) in bounds.chain([(Strategy::Dpor, None)]) {
        let time = Some(Duration::from_secs(args.seconds));
        let outcome = scenario::explore(&cell, strategy, time);
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
        let orders = bound.map_or("in any order".to_owned(), |bound| format!("with {bound} preemptions"));
        println!("{cell}: no rule breaks {orders} ({far}; {executions} executions)");
    }
    Ok(ExitCode::SUCCESS)
}
