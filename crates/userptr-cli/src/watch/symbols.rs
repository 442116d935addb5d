// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names for places in code: the function of a program's or library's symbol table, where it has one.
//!
//! A large library has a million symbols, of which a report names a few. So all places are known before a table is
//! read; it is gone through once, unsorted, and only the names that are wanted are looked at. What is not needed of a
//! file is not read either.

use super::elf::{self, Data, Elf, Segments};
use super::tally::Site;
use object::{Object, ObjectSymbol, SymbolKind};
use rustc_demangle::demangle;
use std::collections::HashMap;

/// The names of some places.
#[derive(Default)]
pub(super) struct Symbols {
    /// File and offset in it, to function and bytes after its start.
    names: HashMap<Site, (String, u64)>,
}

impl Symbols {
    /// Looks all of them up.
    pub(super) fn of<'a>(sites: impl Iterator<Item = &'a Site>) -> Symbols {
        let mut files = HashMap::<&str, Vec<u64>>::new();
        for site in sites {
            files.entry(&site.file).or_default().push(site.offset);
        }
        let mut names = HashMap::new();
        for (file, mut offsets) in files {
            offsets.sort_unstable();
            offsets.dedup();
            for (offset, name, more) in look_up(file, &offsets).unwrap_or_default() {
                names.insert(Site { file: file.to_owned(), offset }, (name, more));
            }
        }
        Symbols { names }
    }

    /// `function+0x12 (file)`, or the file and an offset in it.
    pub(super) fn name(&self, site: &Site) -> String {
        let short = site.file.rsplit('/').next().unwrap_or(&site.file);
        match self.names.get(site) {
            Some((name, 0)) => format!("{:#} ({short})", demangle(name)),
            Some((name, more)) => format!("{:#}+{more:#x} ({short})", demangle(name)),
            None => format!("{short}+{:#x}", site.offset),
        }
    }
}

/// Offset, function, and bytes after its start, of those of `offsets` that lie in a function with a name.
fn look_up(path: &str, offsets: &[u64]) -> Option<Vec<(u64, String, u64)>> {
    let data = Data::new(elf::open(path)?);
    let file = Elf::parse(&data).ok()?;
    let segments = Segments::of(&file);
    // Addresses as the symbols have them, and the offsets that they came from.
    let mut wanted: Vec<(u64, u64)> =
        offsets.iter().filter_map(|offset| Some((segments.address(*offset)?, *offset))).collect();
    wanted.sort_unstable();
    let mut found = find(file.symbols(), &wanted);
    // A stripped library keeps the names of what it exports.
    if found.iter().all(Option::is_none) {
        found = find(file.dynamic_symbols(), &wanted);
    }
    let named = wanted.iter().zip(found).filter_map(|((address, offset), symbol)| {
        let symbol = symbol?;
        Some((*offset, symbol.name().ok()?.to_owned(), address - symbol.address()))
    });
    Some(named.collect())
}

/// The function around each of the `wanted` addresses, which are in order: the one that begins last, if there are several.
fn find<'data, S: ObjectSymbol<'data> + Copy>(
    symbols: impl Iterator<Item = S>,
    wanted: &[(u64, u64)],
) -> Vec<Option<S>> {
    let mut found: Vec<Option<S>> = wanted.iter().map(|_| None).collect();
    for symbol in symbols.filter(|s| s.is_definition() && s.kind() == SymbolKind::Text) {
        let (start, len) = (symbol.address(), symbol.size().max(1));
        let at = wanted.partition_point(|(address, _)| *address < start);
        let inside = wanted[at..].iter().take_while(|(address, _)| address - start < len).count();
        for best in &mut found[at..at + inside] {
            if best.as_ref().is_none_or(|b| (b.address(), b.size()) < (start, symbol.size())) {
                *best = Some(symbol);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::ObjectSegment;

    #[test]
    fn our_own_program_has_symbols() {
        let exe = std::env::current_exe().unwrap().display().to_string();
        let data = Data::new(elf::open(&exe).unwrap());
        let file = Elf::parse(&data).unwrap();
        // Not this test, which may be inlined.
        let main = file.symbols().find(|s| s.name() == Ok("main")).expect("the C runtime calls it").address();
        let segment =
            file.segments().find(|s| (s.address()..s.address() + s.size()).contains(&main)).unwrap();
        let site = |more| Site {
            file: exe.clone(),
            offset: main - segment.address() + segment.file_range().0 + more,
        };
        let symbols = Symbols::of([site(0), site(1)].iter());
        let short = exe.rsplit('/').next().unwrap();
        assert_eq!(symbols.name(&site(0)), format!("main ({short})"));
        assert_eq!(symbols.name(&site(1)), format!("main+0x1 ({short})"));
    }

    #[test]
    fn what_is_no_file_has_an_offset() {
        let name = |file: &str| {
            let site = Site { file: file.to_owned(), offset: 0x10 };
            Symbols::of([&site].into_iter()).name(&site)
        };
        assert_eq!(name("[vdso]"), "[vdso]+0x10");
        assert_eq!(name("/dev/null"), "null+0x10");
        assert_eq!(name("/nonexistent/x"), "x+0x10");
    }
}
