// SPDX-License-Identifier: MIT OR Apache-2.0
//! Places as a person names them: the file within its crate, and the function.

use std::panic::Location;

/// What is checked: drivers, and of the library what has a row of its own ([`crate::driver`]).
const CHECKED: [&str; 3] = ["crates/drivers/src/", "crates/userptr/src/cache/", "crates/userptr/src/object/"];

macro_rules! sources {
    ($($file:literal),* $(,)?) => {
        &[$(($file, include_str!(concat!("../../../userptr/src/", $file)))),*]
    };
}

/// The library's.
static LIBRARY: &[(&str, &str)] = sources![
    "cache/core.rs",
    "cache/hit.rs",
    "cache/mod.rs",
    "cache/reap.rs",
    "cache/register.rs",
    "object/core.rs",
    "object/invalidate.rs",
    "object/iommu.rs",
    "object/job.rs",
    "object/space.rs",
    "object/submit.rs",
];

/// Is it in something that is checked?
pub fn is_checked(site: &Location<'static>) -> bool {
    CHECKED.iter().any(|folder| site.file().contains(folder))
}

/// The file's name within its crate.
pub fn file_name(site: &Location<'static>) -> &'static str {
    site.file().rsplit_once("/src/").map_or(site.file(), |(_, name)| name)
}

fn source(site: &Location<'static>) -> Option<&'static str> {
    let name = file_name(site);
    let library = LIBRARY.iter().find(|(file, _)| *file == name).map(|(_, text)| *text);
    library.or_else(|| drivers::source(name)).filter(|_| is_checked(site))
}

/// The line from the place on; `None` if it is not of what is checked.
pub fn text(site: &Location<'static>) -> Option<&'static str> {
    let line = source(site)?.lines().nth(site.line() as usize - 1)?;
    line.get(site.column() as usize - 1..)
}

/// The function around a place; `None` if it is not of what is checked.
pub fn function(site: &Location<'static>) -> Option<&'static str> {
    let before: Vec<&str> = source(site)?.lines().take(site.line() as usize).collect();
    before.into_iter().rev().find_map(|line| {
        let rest = line.trim_start();
        let visible = ["pub(crate) ", "pub(super) ", "pub "];
        let rest = visible.iter().find_map(|visible| rest.strip_prefix(visible)).unwrap_or(rest);
        let name = rest.strip_prefix("fn ")?;
        name.split(['(', '<']).next()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_not_checked_has_no_function() {
        let here = Location::caller();
        assert_eq!(file_name(here), "mutate/source.rs");
        assert_eq!((function(here), text(here)), (None, None));
    }
}
