// SPDX-License-Identifier: MIT OR Apache-2.0
//! Places as a person names them: the file without its folders, and the function.

use std::panic::Location;

/// The file's own name.
pub fn file_name(site: &Location<'static>) -> &'static str {
    site.file().rsplit('/').next().unwrap_or_default()
}

/// The line from the place on; `None` if it is not a driver's.
pub fn text(site: &Location<'static>) -> Option<&'static str> {
    let line = drivers::source(file_name(site))?.lines().nth(site.line() as usize - 1)?;
    line.get(site.column() as usize - 1..)
}

/// The function around a place; `None` if it is not a driver's.
pub fn function(site: &Location<'static>) -> Option<&'static str> {
    let text = drivers::source(file_name(site))?;
    let before: Vec<&str> = text.lines().take(site.line() as usize).collect();
    before.into_iter().rev().find_map(|line| {
        let rest = line.trim_start();
        let rest = rest.strip_prefix("pub(crate) ").or_else(|| rest.strip_prefix("pub ")).unwrap_or(rest);
        let name = rest.strip_prefix("fn ")?;
        name.split(['(', '<']).next()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_no_drivers_has_no_function() {
        let here = Location::caller();
        assert_eq!(file_name(here), "source.rs");
        assert_eq!((function(here), text(here)), (None, None));
    }
}
