// SPDX-License-Identifier: MIT OR Apache-2.0
//! The report as one HTML file that needs nothing else: no network, no second file.
//!
//! The map has time from left to right and the address space from top to bottom, a band for each mapping in which
//! something changed, with the bands' heights by the logarithm of their sizes. Points are put into cells here, so the file
//! stays below a few megabytes whatever was recorded. A cell has one colour; where causes mix, neighbouring cells show
//! them in proportion.

use super::report::Report;
use super::tally::Tally;
use mmu_notifier::PAGE_SIZE;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};

/// Columns of the map.
const COLUMNS: u64 = 720;
/// Bands at most; the busiest are kept.
const BANDS: usize = 60;
/// Rows of the map at most, but for the gaps between bands.
const ROWS: usize = 180;
/// A band must have room for its name.
const LOWEST: usize = 2;

#[derive(Serialize)]
struct Data<'a> {
    report: &'a Report,
    causes: &'a [String],
    bands: Vec<BandData>,
    /// Column, row, count, cause.
    cells: Vec<(u64, usize, u64, u32)>,
    /// Column, cause, count.
    rates: Vec<(u64, u32, u64)>,
    columns: u64,
    rows: usize,
    seconds: f64,
    /// Each point of the map stands for so many changes.
    weight: u64,
    hidden_bands: usize,
}

#[derive(Serialize)]
struct BandData {
    name: String,
    pid: i32,
    start: String,
    end: String,
    row: usize,
    rows: usize,
    count: u64,
}

/// A mapping, or what is left of it.
struct Band {
    mm: u32,
    start: u64,
    end: u64,
    name: String,
    count: u64,
}

/// The page.
pub(super) fn page(report: &Report, tally: &Tally) -> Vec<u8> {
    let data = data(report, tally);
    // `</script>` in a file name must not end the script.
    let json = serde_json::to_string(&data).unwrap_or_default().replace("</", "<\\/");
    include_str!("report.html").replace("/*DATA*/null", &json).into_bytes()
}

fn data<'a>(report: &'a Report, tally: &'a Tally) -> Data<'a> {
    let points = &tally.timeline.points;
    let mut bands = bands(tally);
    let mut index: HashMap<u32, BTreeMap<u64, usize>> = HashMap::new();
    for (at, band) in bands.iter().enumerate() {
        index.entry(band.mm).or_default().insert(band.start, at);
    }
    let band_of = |mm: u32, address: u64, bands: &[Band]| {
        let at = *index.get(&mm)?.range(..=address).next_back()?.1;
        (address < bands[at].end).then_some(at)
    };
    for point in points {
        if let Some(at) = band_of(point.mm, point.start, &bands) {
            bands[at].count += tally.timeline.weight;
        }
    }
    let mut busy: Vec<usize> = (0..bands.len()).filter(|at| bands[*at].count > 0).collect();
    busy.sort_by_key(|at| std::cmp::Reverse(bands[*at].count));
    let hidden_bands = busy.len().saturating_sub(BANDS);
    busy.truncate(BANDS);
    busy.sort_by_key(|at| (bands[*at].mm, bands[*at].start));
    let tall = |at: &usize| {
        let pages = (bands[*at].end - bands[*at].start) / PAGE_SIZE;
        (1 + pages.max(1).ilog2() as usize).min(24)
    };
    let total = busy.iter().map(tall).sum::<usize>().max(ROWS);
    let mut rows = 0;
    let mut shown = Vec::new();
    let mut place = HashMap::new();
    for at in busy {
        let band = &bands[at];
        let height = (tall(&at) * ROWS / total).max(LOWEST);
        place.insert(at, (rows, height));
        shown.push(BandData {
            name: band.name.clone(),
            pid: tally.mms.get(band.mm as usize).map_or(0, |mm| mm.tgid),
            start: format!("{:#x}", band.start),
            end: format!("{:#x}", band.end),
            row: rows,
            rows: height,
            count: band.count,
        });
        rows += height + 1;
    }
    let (first, last) = points.iter().fold((u64::MAX, 0), |(a, b), p| (a.min(p.at), b.max(p.at)));
    let span = last.saturating_sub(first).max(1);
    let column_of = |at: u64| ((at - first) as u128 * u128::from(COLUMNS - 1) / u128::from(span)) as u64;
    let mut rates = BTreeMap::<(u64, u32), u64>::new();
    let mut cells = BTreeMap::<(u64, usize), BTreeMap<u32, u64>>::new();
    for point in points {
        *rates.entry((column_of(point.at), point.cause)).or_default() += tally.timeline.weight;
        let Some(at) = band_of(point.mm, point.start, &bands) else { continue };
        let Some((row, height)) = place.get(&at) else { continue };
        let column = column_of(point.at);
        let (start, len) = (bands[at].start, bands[at].end - bands[at].start);
        let part = |address: u64| {
            let into = u128::from(address.saturating_sub(start)) * *height as u128 / u128::from(len);
            (into as usize).min(height - 1)
        };
        let end = point.start.saturating_add((point.pages.max(1) - 1).saturating_mul(PAGE_SIZE));
        for y in part(point.start)..=part(end) {
            *cells.entry((column, row + y)).or_default().entry(point.cause).or_default() += 1;
        }
    }
    let cells = cells
        .into_iter()
        .map(|((column, row), causes)| {
            let points = causes.values().sum::<u64>();
            (column, row, points * tally.timeline.weight, shown_of(&causes, points, column, row))
        })
        .collect();
    let rates = rates.into_iter().map(|((column, cause), count)| (column, cause, count)).collect();
    Data {
        report,
        causes: &tally.timeline.causes,
        bands: shown,
        cells,
        rates,
        columns: COLUMNS,
        rows,
        seconds: span as f64 / 1e9,
        weight: tally.timeline.weight,
        hidden_bands,
    }
}

/// The cause whose colour a cell has: of two that share cells evenly each has every other one.
fn shown_of(causes: &BTreeMap<u32, u64>, points: u64, column: u64, row: usize) -> u32 {
    let mut turn = (column * 7 + row as u64 * 13) % 16 * points / 16;
    for (cause, n) in causes {
        match turn.checked_sub(*n) {
            Some(left) => turn = left,
            None => return *cause,
        }
    }
    0
}

/// Every mapping that was seen; neighbours of one name are one band.
fn bands(tally: &Tally) -> Vec<Band> {
    let mut bands = Vec::<Band>::new();
    for (mm, of) in tally.mms.iter().enumerate() {
        for (start, region) in of.regions.all() {
            let mm = mm as u32;
            match bands.last_mut() {
                Some(last) if last.mm == mm && last.end >= start && last.name == region.name => {
                    last.end = last.end.max(region.end);
                }
                // A later mapping over the end of a former one.
                Some(last) if last.mm == mm && last.end > start => {
                    last.end = start;
                    bands.push(Band { mm, start, end: region.end, name: region.name, count: 0 });
                }
                _ => bands.push(Band { mm, start, end: region.end, name: region.name, count: 0 }),
            }
        }
    }
    bands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_that_share_cells_are_shown_in_proportion() {
        let causes = BTreeMap::from([(3, 30), (5, 10)]);
        let cells = (0..160).flat_map(|column| (0..160).map(move |row| (column, row)));
        let of_three = cells.filter(|(column, row)| shown_of(&causes, 40, *column, *row) == 3).count();
        assert_eq!(of_three, 160 * 160 * 3 / 4);
    }
}
