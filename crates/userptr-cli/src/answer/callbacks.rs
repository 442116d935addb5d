// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr answer --callbacks` and `--change-pte`: what is left of a driver's callbacks when those go that it can do without, and what
//! one callback is good for.

use std::process::ExitCode;

use comfy_table::Table;
use drivers::Callback;
use interleave::MaySleep;
use mmu_check::answer::minimal::{Minimal, minimal as search};
use mmu_check::answer::worth::{Worth, worth as value};
use mmu_check::answer::{Progress, Question, Turn, in_parallel};
use serde::Serialize;

use super::{Bar, FEWER, effort};
use crate::args::AnswerArgs;
use crate::{Error, print_json};

#[derive(Serialize)]
struct Kept {
    driver: String,
    profile: &'static str,
    has: String,
    needs: String,
    lost: Vec<&'static str>,
    because: Vec<String>,
    bound: u32,
}

impl Kept {
    fn of(driver: String, profile: &'static str, bound: u32, found: &Minimal) -> Kept {
        let because = found
            .because
            .iter()
            .map(|(c, path, rule)| format!("without {c}, {path} breaks {rule}"))
            .collect();
        let (has, needs) = (found.all.to_string(), found.kept.to_string());
        Kept { driver, profile, has, needs, lost: found.lost.clone(), because, bound }
    }
}

pub(super) fn minimal(question: &Question, args: &AnswerArgs) -> Result<ExitCode, Error> {
    let effort = effort(args, FEWER, None);
    let bar = Bar::new();
    let mut wanted = Vec::new();
    for row in &question.rows {
        wanted.extend(question.profiles.iter().map(|profile| (*row, *profile, None)));
    }
    MaySleep::enter(|cx| {
        in_parallel(cx, effort.threads, &mut wanted, |(row, profile, found), done, of| {
            *found = Some(search(*row, *profile, &question.paths, effort.bound));
            bar.show(Progress { turn: Turn::Bound(effort.bound), done: done + 1, of });
        });
    });
    drop(bar);
    let lines: Vec<Kept> = wanted
        .iter()
        .filter_map(|(row, profile, found)| {
            Some(Kept::of(row.name(), profile.name, effort.bound, found.as_ref()?))
        })
        .collect();
    if args.json {
        print_json(&lines)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["driver", "profile", "needs", "of", "breaks even so"]);
    for line in &lines {
        table.add_row([&line.driver, line.profile, &line.needs, &line.has, &line.lost.join(", ")]);
    }
    println!("{table}");
    println!("\nEvery order of at most {} preemptions on {} paths.", effort.bound, question.paths.len());
    for line in lines.iter().filter(|line| !line.because.is_empty()) {
        println!("{} under {}: {}", line.driver, line.profile, line.because.join("; "));
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Good {
    driver: String,
    profile: &'static str,
    worth: String,
    needed: bool,
    dead: bool,
}

pub(super) fn worth(question: &Question, args: &AnswerArgs) -> Result<ExitCode, Error> {
    let effort = effort(args, FEWER, None);
    let bar = Bar::new();
    let mut lines = Vec::new();
    MaySleep::enter(|cx| {
        for row in &question.rows {
            for profile in &question.profiles {
                let show = |progress| bar.show(progress);
                let worth = value(cx, *row, Callback::ChangePte, *profile, &question.paths, effort, &show);
                lines.push(Good {
                    driver: row.name(),
                    profile: profile.name,
                    needed: matches!(worth, Worth::Needed(_)),
                    dead: worth == Worth::Dead,
                    worth: worth.to_string(),
                });
            }
        }
    });
    drop(bar);
    if args.json {
        print_json(&lines)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["driver", "profile", "change_pte"]);
    for line in &lines {
        table.add_row([&line.driver, line.profile, &line.worth]);
    }
    println!("{table}");
    println!("\nEvery order of at most {} preemptions.", effort.bound);
    Ok(ExitCode::SUCCESS)
}
