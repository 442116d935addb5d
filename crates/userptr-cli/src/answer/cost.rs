// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr answer --cost`: what each driver costs for each operation.

use std::process::ExitCode;
use std::time::Duration;

use comfy_table::Table;
use interleave::MaySleep;
use mmu_check::answer::Question;
use mmu_check::answer::cost::{Operation, Times, operation, times};
use serde::Serialize;

use crate::args::AnswerArgs;
use crate::{Error, print_json};

#[derive(Serialize)]
struct Line {
    driver: String,
    profile: &'static str,
    path: &'static str,
    callbacks: u64,
    unbinds: u64,
    repins: u64,
    faults: u64,
    /// The operation without the driver, in nanoseconds; medians, as the next three.
    alone_ns: u64,
    /// With it.
    watched_ns: u64,
    /// Of this, the callbacks.
    callbacks_ns: u64,
    /// The device's next use of the page.
    next_use_ns: u64,
}

impl Line {
    fn new(
        driver: String,
        profile: &'static str,
        path: &'static str,
        costs: Operation,
        times: Times,
    ) -> Line {
        let ns = |time: Duration| time.as_nanos() as u64;
        Line {
            driver,
            profile,
            path,
            callbacks: costs.all_callbacks(),
            unbinds: costs.unbinds,
            repins: costs.repins,
            faults: costs.faults,
            alone_ns: ns(times.alone),
            watched_ns: ns(times.watched),
            callbacks_ns: ns(times.callbacks),
            next_use_ns: ns(times.next_use),
        }
    }
}

pub(super) fn run(question: &Question, args: &AnswerArgs) -> Result<ExitCode, Error> {
    let mut lines = Vec::new();
    MaySleep::enter(|cx| {
        for row in &question.rows {
            for path in &question.paths {
                for profile in &question.profiles {
                    let cell = row.cell(path, *profile);
                    let (Some(costs), Some(times)) = (operation(cx, &cell), times(cx, &cell, args.rounds))
                    else {
                        continue;
                    };
                    lines.push(Line::new(row.name(), profile.name, path.name, costs, times));
                }
            }
        }
    });
    if args.json {
        print_json(&lines)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header([
        "driver",
        "path",
        "profile",
        "callbacks",
        "unbinds",
        "re-pins",
        "faults",
        "alone",
        "watched",
        "in callbacks",
        "next use",
    ]);
    for line in &lines {
        let ns = |ns: u64| format!("{ns} ns");
        table.add_row([
            line.driver.clone(),
            line.path.into(),
            line.profile.into(),
            line.callbacks.to_string(),
            line.unbinds.to_string(),
            line.repins.to_string(),
            line.faults.to_string(),
            ns(line.alone_ns),
            ns(line.watched_ns),
            ns(line.callbacks_ns),
            ns(line.next_use_ns),
        ]);
    }
    println!("{table}");
    println!(
        "\nFor one operation and the device's next use. Counts are exact; times are medians of {}.",
        args.rounds
    );
    Ok(ExitCode::SUCCESS)
}
