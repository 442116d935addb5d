// SPDX-License-Identifier: MIT OR Apache-2.0
//! The report as one HTML file that needs nothing else: no network, no second file.
//!
//! The map has time from left to right and the address space from top to bottom, a band for each mapping in which
//! something changed, with the bands' heights by the logarithm of their sizes. Points are put into cells here, so the file
//! stays small whatever was recorded.

use super::report::Report;
use super::tally::Tally;
use mmu_notifier::PAGE_SIZE;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};

/// Columns of the map.
const COLUMNS: u64 = 720;
/// Bands at most; the busiest are kept.
const BANDS: usize = 60;

#[derive(Serialize)]
struct Data<'a> {
    report: &'a Report,
    causes: &'a [String],
    bands: Vec<BandData>,
    /// Column, row, count, cause.
    cells: Vec<(u64, usize, u64, u32)>,
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
    let mut rows = 0;
    let mut shown = Vec::new();
    let mut place = HashMap::new();
    for at in busy {
        let band = &bands[at];
        let pages = (band.end - band.start) / PAGE_SIZE;
        let height = (1 + pages.max(1).ilog2() as usize).min(24);
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
    let mut cells = BTreeMap::<(u64, usize), HashMap<u32, u64>>::new();
    for point in points {
        let Some(at) = band_of(point.mm, point.start, &bands) else { continue };
        let Some((row, height)) = place.get(&at) else { continue };
        let column = ((point.at - first) as u128 * u128::from(COLUMNS - 1) / u128::from(span)) as u64;
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
            let count = causes.values().sum::<u64>() * tally.timeline.weight;
            let most = causes.into_iter().max_by_key(|(cause, n)| (*n, std::cmp::Reverse(*cause)));
            (column, row, count, most.map_or(0, |(cause, _)| cause))
        })
        .collect();
    Data {
        report,
        causes: &tally.timeline.causes,
        bands: shown,
        cells,
        columns: COLUMNS,
        rows,
        seconds: span as f64 / 1e9,
        weight: tally.timeline.weight,
        hidden_bands,
    }
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
