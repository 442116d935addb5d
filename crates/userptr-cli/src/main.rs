// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command `userptr`: argument parsing, tables, progress, reports. What it prints is found out below.
//!
//! Exit codes: 0 what was checked holds, 1 it does not hold, 2 it could not be checked.

mod answer;
mod args;
mod bench;
mod check;
mod child;
mod diff;
mod doctor;
mod live;
mod mutate;
mod watch;

use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;

use args::{Cli, Command, LiveArgs};

/// Why a command could not run.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("there is no capability {name}; there are {known}")]
    NoCapability { name: String, known: String },
    #[error("no event has {0:?} in its name: `userptr live --list` names them")]
    NoEvent(String),
    #[error("this machine cannot run it: {0}; `userptr doctor` says what is missing and how to get it")]
    Machine(String),
    #[error(
        "there is no cell {name:?}: give driver/access/path/profile as `userptr answer --json` names them; {what}"
    )]
    NoCell { name: String, what: String },
    #[error("there is no callback {name}; there are {known}")]
    NoCallback { name: String, known: String },
    #[error("bug {id} cannot be shown: {why}; there are {known}")]
    NoBug { id: String, why: &'static str, known: String },
    #[error("no driver to switch anything off in has {name:?} in its name; there are {known}")]
    NoSubject { name: String, known: String },
    #[error("the schedule cannot be read: {0:?} is not a replay string")]
    NoSchedule(String),
    #[error(transparent)]
    Trace(#[from] answer::trace::TraceError),
    #[error(transparent)]
    Row(#[from] live::row::RowError),
    #[error(transparent)]
    Watch(#[from] watch::WatchError),
    #[error(transparent)]
    Diff(#[from] diff::DiffRunError),
    #[error(transparent)]
    Race(#[from] live::race::RaceRowError),
    #[error("{path}: {source}", path = path.display())]
    File { path: std::path::PathBuf, source: std::io::Error },
    #[error("the answer could not be written: {0}")]
    Output(#[from] std::io::Error),
    #[error("the answer could not be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// The file of `--save`, made before the work is done: a bad path must not cost the result.
struct Saved(Option<(std::path::PathBuf, std::fs::File)>);

impl Saved {
    fn create(path: Option<&std::path::PathBuf>) -> Result<Saved, Error> {
        let create = |path: &std::path::PathBuf| match std::fs::File::create(path) {
            Ok(file) => Ok((path.clone(), file)),
            Err(source) => Err(Error::File { path: path.clone(), source }),
        };
        path.map(create).transpose().map(Saved)
    }

    fn write(self, value: &impl Serialize) -> Result<(), Error> {
        if self.0.is_none() {
            return Ok(());
        }
        self.write_bytes(serde_json::to_string_pretty(value)?.as_bytes())
    }

    /// Writes `bytes` if there is a file.
    fn write_bytes(self, bytes: &[u8]) -> Result<(), Error> {
        use std::io::Write;
        let Some((path, mut file)) = self.0 else { return Ok(()) };
        file.write_all(bytes).map_err(|source| Error::File { path, source })
    }
}

fn print_json(value: &impl Serialize) -> Result<(), Error> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}

fn main() -> ExitCode {
    let done = match Cli::parse().command.unwrap_or(Command::Live(LiveArgs::default())) {
        Command::Answer(args) => answer::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::BenchChange(args) => bench::answer_change(&args.side, &args.event),
        Command::BenchSide(args) => bench::serve(&args.side),
        Command::Check(args) => check::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Live(args) if args.race => live::race::run(&args),
        Command::Live(args) => live::run(&args),
        Command::Mutate(args) => mutate::run(&args),
        Command::LiveRow(args) => live::answer_row(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Watch(args) => watch::run(&args),
        Command::DiffBatch(args) => diff::answer(&args),
        Command::AnswerTrace(args) => answer::trace::run(&args),
        Command::LiveRace(args) => live::race::answer(&args),
    };
    done.unwrap_or_else(|e| {
        eprintln!("userptr: {e}");
        ExitCode::from(2)
    })
}
