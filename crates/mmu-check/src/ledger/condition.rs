// SPDX-License-Identifier: MIT OR Apache-2.0
//! Under which condition is it true? Derived from the cells in which it holds and those in which it does not.
//!
//! A small decision tree: the attribute that leaves the fewest cells undecided comes first; values that come out alike
//! are told together.

use crate::scenario::Cell;
use drivers::{Callback, Callbacks};
use mmu_notifier::Access;

/// What cells differ in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attribute {
    Profile,
    Access,
    Path,
    Driver,
    Callbacks,
}

impl Attribute {
    const ALL: [Attribute; 5] =
        [Attribute::Profile, Attribute::Access, Attribute::Path, Attribute::Driver, Attribute::Callbacks];

    const fn name(self) -> &'static str {
        match self {
            Attribute::Profile => "kernel",
            Attribute::Access => "bound for",
            Attribute::Path => "path",
            Attribute::Driver => "driver",
            Attribute::Callbacks => "switched off",
        }
    }

    fn of(self, cell: &Cell) -> String {
        match self {
            Attribute::Profile => cell.profile.name.into(),
            Attribute::Access => if cell.access == Access::Write { "writing" } else { "reading" }.into(),
            Attribute::Path => cell.path.name.into(),
            Attribute::Driver => cell.kind.name.into(),
            Attribute::Callbacks => off(cell),
        }
    }
}

/// The callbacks of the driver of `cell` that are switched off there.
pub(crate) fn off(cell: &Cell) -> String {
    let off: Vec<Callback> =
        cell.kind.callbacks.iter().filter(|callback| !cell.callbacks.contains(*callback)).collect();
    if off.is_empty() { "nothing".into() } else { Callbacks::of(&off).to_string() }
}

type Judged = (Cell, bool);

fn groups(cells: &[Judged], by: Attribute) -> Vec<(String, Vec<Judged>)> {
    let mut groups: Vec<(String, Vec<Judged>)> = Vec::new();
    for cell in cells {
        let value = by.of(&cell.0);
        match groups.iter_mut().find(|(other, _)| *other == value) {
            Some((_, members)) => members.push(*cell),
            None => groups.push((value, vec![*cell])),
        }
    }
    groups
}

/// `None` if some hold and some do not.
fn same(cells: &[Judged]) -> Option<bool> {
    let first = cells.first()?.1;
    cells.iter().all(|(_, holds)| *holds == first).then_some(first)
}

/// The condition, a line each, indented by two for each step down. Empty if all cells agree.
pub fn condition(cells: &[Judged]) -> Vec<String> {
    if same(cells).is_some() {
        return Vec::new();
    }
    let undecided = |by: Attribute| {
        groups(cells, by).iter().filter(|(_, g)| same(g).is_none()).map(|(_, g)| g.len()).sum::<usize>()
    };
    let splits = |by: &Attribute| groups(cells, *by).len() > 1;
    let Some(by) = Attribute::ALL.into_iter().filter(splits).min_by_key(|by| undecided(*by)) else {
        return cells.iter().map(|(cell, holds)| format!("{}: {cell}", word(Some(*holds)))).collect();
    };
    // Values that come to the same are one line.
    let mut lines: Vec<(Option<bool>, Vec<String>, Vec<String>)> = Vec::new();
    for (value, members) in groups(cells, by) {
        let (verdict, below) = (same(&members), condition(&members));
        match lines.iter_mut().find(|(v, _, b)| *v == verdict && *b == below) {
            Some((_, values, _)) => values.push(value),
            None => lines.push((verdict, vec![value], below)),
        }
    }
    lines.sort_by_key(|(verdict, ..)| match verdict {
        Some(true) => 0,
        Some(false) => 1,
        None => 2,
    });
    let mut text = Vec::new();
    for (verdict, values, below) in lines {
        text.push(format!("{}: {} {}", word(verdict), by.name(), values.join(", ")));
        text.extend(below.iter().map(|line| format!("  {line}")));
    }
    text
}

const fn word(verdict: Option<bool>) -> &'static str {
    match verdict {
        Some(true) => "true",
        Some(false) => "false",
        None => "depends",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Row;
    use crate::path::named;
    use softmm::KernelProfile;

    fn cells(holds: fn(&Cell) -> bool) -> Vec<Judged> {
        let mut cells = Vec::new();
        for access in [Access::Write, Access::Read] {
            for path in ["cow", "fork", "dontneed"].into_iter().filter_map(named) {
                for profile in [KernelProfile::V3_16, KernelProfile::V6_18] {
                    cells.push(Row { kind: &drivers::vfio::KIND, access }.cell(path, profile));
                }
            }
        }
        cells.into_iter().map(|cell| (cell, holds(&cell))).collect()
    }

    #[test]
    fn one_attribute_that_decides_is_the_condition() {
        assert_eq!(
            condition(&cells(|c| c.access == Access::Write)),
            ["true: bound for writing", "false: bound for reading"]
        );
        assert_eq!(condition(&cells(|_| true)), [""; 0]);
    }

    #[test]
    fn what_one_attribute_leaves_open_the_next_decides() {
        let text = condition(&cells(|c| c.profile.name == "v6_18" || c.path.name == "cow"));
        assert_eq!(
            text,
            [
                "true: kernel v6_18",
                "depends: kernel v3_16",
                "  true: path cow",
                "  false: path fork, dontneed"
            ]
        );
    }
}
