// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ledger as Markdown.
//!
//! What is computed is the same on every machine. What is measured (times, the running kernel) stands between the lines
//! [`MEASURED`] and [`MEASURED_END`], and [`computed`] leaves it out, so that a document can be held against what comes out now.

use super::condition::off;
use super::{Claim, Decided, Verdict};
use crate::answer::minimal::Minimal;
use crate::answer::worth::Worth;
use crate::answer::{Answer, Reach};
use std::fmt::Write;

/// Begins what is measured.
pub const MEASURED: &str = "<!-- measured -->";
/// Ends it.
pub const MEASURED_END: &str = "<!-- end of measured -->";

fn preemptions(n: u32) -> String {
    match n {
        0 => "no preemption".into(),
        1 => "one preemption".into(),
        n => format!("{n} preemptions"),
    }
}

const fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::True => "true",
        Verdict::False => "false",
        Verdict::Sometimes => "true under a condition",
        Verdict::Open => "open",
    }
}

/// The heading of a claim, and how its statements come out in a line.
pub fn heading(claim: &Claim, decided: &[Decided]) -> String {
    let words: Vec<_> = decided.iter().map(|decided| word(decided.verdict)).collect();
    format!("\n## {}. {}\n\nStatements: {}.\n", claim.number, claim.title, words.join("; "))
}

/// A statement, how it comes out, why, and how to see it again.
pub fn statement(decided: &Decided) -> String {
    let mut out = String::new();
    let Decided { statement, verdict, condition, holds, fails, mute, reach, exhausted, witness } = decided;
    let _ = writeln!(out, "\n**{}** *{}*", statement.says, word(*verdict));
    let _ = write!(out, "\nTrue in {holds} cells, false in {fails}");
    if *mute > 0 {
        let _ = write!(out, ", no answer in {mute}");
    }
    match reach {
        Some(Reach::Everything) => out.push_str("; where no rule breaks, every order was tried.\n"),
        Some(Reach::Preemptions(bound)) => {
            let bound = preemptions(*bound);
            let _ = write!(out, "; where no rule breaks, every order of at most {bound} was tried");
            let _ = match exhausted {
                0 => writeln!(out, "."),
                1 => writeln!(out, ", in one cell every order."),
                n => writeln!(out, ", in {n} cells every order."),
            };
        }
        Some(Reach::Nothing) => out.push_str("; not every order was tried.\n"),
        None => out.push_str(".\n"),
    }
    if !condition.is_empty() {
        out.push('\n');
        for line in condition {
            let text = line.trim_start();
            let _ = writeln!(out, "{:indent$}- {text}", "", indent = line.len() - text.len());
        }
    }
    if let Some(answer) = witness {
        out.push_str(&counterexample(answer));
    }
    out
}

/// The command that shows what breaks in `answer`, by the schedule with the fewest preemptions.
fn counterexample(answer: &Answer) -> String {
    let Some((rule, failure)) =
        answer.broken.iter().min_by_key(|(_, failure)| (failure.preemptions, failure.schedule.len()))
    else {
        return String::new();
    };
    let cell = &answer.cell;
    let message = failure.message.lines().next().unwrap_or_default();
    // Where in the source, and with which numbers, is no matter of the claim.
    let message = message.split(" at crates/").next().unwrap_or(message);
    let off = off(cell);
    let without =
        if off == "nothing" { String::new() } else { format!(" --without {}", off.replace(" + ", ",")) };
    format!(
        "\nCounterexample ({rule}, {}): {message}.\n\n```sh\nuserptr answer --explain {cell}{without} --replay '{}'\n```\n",
        preemptions(failure.preemptions as u32),
        failure.replay
    )
}

/// What a callback is good for: a table.
pub fn worth(bound: u32, profiles: &[&str], rows: &[(String, Vec<Worth>)]) -> String {
    let mut out = format!(
        "\nWhat change_pte is good for, on the paths that call it (at most {}; `userptr answer --change-pte`):\n\n",
        preemptions(bound)
    );
    table(&mut out, std::iter::once("driver").chain(profiles.iter().copied()).map(str::to_owned));
    for (name, worths) in rows {
        row(&mut out, std::iter::once(name.clone()).chain(worths.iter().map(ToString::to_string)));
    }
    out
}

/// The callbacks that drivers cannot do without: a table.
pub fn minimal(bound: u32, rows: &[(String, &str, Minimal)]) -> String {
    let mut out = format!(
        "\nThe callbacks that each driver cannot do without, found by switching them off one by one (`userptr answer --callbacks`), with \
         every order of at most {}. The last column: paths that break with all of them too, if \
         not as easily.\n\n",
        preemptions(bound)
    );
    let heads = ["driver", "kernel", "has", "needs", "because", "breaks even so"];
    table(&mut out, heads.into_iter().map(str::to_owned));
    for (name, profile, found) in rows {
        let because: Vec<_> = found
            .because
            .iter()
            .map(|(callback, path, rule)| format!("without {callback}, {path} breaks {rule}"))
            .collect();
        let lost = if found.lost.is_empty() { "-".to_owned() } else { found.lost.join(", ") };
        row(
            &mut out,
            [
                name.clone(),
                (*profile).to_owned(),
                found.all.to_string(),
                found.kept.to_string(),
                because.join("; "),
                lost,
            ]
            .into_iter(),
        );
    }
    out
}

/// The head of a table.
pub fn table(out: &mut String, heads: impl Iterator<Item = String> + Clone) {
    row(out, heads.clone());
    row(out, heads.map(|_| "---".to_owned()));
}

/// A row of a table.
pub fn row(out: &mut String, cells: impl Iterator<Item = String>) {
    let cells: Vec<String> = cells.collect();
    let _ = writeln!(out, "| {} |", cells.join(" | "));
}

/// What is computed, of a whole document: without what stands between [`MEASURED`] and [`MEASURED_END`], and without empty
/// lines, which come and go with it.
pub fn computed(document: &str) -> String {
    let mut measured = false;
    let mut out = String::new();
    for line in document.lines() {
        match line {
            MEASURED => measured = true,
            MEASURED_END => measured = false,
            _ if !measured && !line.trim().is_empty() => {
                out.push_str(line.trim_end());
                out.push('\n');
            }
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_left_out() {
        let document = format!("a\n\n{MEASURED}\n12 ns\n{MEASURED_END}\nb  \n");
        assert_eq!(computed(&document), "a\nb\n");
    }
}
