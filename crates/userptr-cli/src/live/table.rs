// SPDX-License-Identifier: MIT OR Apache-2.0
//! `live` as a table for people.

use std::io::IsTerminal;

use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, presets};

use super::report::{Answer, Column, Declared, Found, Heard, Report, Row, word};

/// Print the table, then what does not hold, then one line that sums up.
pub(crate) fn print(report: &Report) {
    let terminal = std::io::stdout().is_terminal();
    println!("{}", table(&report.rows, terminal));
    println!("{LEGEND}");
    for row in &report.rows {
        for problem in &row.problems {
            println!("does not hold: {}: {problem}", row.event);
        }
        if let Some(why) = &row.skipped {
            println!("not made: {}: {why}", row.event);
        }
    }
    println!("{}", summary(report));
}

const LEGEND: &str = "\
pins: io_uring fixed buffer; pfn: caches the page frame number.  can go stale by it / found without a notifier: declared / measured.
heard: reported at all; return: before the system call returned; seen: before another thread saw the new bytes;
next use: what the two devices (pins/pfn) find after asking the source.  - : does not apply.  \"stale\" in a column that cannot hear the event is the truth about that source.";

fn summary(report: &Report) -> String {
    let made = report.rows.iter().filter(|row| row.skipped.is_none()).count();
    let failing = report.rows.iter().filter(|row| !row.problems.is_empty()).count();
    format!(
        "{made} of {} events made on Linux {} in {:.1} s; {}",
        report.rows.len(),
        report.kernel,
        report.seconds,
        if report.holds {
            "the control is stale on exactly the rows declared, both sources are coherent on all they must hear"
                .to_owned()
        } else {
            format!("{failing} do not hold")
        }
    )
}

/// The table, with colours for a terminal.
pub(crate) fn table(rows: &[Row], terminal: bool) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if !terminal {
        table.force_no_tty();
    }
    let bold = |text: &str| Cell::new(text).add_attribute(Attribute::Bold);
    table.set_header(
        [
            "event",
            "via",
            "declared\npins",
            "\npfn",
            "no notifier\npins",
            "\npfn",
            "uffd\nheard",
            "\nreturn",
            "\nseen",
            "\nnext use",
            "kvm\nheard",
            "\nreturn",
            "\nseen",
            "\nnext use",
        ]
        .map(bold),
    );
    for row in rows {
        let mut cells = vec![
            Cell::new(&row.event),
            Cell::new(&row.via),
            Cell::new(declared(row.declared_pinned)),
            Cell::new(declared(row.declared_unpinned)),
        ];
        match &row.no_notifier {
            Some(control) => cells.extend([control_cell(&control.pinned), control_cell(&control.unpinned)]),
            None => cells.extend([Cell::new("-"), Cell::new("-")]),
        }
        for column in [&row.uffd, &row.kvm] {
            cells.extend(column_cells(column.as_ref()));
        }
        table.add_row(cells);
    }
    table
}

fn declared(what: Declared) -> &'static str {
    match what {
        Declared::Stale => "stale",
        Declared::WriteStale => "write",
        Declared::Coherent => "no",
        Declared::Prevented => "prevented",
        Declared::NotMappable => "-",
    }
}

fn found(what: Found) -> &'static str {
    match what {
        Found::Stale => "stale",
        Found::Coherent => "ok",
        Found::Prevented => "prevented",
        Found::NotMappable => "-",
    }
}

fn control_cell(answer: &Answer) -> Cell {
    match answer {
        Answer::Ran(part) if part.found == Found::Stale => Cell::new("stale").fg(Color::Yellow),
        Answer::Ran(part) => Cell::new(found(part.found)),
        Answer::Failed(_) => Cell::new("FAILED").fg(Color::Red),
    }
}

fn column_cells(column: Option<&Column>) -> [Cell; 4] {
    let Some(column) = column else { return ["-"; 4].map(Cell::new) };
    let parts = [&column.pinned, &column.unpinned];
    let refusing = parts.into_iter().any(|a| matches!(a, Answer::Ran(part) if part.refused.is_some()));
    if refusing {
        return ["refuses", "-", "-", "one-shot"].map(Cell::new);
    }
    let heard: Vec<Heard> =
        parts.into_iter().filter_map(|a| if let Answer::Ran(part) = a { part.heard } else { None }).collect();
    let all = |of: fn(&Heard) -> Option<bool>| {
        let known: Vec<bool> = heard.iter().filter_map(of).collect();
        if known.is_empty() { None } else { Some(known.into_iter().all(|yes| yes)) }
    };
    let yes = |value: Option<bool>| {
        let cell = Cell::new(match value {
            Some(true) => "yes",
            Some(false) => "no",
            None => "-",
        });
        if value == Some(false) && column.must_hear { cell.fg(Color::Yellow) } else { cell }
    };
    let next = parts.map(|a| match a {
        Answer::Ran(part) => found(part.found),
        _ => "FAILED",
    });
    let bad = next.contains(&"FAILED") || (column.must_hear && next.contains(&"stale"));
    let text = if next[0] == next[1] { next[0].to_owned() } else { next.join("/") };
    let next = Cell::new(text).fg(if bad { Color::Red } else { Color::Reset });
    let reported = match (column.must_hear, all(|h| Some(h.reported))) {
        (false, Some(false)) => Cell::new("cannot"),
        (_, value) => yes(value),
    };
    [reported, yes(all(|h| Some(h.before_return))), yes(all(|h| h.before_visible)), next]
}

/// The events and what is declared of them, for `--list`.
pub(crate) fn print_list(rows: &[Row], uffd_and_kvm: &[(bool, bool)]) {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["event", "pins", "pfn", "uffd", "kvm", "why", "kernel path"]);
    let hears = |yes: bool| if yes { "hears" } else { "cannot" };
    for (row, (uffd, kvm)) in rows.iter().zip(uffd_and_kvm) {
        table.add_row([
            row.event.clone(),
            word(&row.declared_pinned),
            word(&row.declared_unpinned),
            hears(*uffd).into(),
            hears(*kvm).into(),
            row.why.clone(),
            row.kernel_path.clone(),
        ]);
    }
    println!("{table}");
}
