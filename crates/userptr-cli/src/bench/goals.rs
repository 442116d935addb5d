// SPDX-License-Identifier: MIT OR Apache-2.0
//! The goals: how fast a hit shall be beside UCX's, how little it shall depend on the number of registrations and
//! threads, and that none is ever stale.

use super::contestant::{How, Side};
use super::report::{Column, Goal, Point, Report, What};

/// Of UCX's hit.
const SHARE: f64 = 0.5;
/// Between the best and the worst point of ours.
const SPREAD: f64 = 1.5;

const UCX: Column = Column { side: Side::Ucx, how: How::Strict };

pub(super) fn judge(report: &Report) -> Vec<Goal> {
    let columns = [
        Column { side: Side::Kvm, how: How::Strict },
        Column { side: Side::Uffd, how: How::Batch },
        Column { side: Side::Uffd, how: How::Ordered },
    ];
    let hits: Vec<Point> = report.points().into_iter().filter(|p| p.what == What::Hit).collect();
    let mut goals = Vec::new();
    for column in columns {
        goals.push(against_ucx(report, &hits, column));
        goals.push(spread(report, &hits, column));
    }
    goals.push(never_stale(report));
    goals
}

fn place(point: Point) -> String {
    let threads =
        if point.threads == 1 { "1 thread".to_owned() } else { format!("{} threads", point.threads) };
    format!("{} registrations, {threads}", point.registrations)
}

fn against_ucx(report: &Report, points: &[Point], column: Column) -> Goal {
    let ratios = points.iter().filter_map(|point| {
        let (ours, ucx) = (report.cell(*point, column)?, report.cell(*point, UCX)?);
        Some((ours.nanos / ucx.nanos, *point))
    });
    let worst = ratios.max_by(|(a, _), (b, _)| a.total_cmp(b));
    Goal {
        goal: format!("{}: a hit takes at most {SHARE} of UCX's at every point", column.name()),
        found: worst
            .map_or("not measured".into(), |(ratio, at)| format!("at most {ratio:.2} ({})", place(at))),
        holds: worst.map(|(ratio, _)| ratio <= SHARE),
        timing: true,
    }
}

fn spread(report: &Report, points: &[Point], column: Column) -> Goal {
    let nanos: Vec<f64> = points.iter().filter_map(|p| report.cell(*p, column)).map(|c| c.nanos).collect();
    let (least, most) = nanos.iter().fold((f64::MAX, 0.0_f64), |(l, m), n| (l.min(*n), m.max(*n)));
    let measured = nanos.len() > 1;
    Goal {
        goal: format!("{}: within {SPREAD}x over all registrations and threads", column.name()),
        found: if measured {
            format!("{:.2}x, {least:.1} to {most:.1} ns", most / least)
        } else {
            "not measured".into()
        },
        holds: measured.then(|| most / least <= SPREAD),
        timing: true,
    }
}

fn never_stale(report: &Report) -> Goal {
    let ours = [Side::Kvm, Side::Uffd];
    let stale: u64 = ours.iter().map(|side| report.stale(*side)).sum();
    let broken: Vec<&str> =
        report.changes.iter().filter(|row| row.broken_promise()).map(|row| row.change.as_str()).collect();
    let churned = |side: &&Side| {
        report.cells.iter().any(|c| c.point.what == What::Churn && c.column.side == **side && c.lookups > 0)
    };
    let measured = !report.changes.is_empty() || ours.iter().any(|side| churned(&side));
    let mut found = format!(
        "ours {stale} in the churn and {} of {} changes (ucx {} and {})",
        ours.iter().map(|side| report.stale_changes(*side)).max().unwrap_or(0),
        report.changes.iter().filter(|row| row.skipped.is_none()).count(),
        report.stale(Side::Ucx),
        report.stale_changes(Side::Ucx),
    );
    if !broken.is_empty() {
        found = format!("{found}: {}", broken.join(", "));
    }
    Goal {
        goal: "0 stale hits of ours, whatever the source promises to hear".into(),
        found,
        holds: measured.then_some(stale == 0 && broken.is_empty()),
        timing: false,
    }
}
