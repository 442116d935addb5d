// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr watch`: what changes the memory of a program, how often, and from where.
//!
//! The tracing thread is this one: it stops the program where its mms are made. Another one drains the stream and
//! counts. The report goes to standard error or a file, because standard output is the program's.

mod calls;
mod cause;
mod cost;
mod html;
mod regions;
mod report;
mod symbols;
mod tally;
mod timeline;

use crate::Error;
use crate::args::WatchArgs;
use hostmm::kvm::stream::Stream;
use hostmm::trace::{self, Ended, Observer, Options, Signals, Tgid, TraceError, What};
use interleave::{AtomicBool, LockClass, MaySleep, Mutex, Ordering, scope, time};
use regions::Regions;
use report::Report;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tally::{News, Tally};

pub(crate) use cost::WorkingSet;

/// Bytes of the ring: 100,000 changes, which is a good part of a second of the fastest storm that was seen.
const RING: u32 = 32 << 20;
/// The counting thread looks at least this often.
const NAP: Duration = Duration::from_millis(50);

/// No two looks are nearer.
const ROUND: Duration = Duration::from_millis(10);

static NEWS: LockClass = LockClass::new("watch_news");

/// Why nothing, or no more, can be watched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WatchError {
    #[error("{0}; `userptr doctor` says what is missing and how to get it")]
    Stream(#[from] hostmm::kvm::OpenError),
    #[error(transparent)]
    Trace(#[from] TraceError),
}

/// Carries news from the tracing thread to the counting one.
struct Post<'a>(&'a Mutex<Vec<News>>);

impl Post<'_> {
    fn send(&self, news: News) {
        MaySleep::enter(|cx| self.0.lock(cx).push(news));
    }
}

impl Observer for Post<'_> {
    fn mm_made(&mut self, tgid: Tgid, at: u64, program: &str) {
        self.send(News::Made { tgid, at, program: program.to_owned(), maps: Regions::open(tgid) });
    }

    fn mm_shared(&mut self, tgid: Tgid, with: Tgid, at: u64) {
        self.send(News::Shared { tgid, with, at });
    }

    fn unwatched(&mut self, tgid: Tgid, _: u64, why: &str) {
        self.send(News::Unwatched { tgid, why: why.to_owned() });
    }

    fn mm_ends(&mut self, tgid: Tgid) {
        self.send(News::Ends { tgid, maps: Regions::seen(tgid) });
    }

    fn gone(&mut self, tgid: Tgid, at: u64) {
        self.send(News::Gone { tgid, at });
    }
}

pub(crate) fn run(args: &WatchArgs) -> Result<ExitCode, Error> {
    let what = match args.pid {
        Some(pid) => What::Process(pid),
        None => What::Program(args.program.clone()),
    };
    let out = crate::Saved::create(args.output.as_ref())?;
    let page = crate::Saved::create(args.report.as_ref())?;
    // Before there is another thread that could take them.
    let signals = Signals::block()?;
    let began = Instant::now();
    let mut stream = Stream::open(RING).map_err(WatchError::from)?;
    let news = Mutex::new(&NEWS, Vec::new());
    let done = AtomicBool::new(false);
    let mut tally = Tally::new(args.cost.then_some(args.working_set));
    let ended = MaySleep::enter(|cx| {
        scope(cx, |s, _| {
            s.spawn("watch-count", |cx| count(cx, &mut stream, &news, &done, &mut tally));
            let ended = trace::run(&what, Options { follow: args.follow }, &signals, &mut Post(&news));
            done.store(true, Ordering::SeqCst);
            ended
        })
    });
    let ended = ended.map_err(WatchError::from)?;
    let report = Report::new(&what, &ended, &tally, (stream.lost(), stream.misses()), began.elapsed());
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.table() };
    match args.output {
        Some(_) => out.write_bytes(text.as_bytes())?,
        None => std::io::stderr().write_all(text.as_bytes())?,
    }
    if args.report.is_some() {
        page.write_bytes(&html::page(&report, &tally))?;
    }
    Ok(exit_code(ended))
}

/// The counting thread.
fn count(
    cx: &mut MaySleep<'_>,
    stream: &mut Stream,
    news: &Mutex<Vec<News>>,
    done: &AtomicBool,
    tally: &mut Tally,
) {
    let mut changes = Vec::new();
    loop {
        let last = done.load(Ordering::SeqCst);
        stream.drain(&mut changes);
        for item in std::mem::take(&mut *news.lock(cx)) {
            tally.news(item);
        }
        tally.changes(&mut changes, last);
        if last {
            return;
        }
        stream.wait(NAP);
        // Rounds of some length: what a program maps for a moment can then be named by its last look.
        time::sleep(cx, ROUND);
    }
}

/// The program's own: whoever wraps a command in `watch` sees what it would have seen.
fn exit_code(ended: Ended) -> ExitCode {
    match ended {
        Ended::Code(code) => ExitCode::from(code as u8),
        Ended::Signal(signal) => ExitCode::from(128_u8.wrapping_add(signal as u8)),
        Ended::Asked(_) => ExitCode::SUCCESS,
    }
}
