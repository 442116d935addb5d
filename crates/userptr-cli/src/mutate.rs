// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr mutate`: would a mistake in a driver be noticed?

use std::io::IsTerminal;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use interleave::MaySleep;
use mmu_check::mutate::{Fate, Limits, Mutation, SUBJECTS, Subject, mutate};
use serde::Serialize;

use crate::args::MutateArgs;
use crate::{Error, print_json};

#[derive(Serialize)]
struct JsonFate {
    driver: &'static str,
    off: String,
    noticed: bool,
    by: Option<String>,
    cell: Option<String>,
    why: Option<&'static str>,
    cells: usize,
    executions: u64,
    exhausted: bool,
}

impl JsonFate {
    fn new(fate: &Fate) -> JsonFate {
        JsonFate {
            driver: fate.kind.name,
            off: fate.off.to_string(),
            noticed: fate.noticed.is_some(),
            by: fate.noticed.as_ref().map(|noticed| noticed.by()),
            cell: fate.noticed.as_ref().map(|noticed| noticed.cell.name()),
            why: fate.noticed.is_none().then(|| fate.why()).flatten(),
            cells: fate.cells,
            executions: fate.executions,
            exhausted: fate.exhausted,
        }
    }
}

pub(crate) fn run(args: &MutateArgs) -> Result<ExitCode, Error> {
    let wanted = |subject: &&Subject| args.driver.as_ref().is_none_or(|name| subject.name().contains(name));
    let subjects: Vec<Subject> = SUBJECTS.iter().filter(wanted).copied().collect();
    if subjects.is_empty() {
        let known: Vec<_> = SUBJECTS.iter().map(Subject::name).collect();
        return Err(Error::NoSubject {
            name: args.driver.clone().unwrap_or_default(),
            known: known.join(", "),
        });
    }
    let limits = Limits { bound: args.bound, ..Limits::default() };
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("mutant {pos} of {len} {bar:30}") {
        bar.set_style(style);
    }
    let mutation = MaySleep::enter(|cx| {
        mutate(cx, &subjects, &limits, &|done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })
    });
    bar.finish_and_clear();
    if args.json {
        print_json(&mutation.fates.iter().map(JsonFate::new).collect::<Vec<_>>())?;
    } else {
        print(&mutation, args.all);
    }
    let explained = mutation.fates.iter().all(|fate| fate.noticed.is_some() || fate.why().is_some());
    Ok(ExitCode::from(u8::from(!(mutation.enough() && explained))))
}

fn print(mutation: &Mutation, all: bool) {
    for out in &mutation.left_out {
        let what = out.failure.message.lines().next().unwrap_or_default();
        println!("left out, for it breaks by itself: {}: {what}", out.cell);
    }
    let mut last = None;
    for fate in mutation.fates.iter().filter(|fate| all || fate.noticed.is_none()) {
        let name = fate.kind.name;
        if last.replace(name) != Some(name) {
            println!("{name}");
        }
        match &fate.noticed {
            Some(noticed) => println!("  {:<60} {} in {}", fate.off.to_string(), noticed.by(), noticed.cell),
            None => {
                let why = fate.why().unwrap_or("not explained");
                println!("  {:<60} SURVIVED {} cells: {why}", fate.off.to_string(), fate.cells);
            }
        }
    }
    let (noticed, of) = (mutation.noticed(), mutation.fates.len());
    let executions: u64 = mutation.fates.iter().map(|fate| fate.executions).sum();
    println!(
        "{noticed} of {of} noticed ({:.1} %), {executions} executions",
        noticed as f64 * 100.0 / of.max(1) as f64
    );
}
