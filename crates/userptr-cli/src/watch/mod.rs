// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr watch`: what changes the memory of a program, how often, and from where.
//!
//! The tracing thread is this one: it stops the program where its mms are made. Another one drains the stream and
//! counts. The report goes to standard error or a file, because standard output is the program's.

mod calls;
mod cause;
mod cost;
mod elf;
mod html;
mod regions;
mod report;
mod symbols;
mod tally;
mod timeline;
mod unwind;

use crate::Error;
use crate::args::WatchArgs;
use hostmm::kvm::stream::Stream;
use hostmm::trace::{self, Ended, Observer, Options, Signals, Tgid, TraceError, What};
use interleave::{LockClass, MaySleep, Mutex, scope};
use regions::Regions;
use report::Report;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io::Write;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;
use tally::{News, Tally};

pub(crate) use cost::WorkingSet;

/// Bytes of the ring: 47,000 changes, which is a tenth of a second of the fastest storm that was seen.
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
    fn mm_made(&mut self, tgid: Tgid, at: u64, program: &str, vdso: Range<u64>) {
        self.send(News::Made { tgid, at, program: program.to_owned(), maps: Regions::open(tgid), vdso });
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
    let mut stream = Stream::open(RING).map_err(WatchError::from)?;
    let news = Mutex::new(&NEWS, Vec::new());
    let end = Bell::new()?;
    let mut tally = Tally::new(args.cost.then_some(args.working_set));
    let ended = MaySleep::enter(|cx| {
        scope(cx, |s, _| {
            s.spawn("watch-count", |cx| count(cx, &mut stream, &news, &end, &mut tally));
            let ended = trace::run(&what, Options { follow: args.follow }, &signals, &mut Post(&news));
            end.ring();
            ended
        })
    });
    let ended = ended.map_err(WatchError::from)?;
    let report = Report::new(&what, &ended, &tally, (stream.lost(), stream.misses()));
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

/// Wakes the counting thread for its last round.
struct Bell(OwnedFd);

impl Bell {
    fn new() -> std::io::Result<Bell> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    fn ring(&self) {
        // It holds more than one.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Sleeps until it has rung, `also` is readable or `patience` is over: has it rung?
    fn wait(&self, also: Option<BorrowedFd<'_>>, patience: Duration) -> bool {
        let polled = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut polled: Vec<PollFd<'_>> = [self.0.as_fd()].into_iter().chain(also).map(polled).collect();
        let patience =
            Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: patience.subsec_nanos().into() };
        // An interrupted sleep is a short one.
        let _ = poll(&mut polled, Some(&patience));
        !polled[0].revents().is_empty()
    }
}

/// The counting thread.
fn count(cx: &mut MaySleep<'_>, stream: &mut Stream, news: &Mutex<Vec<News>>, end: &Bell, tally: &mut Tally) {
    let mut changes = Vec::new();
    let mut last = false;
    loop {
        stream.drain(&mut changes);
        for item in std::mem::take(&mut *news.lock(cx)) {
            tally.news(item);
        }
        tally.changes(&mut changes, last);
        if last {
            return;
        }
        // Rounds of some length: what a program maps for a moment can then be named by its last look.
        last = end.wait(Some(stream.as_fd()), NAP) || end.wait(None, ROUND);
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
