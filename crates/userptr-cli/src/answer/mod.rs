// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr answer`: the table of drivers beside paths, one cell explained, what callbacks are good for, what they cost, and
//! the ledger of claims.

mod callbacks;
mod cost;
mod explain;
mod ledger;
mod table;
pub(crate) mod trace;

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use mmu_check::answer::{Effort, Progress, Question, Row, rows};
use mmu_check::path::PATHS;
use softmm::KernelProfile;

use crate::Error;
use crate::args::AnswerArgs;

/// Preemptions in the table and in the search for one cell.
const BOUND: u32 = 2;
/// Preemptions where every cell is explored several times.
const FEWER: u32 = 1;

pub(crate) fn run(args: &AnswerArgs) -> Result<ExitCode, Error> {
    if let Some(name) = &args.explain {
        return explain::run(args, name);
    }
    let question = question(args)?;
    if args.ledger {
        ledger::run(args)
    } else if args.callbacks {
        callbacks::minimal(&question, args)
    } else if args.change_pte {
        callbacks::worth(&question, args)
    } else if args.cost {
        cost::run(&question, args)
    } else {
        table::run(&question, args.json)
    }
}

fn effort(args: &AnswerArgs, bound: u32, time: Option<Duration>) -> Effort {
    Effort { bound: args.bound.unwrap_or(bound), time, threads: args.threads.max(1) }
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
    let effort = effort(args, BOUND, Some(Duration::from_secs(args.seconds)));
    Ok(Question { rows, paths, profiles, anachronisms: args.anachronisms, effort })
}

/// The profile called `name`, which is part of what the user gave: `of`.
fn profile(of: &str, name: &str) -> Result<KernelProfile, Error> {
    let known = || KernelProfile::ALL.map(|profile| profile.name).join(", ");
    let what = || format!("profiles are {}", known());
    KernelProfile::named(name).ok_or_else(|| Error::NoCell { name: of.into(), what: what() })
}

/// A bar on standard error, and nothing if that is no terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Bar {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        Bar(ProgressBar::new(0).with_style(style))
    }

    fn show(&self, progress: Progress) {
        self.0.set_length(progress.of as u64);
        self.0.set_position(progress.done as u64);
        self.0.set_message(format!("cells, {}", progress.turn));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
