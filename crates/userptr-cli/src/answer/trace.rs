// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the notifier of the running kernel says of one event: the ranges, relative to the page that the event is about.

use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use hostmm::disturb::{Arena, Change, DisturbError};
use hostmm::kvm::{self, KvmSource, Notice};
use mmu_notifier::{PAGE_SIZE, Range};
use serde::{Deserialize, Serialize};

use crate::args::TraceArgs;
use crate::live::row::{RowError, find};
use crate::{Error, child, print_json};

/// Records come on a thread of the source; this long without one means that there are no more.
const QUIET: Duration = Duration::from_millis(50);
const DEADLINE: Duration = Duration::from_secs(30);

/// Why the kernel could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TraceError {
    #[error(transparent)]
    Event(#[from] RowError),
    #[error(transparent)]
    Disturb(#[from] DisturbError),
    #[error("the kvm source does not open: {0}")]
    Open(#[from] kvm::OpenError),
    #[error("the kvm source does not call back: {0}")]
    Subscribe(#[from] kvm::SubscribeError),
}

/// What was announced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trace {
    /// The kernel's function.
    pub(crate) kernel_path: String,
    /// First page relative to the event's, and how many; 0: to the end of the address space.
    pub(crate) ranges: Vec<(i64, u64)>,
    /// Records were lost.
    pub(crate) lost: bool,
}

impl Trace {
    /// As the ledger prints it.
    pub(crate) fn text(&self) -> String {
        let range = |&(first, pages): &(i64, u64)| match (first, pages) {
            (0, 1) => "S".to_owned(),
            (_, 0) => "S(all)".to_owned(),
            _ => format!("S({first:+} {pages})"),
        };
        let mut text: Vec<String> = self.ranges.iter().map(range).collect();
        if self.lost {
            text.push("(records were lost)".into());
        }
        if text.is_empty() { "nothing".into() } else { text.join(" ") }
    }
}

/// What a child process prints.
pub(crate) fn run(args: &TraceArgs) -> Result<ExitCode, Error> {
    print_json(&trace(&args.event)?)?;
    Ok(ExitCode::SUCCESS)
}

/// Asks a child process, which the event may do to what it likes.
pub(super) fn ask(event: &str) -> Result<Trace, child::ChildError> {
    child::ask(&["answer-trace", event], DEADLINE)
}

fn trace(name: &str) -> Result<Trace, TraceError> {
    let event = find(name)?;
    let source = KvmSource::open(&kvm::Options { ring: Some(1 << 20), ..kvm::Options::default() })?;
    let mut arena = Arena::new(std::env::temp_dir());
    let mut scene = event.setup(&mut arena)?;
    let (page, changed) = (scene.watched(), scene.changed());
    let (to, records) = channel();
    let subscription = source.subscribe(changed, move |notice| {
        // The receiver is gone only when this function is.
        let _ = to.send(*notice);
    })?;
    let happened = scene.disturb(&mut || {})? == Change::Happened;
    let mut trace = Trace { kernel_path: event.kernel_path.into(), ranges: Vec::new(), lost: false };
    loop {
        match records.recv_timeout(QUIET) {
            Ok(Notice::Range(record)) if happened => {
                let first = (record.start / PAGE_SIZE) as i64 - (page.start() / PAGE_SIZE) as i64;
                let all = record.end >= Range::ALL.end();
                let pages = (record.end.saturating_sub(record.start)).div_ceil(PAGE_SIZE);
                trace.ranges.push((first, if all { 0 } else { pages }));
            }
            Ok(Notice::Range(_)) => {}
            Ok(_) => trace.lost = true,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    drop(subscription);
    Ok(trace)
}
