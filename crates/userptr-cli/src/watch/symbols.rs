// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names for places in code: the function of a program's or library's symbol table, where it has one.

use super::tally::Site;
use object::{Object, ObjectSegment, ObjectSymbol};
use rustc_demangle::demangle;
use std::collections::HashMap;
use std::fs;

/// The symbol tables that were read so far.
#[derive(Default)]
pub(super) struct Symbols {
    files: HashMap<String, Option<Table>>,
}

struct Table {
    /// File offset, length and address of each segment.
    segments: Vec<(u64, u64, u64)>,
    /// Address, length (0: not said) and name, as it stands there, of each function: large libraries have a million, and
    /// few are asked for.
    functions: Vec<(u64, u64, String)>,
}

impl Symbols {
    /// `function+0x12 (file)`, or the file and an offset in it.
    pub(super) fn name(&mut self, site: &Site) -> String {
        let table = self.files.entry(site.file.clone()).or_insert_with(|| Table::read(&site.file));
        let short = site.file.rsplit('/').next().unwrap_or(&site.file);
        match table.as_ref().and_then(|table| table.at(site.offset)) {
            Some((name, 0)) => format!("{:#} ({short})", demangle(name)),
            Some((name, more)) => format!("{:#}+{more:#x} ({short})", demangle(name)),
            None => format!("{short}+{:#x}", site.offset),
        }
    }
}

impl Table {
    fn read(path: &str) -> Option<Table> {
        // What is in brackets is no file, and a device must not be read.
        if !path.starts_with('/') || !fs::metadata(path).is_ok_and(|m| m.is_file()) {
            return None;
        }
        let data = fs::read(path).ok()?;
        let file = object::File::parse(&*data).ok()?;
        let segments = file.segments().map(|s| (s.file_range().0, s.file_range().1, s.address())).collect();
        let functions = |symbols: &mut dyn Iterator<Item = object::Symbol<'_, '_>>| {
            let code = symbols.filter(|s| s.is_definition() && s.kind() == object::SymbolKind::Text);
            let named = code.filter_map(|s| Some((s.address(), s.size(), s.name().ok()?.to_owned())));
            let mut functions: Vec<_> = named.collect();
            functions.sort_unstable_by_key(|(address, len, _)| (*address, *len));
            functions
        };
        let mut names = functions(&mut file.symbols());
        if names.is_empty() {
            names = functions(&mut file.dynamic_symbols());
        }
        Some(Table { segments, functions: names })
    }

    fn at(&self, offset: u64) -> Option<(&str, u64)> {
        let (from, _, address) =
            self.segments.iter().find(|(from, len, _)| (*from..from + len).contains(&offset))?;
        let address = offset - from + address;
        let next = self.functions.partition_point(|(at, ..)| *at <= address);
        let (at, len, name) = self.functions.get(next.checked_sub(1)?)?;
        // Stripped files keep the names of what they export: what lies between these is somebody else's.
        (address - at < (*len).max(1)).then_some((name.as_str(), address - at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_program_has_symbols() {
        let exe = std::env::current_exe().unwrap().display().to_string();
        let table = Table::read(&exe).expect("an ELF file");
        // Not this test, which may be inlined.
        let (address, ..) =
            table.functions.iter().find(|(.., n)| n == "main").expect("the C runtime calls it");
        let (from, _, base) =
            table.segments.iter().find(|(_, len, a)| (*a..a + len).contains(address)).unwrap();
        let site = Site { file: exe, offset: address - base + from };
        assert!(Symbols::default().name(&site).starts_with("main ("));
    }

    #[test]
    fn what_is_no_file_has_an_offset() {
        let name = |file: &str| Symbols::default().name(&Site { file: file.to_owned(), offset: 0x10 });
        assert_eq!(name("[vdso]"), "[vdso]+0x10");
        assert_eq!(name("/dev/null"), "null+0x10");
        assert_eq!(name("/nonexistent/x"), "x+0x10");
    }
}
