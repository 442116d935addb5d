// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr doctor`: what this machine offers.

use std::io::IsTerminal;
use std::process::ExitCode;

use comfy_table::{Cell, Color, ContentArrangement, Table, presets};
use hostmm::capability::{self, Capability, Report, State, Verdict};

use crate::args::DoctorArgs;
use crate::{Error, print_json};

/// Columns, where there is no terminal to ask.
const WIDTH: u16 = 140;

/// Print the report; the exit code is the verdict.
pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode, Error> {
    if let Some(name) = &args.has {
        let capability = Capability::ALL.iter().find(|c| c.name() == name);
        let capability = capability.ok_or_else(|| Error::NoCapability {
            name: name.clone(),
            known: Capability::ALL.iter().map(|c| c.name()).collect::<Vec<_>>().join(", "),
        })?;
        let there = matches!(capability::probe(*capability), State::There(_));
        return Ok(ExitCode::from(u8::from(!there)));
    }
    let report = Report::new();
    if args.json {
        print_json(&report)?;
    } else {
        print(&report);
    }
    Ok(ExitCode::from(report.verdict().exit_code()))
}

fn print(report: &Report) {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    if !std::io::stdout().is_terminal() {
        table.force_no_tty().set_width(WIDTH);
    }
    table.set_header(["capability", "state", "found", "needed for"]);
    for entry in &report.capabilities {
        let colour = match entry.state {
            "there" => Color::Green,
            "partial" => Color::Yellow,
            _ => Color::Red,
        };
        table.add_row([
            Cell::new(entry.name),
            Cell::new(entry.state).fg(colour),
            Cell::new(&entry.detail),
            Cell::new(entry.needed_for),
        ]);
    }
    let lockdown = report.lockdown.as_deref().unwrap_or("unknown");
    println!("Linux {}, uid {}, lockdown {lockdown}\n\n{table}\n", report.kernel, report.uid);
    for entry in report.capabilities.iter().filter(|e| e.state != "there") {
        println!("to get {}: {}", entry.name, entry.how_to_get_it);
    }
    println!(
        "\n{}",
        match report.verdict() {
            Verdict::Complete => "complete: the kvm source hears every change of this process's memory",
            Verdict::Partial => {
                "partial: only the uffd source is usable; `userptr live` prints what it cannot hear"
            }
            Verdict::None => "none: no source is usable here, every registration is good for one use",
        }
    );
}
