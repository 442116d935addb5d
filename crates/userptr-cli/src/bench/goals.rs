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

#[cfg(test)]
mod tests {
    use super::super::change::Verdict;
    use super::super::report::{Cell, Row};
    use super::super::work::Measured;
    use super::*;

    fn report(cells: Vec<Cell>, changes: Vec<Row>) -> Report {
        let mut report = Report {
            kernel: String::new(),
            cpus: 2,
            load: [String::new(), String::new()],
            batches: 1,
            goals: Vec::new(),
            cells,
            changes,
            missing: Vec::new(),
        };
        report.goals = judge(&report);
        report
    }

    fn cell(what: What, registrations: usize, side: Side, nanos: f64, stale: u64) -> Cell {
        let measured = Measured { nanos, lookups: 100, missed: 0, stale };
        Cell::new(
            Point { what, registrations, threads: 1 },
            Column { side, how: How::Strict },
            vec![Ok(measured)],
        )
    }

    fn holds(report: &Report, words: &str) -> Option<bool> {
        report.goals.iter().find(|goal| goal.goal.starts_with(words)).expect(words).holds
    }

    #[test]
    fn a_goal_of_speed_decides_the_exit_code_only_if_that_is_asked_for() {
        let hit = |registrations, side, nanos| cell(What::Hit, registrations, side, nanos, 0);
        let cells = |slow| {
            vec![
                hit(1, Side::Ucx, 40.0),
                hit(1, Side::Kvm, 20.0),
                hit(1000, Side::Ucx, 80.0),
                hit(1000, Side::Kvm, slow),
            ]
        };
        let good = report(cells(30.0), Vec::new());
        assert_eq!((holds(&good, "kvm: a hit"), holds(&good, "kvm: within")), (Some(true), Some(true)));
        assert_eq!((good.exit_code(false), good.exit_code(true)), (0, 0));
        let slow = report(cells(41.0), Vec::new());
        assert_eq!((holds(&slow, "kvm: a hit"), holds(&slow, "kvm: within")), (Some(false), Some(false)));
        assert_eq!((slow.exit_code(false), slow.exit_code(true)), (0, 1));
        assert_eq!(holds(&slow, "uffd batch: a hit"), None, "nobody measured it");
    }

    #[test]
    fn a_stale_hit_of_ours_fails_and_one_of_the_peer_does_not() {
        let churn = |kvm, ucx| {
            let cells =
                vec![cell(What::Churn, 0, Side::Kvm, 1.0, kvm), cell(What::Churn, 0, Side::Ucx, 1.0, ucx)];
            report(cells, Vec::new()).exit_code(false)
        };
        assert_eq!((churn(0, 5), churn(1, 0)), (0, 1));
    }

    #[test]
    fn a_change_must_be_heard_by_a_source_that_promises_to() {
        let row = |side, uffd_hears| Row {
            change: "truncate/raw".into(),
            via: String::new(),
            kvm_hears: true,
            uffd_hears,
            verdicts: vec![(side, Ok(Verdict::Stale))],
            skipped: None,
        };
        let code = |side, uffd_hears| report(Vec::new(), vec![row(side, uffd_hears)]).exit_code(false);
        assert_eq!(code(Side::Kvm, true), 1);
        assert_eq!((code(Side::Uffd, true), code(Side::Uffd, false)), (1, 0));
        assert_eq!(code(Side::Ucx, true), 0);
    }
}
