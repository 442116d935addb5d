// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was measured, and the goals beside it.

use serde::Serialize;

use super::change::Verdict;
use super::contestant::{How, Side};
use super::work::Measured;

/// The middle; sorts. Of nothing 0.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

/// Who is asked in which way: a column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Column {
    pub(super) side: Side,
    pub(super) how: How,
}

impl Column {
    pub(super) fn name(self) -> &'static str {
        match (self.side, self.how) {
            (Side::Ucx, _) => "ucx",
            (Side::Kvm, _) => "kvm",
            (Side::Uffd, How::Strict) => "uffd strict",
            (Side::Uffd, How::Batch) => "uffd batch",
            (Side::Uffd, How::Ordered) => "uffd ordered",
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum What {
    Hit,
    Miss,
    Unmap,
    UnmapUnregistered,
    Churn,
    HitUnderGlibc,
    HitUnderJemalloc,
    HitUnderOtherVm,
    HitUnderOtherVmWide,
}

/// One kind of measurement at one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Point {
    pub(super) what: What,
    pub(super) registrations: usize,
    pub(super) threads: usize,
}

/// One column at one point.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cell {
    #[serde(flatten)]
    pub(super) point: Point,
    #[serde(flatten)]
    pub(super) column: Column,
    /// Median of the batches.
    pub(super) nanos: f64,
    pub(super) least: f64,
    pub(super) most: f64,
    pub(super) lookups: u64,
    pub(super) missed: u64,
    pub(super) stale: u64,
    /// Why there is no number.
    pub(super) failed: Option<String>,
}

impl Cell {
    pub(super) fn new(point: Point, column: Column, batches: Vec<Result<Measured, String>>) -> Cell {
        let (mut nanos, mut failed, mut sum) = (Vec::new(), None, Measured::default());
        for batch in batches {
            match batch {
                Ok(m) => {
                    nanos.push(m.nanos);
                    sum.lookups += m.lookups;
                    sum.missed += m.missed;
                    sum.stale += m.stale;
                }
                Err(why) => failed = Some(why),
            }
        }
        let middle = median(&mut nanos);
        let (least, most) = (nanos.first().copied().unwrap_or(0.0), nanos.last().copied().unwrap_or(0.0));
        let Measured { lookups, missed, stale, .. } = sum;
        Cell { point, column, nanos: middle, least, most, lookups, missed, stale, failed }
    }

    /// Part of the lookups that found what was registered.
    pub(super) fn hit_rate(&self) -> f64 {
        1.0 - self.missed as f64 / self.lookups.max(1) as f64
    }
}

/// One way to change memory.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) change: String,
    pub(super) via: String,
    pub(super) kvm_hears: bool,
    pub(super) uffd_hears: bool,
    #[serde(serialize_with = "by_side")]
    pub(super) verdicts: Vec<(Side, Result<Verdict, String>)>,
    /// Why it was not made.
    pub(super) skipped: Option<String>,
}

fn by_side<S: serde::Serializer>(
    verdicts: &[(Side, Result<Verdict, String>)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(untagged)]
    enum Told<'a> {
        Verdict(Verdict),
        Failed { failed: &'a str },
    }
    serializer.collect_map(verdicts.iter().map(|(side, verdict)| {
        let told = match verdict {
            Ok(verdict) => Told::Verdict(*verdict),
            Err(why) => Told::Failed { failed: why },
        };
        (side.name(), told)
    }))
}

impl Row {
    pub(super) fn of(&self, side: Side) -> Option<&Result<Verdict, String>> {
        self.verdicts.iter().find(|(s, _)| *s == side).map(|(_, verdict)| verdict)
    }

    /// Is it stale where the source promises to hear it?
    pub(super) fn broken_promise(&self) -> bool {
        let stale = |side| matches!(self.of(side), Some(Ok(Verdict::Stale)));
        (self.kvm_hears && stale(Side::Kvm)) || (self.uffd_hears && stale(Side::Uffd))
    }
}

/// A goal of the project and what was found.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Goal {
    pub(super) goal: String,
    pub(super) found: String,
    /// `None`: not measured.
    pub(super) holds: Option<bool>,
    /// Do timings decide it? Those decide the exit code only if that is asked for.
    pub(super) timing: bool,
}

/// The document that `--json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) kernel: String,
    pub(super) cpus: usize,
    /// Load average before and after.
    pub(super) load: [String; 2],
    pub(super) batches: usize,
    pub(super) goals: Vec<Goal>,
    pub(super) cells: Vec<Cell>,
    pub(super) changes: Vec<Row>,
    /// Sides that could not be measured, and why.
    pub(super) missing: Vec<(Side, String)>,
}

impl Report {
    /// The cell, if it has a number.
    pub(super) fn cell(&self, point: Point, column: Column) -> Option<&Cell> {
        let found = self.cells.iter().find(|c| c.point == point && c.column == column)?;
        found.failed.is_none().then_some(found)
    }

    /// The points, in the order in which they were measured.
    pub(super) fn points(&self) -> Vec<Point> {
        let mut points = Vec::new();
        for cell in &self.cells {
            if !points.contains(&cell.point) {
                points.push(cell.point);
            }
        }
        points
    }

    /// Stale answers of a side: in the churn, at new memory, and of the changes that it ought to hear.
    pub(super) fn stale(&self, side: Side) -> u64 {
        self.cells.iter().filter(|c| c.column.side == side).map(|c| c.stale).sum()
    }

    /// The changes after which a side hands out what is not the program's.
    pub(super) fn stale_changes(&self, side: Side) -> usize {
        self.changes.iter().filter(|row| matches!(row.of(side), Some(Ok(Verdict::Stale)))).count()
    }

    /// 1: a stale hit of ours where it must hear, or a timing that was asked to be held.
    pub(super) fn exit_code(&self, check: bool) -> u8 {
        let failing = |goal: &Goal| goal.holds == Some(false) && (check || !goal.timing);
        u8::from(self.goals.iter().any(failing))
    }
}
