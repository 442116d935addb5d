// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was seen, in tables and as JSON.

use super::symbols::Symbols;
use super::tally::{Amount, Tally};
use comfy_table::{CellAlignment, Table, presets};
use hostmm::trace::{Ended, What};
use serde::Serialize;

/// Lines of the longer tables.
const LINES: usize = 12;

#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// What was watched.
    pub(super) program: String,
    pub(super) ended: String,
    /// From its exec, or from when it was watched, to the end of the last process.
    pub(super) seconds: f64,
    pub(super) changes: u64,
    pub(super) pages: u64,
    pub(super) by_cause: Vec<ByCause>,
    pub(super) by_range: Vec<ByRange>,
    pub(super) by_site: Vec<BySite>,
    pub(super) processes: Vec<Process>,
    pub(super) unwatched: Vec<Unwatched>,
    /// Changes that could not be attributed: more than one watched program maps the address.
    pub(super) unattributed: u64,
    /// Changes that did not fit the ring: all figures above are too small by these.
    pub(super) lost: u64,
    /// Changes that the kernel did not tell the program of; null where that cannot be known.
    pub(super) missed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cost: Option<Vec<ByPrice>>,
}

#[derive(Debug, Serialize)]
pub(super) struct ByCause {
    pub(super) cause: String,
    pub(super) count: u64,
    pub(super) pages: u64,
    pub(super) per_second: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct ByRange {
    pub(super) pid: i32,
    pub(super) range: String,
    pub(super) count: u64,
    pub(super) pages: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct BySite {
    pub(super) cause: String,
    pub(super) site: String,
    pub(super) count: u64,
    pub(super) pages: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) program: String,
    pub(super) changes: u64,
    pub(super) pages: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Unwatched {
    pub(super) pid: i32,
    pub(super) why: String,
}

#[derive(Debug, Serialize)]
pub(super) struct ByPrice {
    pub(super) cause: String,
    /// 2 MiB objects that are unbound and pinned again.
    pub(super) objects: u64,
    pub(super) object_pages: u64,
    /// Single translations that are dropped and faulted in again.
    pub(super) translations: u64,
}

/// What changed in mappings of one name.
#[derive(Default)]
struct Range {
    count: u64,
    pages: u64,
    spaces: u64,
}

impl Report {
    pub(super) fn new(
        what: &What,
        ended: &Ended,
        tally: &Tally,
        (lost, missed): (u64, Option<u64>),
    ) -> Report {
        let seconds = tally.lived().as_secs_f64();
        let symbols = Symbols::of(tally.by_site.keys().map(|(_, site)| site));
        let mut by_cause: Vec<ByCause> = tally
            .by_cause
            .iter()
            .map(|(cause, a)| ByCause {
                cause: cause.clone(),
                count: a.count,
                pages: a.pages,
                per_second: a.count as f64 / seconds.max(1e-9),
            })
            .collect();
        by_cause.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.cause.cmp(&b.cause)));
        let mut by_range: Vec<ByRange> = tally
            .by_region
            .iter()
            .map(|((mm, name), a)| ByRange {
                pid: tally.mms[*mm].tgid,
                range: name.clone(),
                count: a.count,
                pages: a.pages,
            })
            .collect();
        by_range.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.range.cmp(&b.range)));
        let mut named = std::collections::BTreeMap::<(String, String), Amount>::new();
        for ((cause, site), a) in &tally.by_site {
            let sum = named.entry((cause.clone(), symbols.name(site))).or_default();
            sum.count += a.count;
            sum.pages = sum.pages.saturating_add(a.pages);
        }
        let mut by_site: Vec<BySite> = named
            .into_iter()
            .map(|((cause, site), a)| BySite { cause, site, count: a.count, pages: a.pages })
            .collect();
        by_site.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.site.cmp(&b.site)));
        let price = |(cause, p): (&String, &super::cost::Price)| ByPrice {
            cause: cause.clone(),
            objects: p.objects,
            object_pages: p.object_pages,
            translations: p.pages,
        };
        Report {
            program: match what {
                What::Program(args) => args.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" "),
                What::Process(pid) => format!("process {pid}"),
            },
            ended: match ended {
                Ended::Code(code) => format!("exit {code}"),
                Ended::Signal(signal) => format!("signal {signal}"),
                Ended::Asked(signal) => format!("still running, asked to stop by signal {signal}"),
            },
            seconds,
            changes: by_cause.iter().map(|c| c.count).sum(),
            pages: by_cause.iter().map(|c| c.pages).fold(0, u64::saturating_add),
            by_cause,
            by_range,
            by_site,
            processes: tally
                .mms
                .iter()
                .map(|mm| Process {
                    pid: mm.tgid,
                    program: mm.program.clone(),
                    changes: mm.changed.count,
                    pages: mm.changed.pages,
                })
                .collect(),
            unwatched: tally
                .unwatched
                .iter()
                .map(|(pid, why)| Unwatched { pid: *pid, why: why.clone() })
                .collect(),
            unattributed: tally.ambiguous,
            lost,
            missed,
            cost: tally.cost.as_ref().map(|cost| {
                let mut prices: Vec<ByPrice> = cost.by_cause.iter().map(price).collect();
                prices.sort_by_key(|p| std::cmp::Reverse((p.objects, p.translations)));
                prices
            }),
        }
    }

    /// The ranges by name, of all address spaces together.
    fn ranges(&self) -> Vec<(&str, Range)> {
        let mut named = std::collections::BTreeMap::<&str, Range>::new();
        for r in &self.by_range {
            let sum = named.entry(&r.range).or_default();
            sum.count += r.count;
            sum.pages = sum.pages.saturating_add(r.pages);
            sum.spaces += 1;
        }
        let mut ranges: Vec<_> = named.into_iter().collect();
        ranges.sort_by_key(|(_, r)| std::cmp::Reverse(r.count));
        ranges
    }

    /// For a terminal.
    pub(super) fn table(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{} ({}): {} invalidations of {} pages in {:.2} s, {} address space{}",
            line(&self.program),
            self.ended,
            self.changes,
            self.pages,
            self.seconds,
            self.processes.len(),
            if self.processes.len() == 1 { "" } else { "s" }
        );
        let causes = self.by_cause.iter().map(|c| {
            vec![c.cause.clone(), c.count.to_string(), c.pages.to_string(), format!("{:.1}", c.per_second)]
        });
        section(&mut out, ["cause", "count", "pages", "per second"], causes);
        let ranges = self.ranges().into_iter().map(|(name, r)| {
            vec![name.to_owned(), r.count.to_string(), r.pages.to_string(), r.spaces.to_string()]
        });
        section(&mut out, ["range", "count", "pages", "address spaces"], ranges);
        let sites = self
            .by_site
            .iter()
            .map(|s| vec![s.site.clone(), s.count.to_string(), s.pages.to_string(), s.cause.clone()]);
        section(&mut out, ["call site", "count", "pages", "cause"], sites);
        if let Some(cost) = &self.cost {
            let rows = cost.iter().map(|p| {
                vec![
                    p.cause.clone(),
                    p.objects.to_string(),
                    p.object_pages.to_string(),
                    p.translations.to_string(),
                ]
            });
            section(&mut out, ["cost at most", "objects unbound", "pages re-pinned", "translations"], rows);
        }
        for u in &self.unwatched {
            let _ = writeln!(out, "not watched: process {}: {}", u.pid, u.why);
        }
        if self.unattributed > 0 {
            let _ = writeln!(out, "not attributed (more than one program maps it): {}", self.unattributed);
        }
        if self.lost > 0 || self.missed.is_some_and(|m| m > 0) {
            let missed = self.missed.unwrap_or(0);
            let _ = writeln!(out, "LOST: {} did not fit, {missed} were never told", self.lost);
        }
        out
    }
}

/// A command as one line that is not too long.
fn line(command: &str) -> String {
    const LONGEST: usize = 120;
    let mut words: String = command.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((at, _)) = words.char_indices().nth(LONGEST) {
        words.truncate(at);
        words.push('…');
    }
    words
}

fn section(out: &mut String, head: [&str; 4], rows: impl Iterator<Item = Vec<String>>) {
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return;
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(head);
    for row in rows.iter().take(LINES) {
        table.add_row(row);
    }
    let left = rows.len().saturating_sub(LINES);
    for column in [1, 2] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    out.push('\n');
    for line in table.lines() {
        out.push_str(line.trim_end());
        out.push('\n');
    }
    if left > 0 {
        out.push_str(&format!("  and {left} more (--json)\n"));
    }
}
