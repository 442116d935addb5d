// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr live`: change this program's memory in every way Linux has, and print who went stale and who was told.
//!
//! Every row runs in processes of its own ([`row`]), one for each source and device, so that one that crashes or
//! hangs costs itself alone. Rows run one after the other: KSM, compaction and swap are the machine's.

pub(crate) mod race;
mod report;
pub(crate) mod row;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hostmm::capability::{self, Capability};
use hostmm::disturb::{Arena, Event, Outcome, catalogue};
use hostmm::kvm::KvmSource;
use hostmm::primary::Source;
use hostmm::uffd::UffdSource;
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::{LiveArgs, RowArgs, Sources};
use crate::{Error, Saved, child, print_json};
use report::{Answer, CannotHear, Column, Declared, Report, Row};

/// The slowest rows wait for a kernel thread, several times; a busy one says so long before.
const DEADLINE: Duration = Duration::from_secs(120);

/// Where rows put files; a disk file system lets the writeback rows run.
fn scratch() -> PathBuf {
    std::env::temp_dir()
}

/// What one child prints.
pub(crate) fn answer_row(args: &RowArgs) -> Result<ExitCode, Error> {
    print_json(&row::run(&args.event, &args.source, &args.device)?)?;
    Ok(ExitCode::SUCCESS)
}

/// The whole table.
pub(crate) fn run(args: &LiveArgs) -> Result<ExitCode, Error> {
    let start = Instant::now();
    let events: Vec<_> = catalogue()
        .into_iter()
        .filter(|event| args.only.as_ref().is_none_or(|text| event.name.contains(text)))
        .collect();
    if events.is_empty() {
        return Err(Error::NoEvent(args.only.clone().unwrap_or_default()));
    }
    if args.list {
        return list(&events, args.json);
    }
    for needed in [Capability::IoUring, Capability::Pfn] {
        let state = capability::probe(needed);
        if !state.is_usable() {
            return Err(Error::Machine(format!("{needed}: {}", state.detail())));
        }
    }
    let saved = Saved::create(args.save.as_ref())?;
    let sources = Listener::chosen(args.source)?;
    let progress = progress(events.len());
    let rows: Vec<Row> = events
        .iter()
        .map(|event| {
            progress.set_message(event.name);
            let row = make(event, &sources);
            progress.inc(1);
            row
        })
        .collect();
    progress.finish_and_clear();
    let report = Report {
        kernel: kernel(),
        userptr: env!("CARGO_PKG_VERSION"),
        holds: rows.iter().all(|row| row.problems.is_empty()),
        cannot_hear: cannot_hear(),
        rows,
        seconds: start.elapsed().as_secs_f64(),
    };
    saved.write(&report)?;
    if args.json {
        print_json(&report)?;
    } else {
        table::print(&report);
    }
    Ok(ExitCode::from(u8::from(!report.holds)))
}

/// The two live sources, by name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Listener {
    Uffd,
    Kvm,
}

impl Listener {
    const fn name(self) -> &'static str {
        match self {
            Listener::Uffd => "uffd",
            Listener::Kvm => "kvm",
        }
    }

    const fn must_hear(self, event: &Event) -> bool {
        match self {
            Listener::Uffd => event.expect.uffd_delivers,
            Listener::Kvm => event.expect.kvm_delivers,
        }
    }

    /// Those that were asked for, each of which opens here.
    fn chosen(sources: Sources) -> Result<Vec<Listener>, Error> {
        let (chosen, other) = match sources {
            Sources::Both => (vec![Listener::Uffd, Listener::Kvm], "; `--source` runs with the other alone"),
            Sources::Uffd => (vec![Listener::Uffd], ""),
            Sources::Kvm => (vec![Listener::Kvm], ""),
        };
        for source in &chosen {
            source
                .opens()
                .map_err(|why| Error::Machine(format!("no {} source: {why}{other}", source.name())))?;
        }
        Ok(chosen)
    }

    fn opens(self) -> Result<(), String> {
        match self {
            Listener::Uffd => UffdSource::open(&Default::default()).map(drop).map_err(|e| e.to_string()),
            Listener::Kvm => KvmSource::open(&Default::default()).map(drop).map_err(|e| e.to_string()),
        }
    }
}

fn declare(event: &Event) -> Row {
    let of = |outcome| match outcome {
        Outcome::Stale => Declared::Stale,
        Outcome::WriteStale => Declared::WriteStale,
        Outcome::Coherent => Declared::Coherent,
        Outcome::Prevented => Declared::Prevented,
        Outcome::NotMappable => Declared::NotMappable,
    };
    Row {
        event: event.name.into(),
        kernel_path: event.kernel_path.into(),
        via: event.via.to_string(),
        why: event.expect.why.into(),
        declared_pinned: of(event.expect.pinned),
        declared_unpinned: of(event.expect.unpinned),
        no_notifier: None,
        uffd: None,
        kvm: None,
        skipped: None,
        problems: Vec::new(),
    }
}

fn make(event: &Event, sources: &[Listener]) -> Row {
    let mut row = declare(event);
    let arena = Arena::new(scratch());
    row.skipped = event.needs.iter().find_map(|need| need.missing(&arena));
    if row.skipped.is_some() {
        return row;
    }
    let ask =
        |source: &str, device: &str| match child::ask(&["live-row", event.name, source, device], DEADLINE) {
            Ok(part) => Answer::Ran(part),
            Err(e) => Answer::Failed(e.to_string()),
        };
    let column = |source: &str, must_hear| Column {
        must_hear,
        pinned: ask(source, "pinned"),
        unpinned: ask(source, "unpinned"),
    };
    row.no_notifier = Some(column("none", false));
    let heard_by =
        |source: Listener| sources.contains(&source).then(|| column(source.name(), source.must_hear(event)));
    (row.uffd, row.kvm) = (heard_by(Listener::Uffd), heard_by(Listener::Kvm));
    row.judge();
    row
}

fn cannot_hear() -> Vec<CannotHear> {
    let list = |source, unheard: &[mmu_notifier::Unheard]| {
        unheard
            .iter()
            .map(|u| CannotHear { source, what: u.change.into(), why: u.why.into() })
            .collect::<Vec<_>>()
    };
    let mut all = list("uffd", UffdSource::CANNOT_HEAR);
    all.extend(list("kvm", KvmSource::CANNOT_HEAR));
    all
}

fn list(events: &[&'static Event], json: bool) -> Result<ExitCode, Error> {
    let rows: Vec<_> = events.iter().map(|event| declare(event)).collect();
    if json {
        print_json(&rows)?;
    } else {
        let hears: Vec<_> =
            events.iter().map(|e| (Listener::Uffd.must_hear(e), Listener::Kvm.must_hear(e))).collect();
        table::print_list(&rows, &hears);
    }
    Ok(ExitCode::SUCCESS)
}

fn progress(rows: usize) -> ProgressBar {
    // Draws on standard error, and not at all if that is no terminal.
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(rows as u64).with_style(style)
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
