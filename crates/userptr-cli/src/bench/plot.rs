// SPDX-License-Identifier: MIT OR Apache-2.0
//! The report as pictures: SVG without scripts or fonts of its own, readable on light and on dark ground.

use std::fmt::Write;

use super::contestant::Side;
use super::report::{Column, Point, Report, What};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 56.0;

/// Colours that keep apart for the colour-blind too (after Okabe and Ito; the blue lighter, for dark ground).
const COLOURS: [&str; 5] = ["#d55e00", "#3d8fd1", "#cc79a7", "#009e73", "#e69f00"];

const STYLE: &str = "<style>\
text{font:13px system-ui,sans-serif;fill:#222}.title{font-size:16px;font-weight:600}.axis{stroke:#888;fill:none}\
.grid{stroke:#8884;fill:none}.ground{fill:#fff}\
@media(prefers-color-scheme:dark){text{fill:#ddd}.ground{fill:#161b22}}</style>";

/// File names and documents.
pub(super) fn all(report: &Report) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let hits: Vec<Point> = report.points().into_iter().filter(|p| p.what == What::Hit).collect();
    let mut threads: Vec<usize> = hits.iter().map(|p| p.threads).collect();
    threads.dedup();
    threads.sort_unstable();
    threads.dedup();
    for threads in threads {
        let points: Vec<Point> = hits.iter().copied().filter(|p| p.threads == threads).collect();
        let s = if threads == 1 { "" } else { "s" };
        let title = format!("A hit, {threads} thread{s}: ns of CPU time by registrations");
        all.push((format!("hit-{threads}-thread{s}.svg"), lines(report, &points, &title)));
    }
    if !report.changes.is_empty() {
        all.push(("changes.svg".to_owned(), changes(report)));
    }
    all
}

fn document(height: f64, title: &str, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\
         <title>{title}</title>{STYLE}<rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\"/>\
         <text class=\"title\" x=\"{LEFT}\" y=\"26\">{title}</text>{body}</svg>\n"
    )
}

/// `write!` to a string cannot fail.
macro_rules! add {
    ($to:expr, $($what:tt)*) => {{ let _ = write!($to, $($what)*); }};
}

/// Both axes logarithmic: a line that is flat does not depend on the number of registrations, and equal heights are
/// equal ratios.
fn lines(report: &Report, points: &[Point], title: &str) -> String {
    let mut columns: Vec<Column> = Vec::new();
    for cell in report.cells.iter().filter(|c| points.contains(&c.point) && c.failed.is_none()) {
        if !columns.contains(&cell.column) {
            columns.push(cell.column);
        }
    }
    let nanos = |point: Point, column: Column| report.cell(point, column).map(|cell| cell.nanos.max(0.1));
    let values: Vec<f64> =
        points.iter().flat_map(|p| columns.iter().filter_map(move |c| nanos(*p, *c))).collect();
    let (least, most) = values.iter().fold((f64::MAX, 1.0_f64), |(l, m), v| (l.min(*v), m.max(*v)));
    let (low, high) = (least.log10().floor(), most.log10().ceil().max(least.log10().floor() + 1.0));
    let last = points.iter().map(|p| p.registrations).max().unwrap_or(1).max(10) as f64;
    let x =
        |registrations: usize| LEFT + (WIDTH - LEFT - RIGHT) * (registrations as f64).log10() / last.log10();
    let y = |nanos: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (nanos.log10() - low) / (high - low);
    let mut body = String::new();
    let (floor, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for decade in low as i32..=high as i32 {
        for step in [1.0, 2.0, 5.0] {
            let nanos = step * 10_f64.powi(decade);
            if nanos.log10() > high {
                break;
            }
            let at = y(nanos);
            add!(body, "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/>");
            add!(
                body,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{nanos}</text>",
                LEFT - 8.0,
                at + 4.0
            );
        }
    }
    add!(body, "<path class=\"axis\" d=\"M{LEFT} {TOP}V{floor}H{right}\"/>");
    for point in points {
        let (at, n) = (x(point.registrations), point.registrations);
        add!(body, "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{n}</text>", floor + 20.0);
    }
    add!(body, "<text x=\"{LEFT}\" y=\"{:.1}\">registrations</text>", floor + 42.0);
    let mut labels: Vec<(f64, usize)> = Vec::new();
    for (n, column) in columns.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let mut path = String::new();
        for point in points {
            let Some(value) = nanos(*point, *column) else { continue };
            let (px, py) = (x(point.registrations), y(value));
            add!(path, "{}{px:.1} {py:.1}", if path.is_empty() { "M" } else { "L" });
            add!(body, "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
        }
        add!(body, "<path d=\"{path}\" stroke=\"{colour}\" stroke-width=\"2\" fill=\"none\"/>");
        let end = points.iter().rev().find_map(|p| nanos(*p, *column));
        labels.push((end.map_or(floor, y), n));
    }
    // Names at the ends of their lines, apart from each other.
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut above = TOP - 16.0;
    for (at, n) in labels {
        above = at.max(above + 16.0);
        let (colour, name) = (COLOURS[n % COLOURS.len()], columns[n].name());
        add!(
            body,
            "<text x=\"{:.1}\" y=\"{:.1}\" style=\"fill:{colour}\">{name}</text>",
            right + 10.0,
            above + 4.0
        );
    }
    document(HEIGHT, title, &body)
}

/// How many of the ways to change memory leave each cache stale.
fn changes(report: &Report) -> String {
    let made = report.changes.iter().filter(|row| row.skipped.is_none()).count().max(1);
    let height = TOP + 44.0 * Side::ALL.len() as f64 + 16.0;
    let mut body = String::new();
    for (n, side) in Side::ALL.into_iter().enumerate() {
        let stale = report.stale_changes(side);
        let at = TOP + 44.0 * n as f64;
        let full = WIDTH - LEFT - RIGHT;
        let wide = full * stale as f64 / made as f64;
        add!(
            body,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 18.0,
            side.name()
        );
        add!(body, "<rect class=\"grid\" x=\"{LEFT}\" y=\"{at:.1}\" width=\"{full}\" height=\"26\"/>");
        add!(
            body,
            "<rect x=\"{LEFT}\" y=\"{at:.1}\" width=\"{wide:.1}\" height=\"26\" fill=\"{}\"/>",
            COLOURS[n]
        );
        add!(body, "<text x=\"{:.1}\" y=\"{:.1}\">{stale} of {made}</text>", WIDTH - RIGHT + 10.0, at + 18.0);
    }
    document(height, "Ways to change memory that leave the cache stale", &body)
}
