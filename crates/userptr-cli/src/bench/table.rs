// SPDX-License-Identifier: MIT OR Apache-2.0
//! `bench` as tables for people.

use std::io::IsTerminal;

use comfy_table::{Attribute, Cell as Field, CellAlignment, Color, ContentArrangement, Table, presets};

use super::change::Verdict;
use super::contestant::{How, Side};
use super::report::{Cell, Column, Point, Report, Row, What};

const COLUMNS: [Column; 5] = [
    Column { side: Side::Ucx, how: How::Strict },
    Column { side: Side::Kvm, how: How::Strict },
    Column { side: Side::Uffd, how: How::Strict },
    Column { side: Side::Uffd, how: How::Batch },
    Column { side: Side::Uffd, how: How::Ordered },
];

pub(super) fn print(report: &Report) {
    println!("{}", numbers(report));
    println!("{LEGEND}");
    if !report.changes.is_empty() {
        println!("\n{}", changes(&report.changes));
        for row in &report.changes {
            for (side, verdict) in &row.verdicts {
                if let Err(why) = verdict {
                    println!("no verdict: {}, {}: {why}", row.change, side.name());
                }
            }
            if let Some(why) = &row.skipped {
                println!("not made: {}: {why}", row.change);
            }
        }
    }
    println!("\n{}", goals(report));
    for cell in report.cells.iter().filter(|cell| cell.failed.is_some()) {
        let why = cell.failed.as_deref().unwrap_or_default();
        println!("not measured: {}, {}: {why}", label(cell.point), cell.column.name());
    }
    for (side, why) in &report.missing {
        println!("without {}: {why}", side.name());
    }
    println!(
        "Linux {}, {} CPUs, load {} before and {} after; medians of {} batches, in turns",
        report.kernel, report.cpus, report.load[0], report.load[1], report.batches
    );
}

const LEGEND: &str = "\
ns; x: of ucx's. A lookup is CPU time of its thread, munmap and churn are time on the wall. Devices keep nothing: it is the cache and its source.
uffd strict asks the kernel at each lookup; batch: 64 lookups share the question; ordered: asks nobody, right about system calls that have returned.";

fn blank() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if !std::io::stdout().is_terminal() {
        table.force_no_tty();
    }
    table
}

fn bold(text: &str) -> Field {
    Field::new(text).add_attribute(Attribute::Bold)
}

fn label(point: Point) -> String {
    let Point { what, registrations, threads } = point;
    let s = if threads == 1 { "" } else { "s" };
    match what {
        What::Hit if registrations == 1 => format!("hit, 1 registration, {threads} thread{s}"),
        What::Hit => format!("hit, {registrations} registrations, {threads} thread{s}"),
        What::Miss => "miss".into(),
        What::Unmap => "munmap, one registered page".into(),
        What::UnmapUnregistered => "munmap, one page not registered".into(),
        What::Churn => format!("malloc, get, free: {threads} thread{s}"),
        What::HitUnderGlibc => "hit while glibc churns".into(),
        What::HitUnderJemalloc => "hit while jemalloc churns".into(),
        What::HitUnderOtherVm => "hit while another VM unmaps 16 KiB".into(),
        What::HitUnderOtherVmWide => "hit while another VM unmaps 8 MiB".into(),
    }
}

fn numbers(report: &Report) -> Table {
    let mut table = blank();
    table.set_header(std::iter::once(bold("")).chain(COLUMNS.map(|column| bold(column.name()))));
    for point in report.points() {
        let peer = report.cell(point, COLUMNS[0]);
        let mut fields = vec![Field::new(label(point))];
        fields.extend(COLUMNS.map(|column| number(report.cell(point, column), peer)));
        table.add_row(fields);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn number(cell: Option<&Cell>, peer: Option<&Cell>) -> Field {
    let Some(cell) = cell else { return Field::new("-") };
    let digits = usize::from(cell.nanos < 1000.0);
    let mut text = format!("{:.digits$}", cell.nanos);
    if let (Some(peer), true) = (peer, cell.column.side != Side::Ucx) {
        text.push_str(&format!(" {:.2}x", cell.nanos / peer.nanos));
    }
    match cell.point.what {
        What::Churn => text.push_str(&format!(", {} stale of {}", cell.stale, cell.lookups)),
        What::HitUnderGlibc | What::HitUnderJemalloc | What::HitUnderOtherVm | What::HitUnderOtherVmWide => {
            text.push_str(&format!(", {:.2} % hits", 100.0 * cell.hit_rate()));
        }
        What::Hit if cell.hit_rate() < 0.9999 => {
            text.push_str(&format!(", {:.2} % hits", 100.0 * cell.hit_rate()));
        }
        What::Hit | What::Miss | What::Unmap | What::UnmapUnregistered => {}
    }
    let field = Field::new(text);
    if cell.stale > 0 { field.fg(Color::Red) } else { field }
}

fn changes(rows: &[Row]) -> Table {
    let mut table = blank();
    table.set_header(["memory changed by", "via", "ucx", "kvm", "uffd"].map(bold));
    for row in rows {
        let mut fields = vec![Field::new(&row.change), Field::new(&row.via)];
        fields.extend(Side::ALL.map(|side| verdict(row, side)));
        table.add_row(fields);
    }
    table
}

fn verdict(row: &Row, side: Side) -> Field {
    match row.of(side) {
        Some(Ok(Verdict::Coherent)) => Field::new("coherent").fg(Color::Green),
        Some(Ok(Verdict::Stale)) => Field::new("STALE").fg(Color::Red),
        Some(Err(_)) => Field::new("no verdict"),
        None => Field::new("-"),
    }
}

fn goals(report: &Report) -> Table {
    let mut table = blank();
    table.set_header(["goal", "found", ""].map(bold));
    for goal in &report.goals {
        let held = match goal.holds {
            Some(true) => Field::new("holds").fg(Color::Green),
            Some(false) => Field::new("MISSED").fg(Color::Red),
            None => Field::new("-"),
        };
        table.add_row([Field::new(&goal.goal), Field::new(&goal.found), held]);
    }
    table
}
