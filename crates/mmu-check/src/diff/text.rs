// SPDX-License-Identifier: MIT OR Apache-2.0
//! A script as text: what `userptr diff` prints of a difference, and reads with `--script`. One operation a line; empty
//! lines and what follows a `#` are ignored.

use super::script::{Op, PAGES, Span, Who};
use hostmm::lab::{Backing, Rights};
use std::fmt;
use std::str::FromStr;

/// A line that is no operation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {text:?} is no operation: {why}")]
pub struct ScriptError {
    /// Its number, from 1 on.
    pub line: usize,
    /// The line.
    pub text: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// The operations that `text` lists.
///
/// # Errors
/// [`ScriptError`].
pub fn parse(text: &str) -> Result<Vec<Op>, ScriptError> {
    let mut script = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        let bare = text.split('#').next().unwrap_or_default().trim();
        if !bare.is_empty() {
            script.push(bare.parse().map_err(|why| ScriptError { line, text: bare.to_owned(), why })?);
        }
    }
    Ok(script)
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{},{})", self.first, self.first + self.pages)
    }
}

fn rights(rights: Rights) -> &'static str {
    match rights {
        Rights::None => "PROT_NONE",
        Rights::Read => "PROT_READ",
        Rights::ReadWrite => "PROT_READ|PROT_WRITE",
    }
}

fn who(who: Who) -> &'static str {
    match who {
        Who::Parent => "",
        Who::Child => "child: ",
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Op::Map(by, span, prot, backing) => {
                write!(f, "{}mmap {span} {} MAP_FIXED|", who(by), rights(prot))?;
                match backing {
                    Backing::Anonymous => write!(f, "MAP_PRIVATE|MAP_ANONYMOUS"),
                    Backing::PrivateFile(at) => write!(f, "MAP_PRIVATE file@{at}"),
                    Backing::SharedFile(at) => write!(f, "MAP_SHARED file@{at}"),
                }
            }
            Op::Unmap(by, span) => write!(f, "{}munmap {span}", who(by)),
            Op::Protect(by, span, prot) => write!(f, "{}mprotect {span} {}", who(by), rights(prot)),
            Op::DontNeed(by, span) => write!(f, "{}madvise {span} MADV_DONTNEED", who(by)),
            Op::Free(by, span) => write!(f, "{}madvise {span} MADV_FREE", who(by)),
            Op::Move(by, from, to) => write!(f, "{}mremap {from} to {to}", who(by)),
            Op::Load(by, page) => write!(f, "{}load {page}", who(by)),
            Op::Store(by, page, value) => write!(f, "{}store {page} = {value}", who(by)),
            Op::Fork => write!(f, "fork"),
            Op::Exit => write!(f, "child: exit"),
            Op::Truncate(pages) => write!(f, "ftruncate {pages} pages"),
            Op::Punch(first, last) => write!(f, "punch file [{first},{})", last.saturating_add(1)),
            Op::WriteFile(page, value) => write!(f, "pwrite file {page} = {value}"),
            Op::Sync => write!(f, "fsync"),
            Op::Disk => write!(f, "disk"),
            Op::PageOut(by, page) => write!(f, "{}pageout {page}", who(by)),
            Op::ReadPinned(by, page) => write!(f, "{}process_vm_readv {page}", who(by)),
            Op::WritePinned(by, page, value) => write!(f, "{}process_vm_writev {page} = {value}", who(by)),
            Op::Pin(span) => write!(f, "pin {span}"),
            Op::Unpin => write!(f, "unpin"),
            Op::Merge(first, second) => write!(f, "merge {first} {second}"),
            Op::Unmerge(span) => write!(f, "madvise {span} MADV_UNMERGEABLE"),
            Op::Probe(page) => write!(f, "uprobe file {page}"),
            Op::Unprobe => write!(f, "uprobe remove"),
        }
    }
}

fn number(text: &str) -> Result<u64, &'static str> {
    text.parse().map_err(|_| "a number is expected")
}

fn page(text: &str) -> Result<u64, &'static str> {
    number(text).and_then(|page| if page < PAGES { Ok(page) } else { Err("the arena has pages 0 to 31") })
}

/// `[first,end)`.
fn bounds(text: &str) -> Result<(u64, u64), &'static str> {
    let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(')'));
    let (first, end) = inner.and_then(|inner| inner.split_once(',')).ok_or("[FIRST,END) is expected")?;
    match (number(first)?, number(end)?) {
        (first, end) if first < end => Ok((first, end)),
        _ => Err("the end must lie behind the first page"),
    }
}

fn span(text: &str) -> Result<Span, &'static str> {
    let (first, end) = bounds(text)?;
    if end > PAGES { Err("the arena has pages 0 to 31") } else { Ok(Span { first, pages: end - first }) }
}

fn prot(text: &str) -> Result<Rights, &'static str> {
    [Rights::None, Rights::Read, Rights::ReadWrite]
        .into_iter()
        .find(|&known| rights(known) == text)
        .ok_or("the protection must be PROT_NONE, PROT_READ or PROT_READ|PROT_WRITE")
}

/// `flags` and, if there is one, `file@PAGE`.
fn backing(flags: &str, file: Option<&&str>) -> Result<Backing, &'static str> {
    let at = file.map(|text| text.strip_prefix("file@").ok_or("file@PAGE is expected").and_then(number));
    match (flags, at.transpose()?) {
        ("MAP_FIXED|MAP_PRIVATE|MAP_ANONYMOUS", None) => Ok(Backing::Anonymous),
        ("MAP_FIXED|MAP_PRIVATE", Some(at)) => Ok(Backing::PrivateFile(at)),
        ("MAP_FIXED|MAP_SHARED", Some(at)) => Ok(Backing::SharedFile(at)),
        _ => Err("unknown flags of mmap"),
    }
}

impl FromStr for Op {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Op, &'static str> {
        let (by, text) = match text.strip_prefix("child: ") {
            Some(rest) => (Who::Child, rest),
            None => (Who::Parent, text),
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        let op = match words[..] {
            ["mmap", place, rights, flags, ref file @ ..] if file.len() < 2 => {
                Op::Map(by, span(place)?, prot(rights)?, backing(flags, file.first())?)
            }
            ["munmap", place] => Op::Unmap(by, span(place)?),
            ["mprotect", place, rights] => Op::Protect(by, span(place)?, prot(rights)?),
            ["madvise", place, "MADV_DONTNEED"] => Op::DontNeed(by, span(place)?),
            ["madvise", place, "MADV_FREE"] => Op::Free(by, span(place)?),
            ["mremap", from, "to", to] => Op::Move(by, page(from)?, page(to)?),
            ["load", at] => Op::Load(by, page(at)?),
            ["store", at, "=", value] => Op::Store(by, page(at)?, number(value)?),
            ["pageout", at] => Op::PageOut(by, page(at)?),
            ["process_vm_readv", at] => Op::ReadPinned(by, page(at)?),
            ["process_vm_writev", at, "=", value] => Op::WritePinned(by, page(at)?, number(value)?),
            ["exit"] if by == Who::Child => Op::Exit,
            _ if by == Who::Child => return Err("no such operation of a child"),
            ["fork"] => Op::Fork,
            ["ftruncate", pages, "pages"] => Op::Truncate(number(pages)?),
            ["punch", "file", place] => bounds(place).map(|(first, end)| Op::Punch(first, end - 1))?,
            ["pwrite", "file", at, "=", value] => Op::WriteFile(number(at)?, number(value)?),
            ["fsync"] => Op::Sync,
            ["disk"] => Op::Disk,
            ["pin", place] => Op::Pin(span(place)?),
            ["unpin"] => Op::Unpin,
            ["merge", first, second] => match (page(first)?, page(second)?) {
                (first, second) if first < second => Op::Merge(first, second),
                _ => return Err("the first page must lie below the second"),
            },
            ["madvise", place, "MADV_UNMERGEABLE"] => Op::Unmerge(span(place)?),
            ["uprobe", "file", at] => Op::Probe(number(at)?),
            ["uprobe", "remove"] => Op::Unprobe,
            _ => return Err("no such operation"),
        };
        Ok(op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::{paths, script};

    #[test]
    fn what_is_printed_is_read_back() {
        let by_hand = paths::all().into_iter().flat_map(|path| path.script);
        for op in by_hand.chain((0..20).flat_map(|seed| script::random(seed, 200, |_| true))) {
            assert_eq!(op.to_string().parse(), Ok(op), "{op}");
        }
    }

    #[test]
    fn a_bad_line_is_named() {
        assert_eq!(parse("fork # and\n\n child: exit\n"), Ok(vec![Op::Fork, Op::Exit]));
        for bad in [
            "forks",
            "load 32",
            "munmap [4,4)",
            "munmap [4,33)",
            "child: fork",
            "merge 5 4",
            "store 4 7",
            "mmap [0,1) PROT_READ MAP_SHARED",
        ] {
            let error = parse(&format!("fork\n{bad}")).unwrap_err();
            assert_eq!((error.line, error.text.as_str()), (2, bad));
        }
    }
}
