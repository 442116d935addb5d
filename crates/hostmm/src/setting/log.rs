// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a process has changed of the machine, one line a change, for its parent to read when it is dead.
//!
//! A line is `kind TAB name TAB old`. The kind [`SETTING`] or [`ZRAM`] opens a change, [`CLOSED`] closes the last one
//! of that name. Lines are written with one write(2) in append mode, so those of several threads do not mix.

use std::env;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

/// Path, in a child's environment, of the log that its parent reads. Without it nobody does.
pub(crate) const LOG: &str = "USERPTR_RESTORE";

/// A file is about to be written; `old` is what it held.
pub(super) const SETTING: &str = "setting";
/// A zram device of this number was added.
pub(super) const ZRAM: &str = "zram";
const CLOSED: &str = "closed";

fn say(kind: &str, name: &str, old: &str) -> io::Result<()> {
    if [name, old].iter().any(|text| text.contains(['\t', '\n', char::REPLACEMENT_CHARACTER])) {
        let why = format!("{name:?} or its value {old:?} does not fit in a line of text");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let Some(log) = env::var_os(LOG) else { return Ok(()) };
    let line = format!("{kind}\t{name}\t{old}\n");
    OpenOptions::new().append(true).open(log)?.write_all(line.as_bytes())
}

/// Something is about to change.
///
/// # Errors
/// If the parent cannot be told: then do not change it.
pub(super) fn opened(kind: &str, name: &str, old: &str) -> io::Result<()> {
    say(kind, name, old)
}

/// It is back.
pub(super) fn closed(name: &str) {
    if let Err(e) = say(CLOSED, name, "") {
        // The parent will put it back a second time, which changes nothing.
        tracing::warn!("the parent was not told that {name} is back: {e}");
    }
}

/// Put back what a dead child left changed, the last change first. Tries all, and returns the first error.
///
/// # Errors
/// If something could not be put back; the message names it.
pub(crate) fn restore(log: &mut File) -> io::Result<()> {
    let mut text = String::new();
    log.rewind()?;
    log.read_to_string(&mut text)?;
    still_open(&text).into_iter().rev().map(|change| undo(&change)).fold(Ok(()), Result::and)
}

#[derive(Debug, PartialEq, Eq)]
struct Change<'t> {
    kind: &'t str,
    name: &'t str,
    old: &'t str,
}

fn still_open(text: &str) -> Vec<Change<'_>> {
    let mut open: Vec<Change<'_>> = Vec::new();
    for line in text.lines() {
        let mut words = line.splitn(3, '\t');
        // A line cut short by the death of its writer opens nothing: the change comes after the line.
        let (Some(kind), Some(name), Some(old)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        if kind == CLOSED {
            if let Some(at) = open.iter().rposition(|change| change.name == name) {
                open.remove(at);
            }
        } else {
            open.push(Change { kind, name, old });
        }
    }
    open
}

fn undo(change: &Change<'_>) -> io::Result<()> {
    let Change { kind, name, old } = *change;
    let undone = match (kind, name.parse()) {
        (ZRAM, Ok(number)) => super::swap::remove(number),
        (SETTING, _) => File::open(name).and_then(|lock| {
            flock(&lock, FlockOperation::LockExclusive)?;
            super::write(Path::new(name), old)
        }),
        _ => Err(io::Error::other("a line of another version of this program")),
    };
    undone.map_err(|e| io::Error::new(e.kind(), format!("{kind} {name}, which was {old:?}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_opened_and_not_closed_is_open() {
        let text = "setting\t/a\t1\nsetting\t/b\t2\nzram\t3\t\nclosed\t/a\t\nsetting\t/a\t5\nsetting\t/c";
        let open: Vec<_> = still_open(text).iter().map(|c| (c.kind, c.name, c.old)).collect();
        assert_eq!(open, [(SETTING, "/b", "2"), (ZRAM, "3", ""), (SETTING, "/a", "5")]);
    }

    #[test]
    fn what_does_not_fit_in_a_line_is_refused() {
        assert!(say(SETTING, "/a", "two\nlines").is_err() && say(SETTING, "/a\tb", "1").is_err());
    }
}
