// SPDX-License-Identifier: MIT OR Apache-2.0
//! The running kernel's side: this process does the operations on memory of its own and listens to its notifier.
//!
//! Announcements arrive late, on a thread of the source. After each operation the process makes the kernel announce a
//! page of its own, and the stream is cut at these marks once the script is over. The task that changes the memory runs on
//! one CPU, so the stream is in order.

mod run;

use super::script::{FILE_PAGES, NOPS, Op, Span, Who};
use super::step::{Heard, Step, arena, page};
use hostmm::capability::{self, Capability, State};
use hostmm::kvm::{self, KvmSource, Notice, Options, Record};
use hostmm::lab::{self, Call, Ksm, Lab};
use hostmm::page::{self as host, Pagemap, PidOrSelf};
use hostmm::pin::{PinError, Pinner};
use hostmm::setting::SwapSpace;
use mmu_notifier::{PAGE_SHIFT, Range};
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long an announcement may take to arrive. Usually a quarter of a millisecond.
const PATIENCE: Duration = Duration::from_secs(5);
/// After so long without an announcement none is under way.
const QUIET: Duration = Duration::from_millis(300);
/// How often a script is run again whose announcements got lost.
const TRIES: u32 = 3;
/// Bytes of the ring for records: 48 each, and a script is not read before it is over.
const RING: u32 = 1 << 20;

/// ksmd has merged two pages, or seen them often enough, in some ten milliseconds; on a busy machine it has to wait.
const KSM_PATIENCE: Duration = Duration::from_secs(10);
/// How often a page is asked to go: reclaim passes over one that somebody looks at.
pub(super) const PAGE_OUT_TRIES: u32 = 5;

/// Why an operation cannot be tried here, as far as one can tell without trying; `None` if it can.
#[must_use]
pub fn missing(needs: Capability) -> Option<String> {
    match capability::probe(needs) {
        State::There(_) => None,
        State::Partial(why) | State::Missing(why) => Some(why),
    }
}

/// Why the kernel could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubjectError {
    /// There is no source.
    #[error("no notifier source: {0}")]
    Open(#[from] kvm::OpenError),
    /// The source would not tell.
    #[error("the notifier source does not call back: {0}")]
    Subscribe(#[from] kvm::SubscribeError),
    /// No frame numbers.
    #[error("page frames cannot be told apart: {0}")]
    Pages(#[from] host::PageError),
    /// They are hidden.
    #[error("page frame numbers are hidden: they need CAP_SYS_ADMIN in the initial user namespace")]
    Hidden,
    /// A page was swapped out, or guarded.
    #[error("page {0} of the arena is {1:?}: a script needs memory that nobody reclaims")]
    Odd(u64, host::Frame),
    /// The process could not be prepared, or its child not made.
    #[error("the process could not be prepared: {0}")]
    Lab(#[from] io::Error),
    /// KSM's settings, swap space or pins could not be had.
    #[error("{what} cannot be had: {source}")]
    Needs {
        /// What.
        what: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// There is no ring to pin with.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// A mark did not arrive.
    #[error("the kernel's announcements do not arrive")]
    Silent,
    /// Records were lost.
    #[error("records were lost: run fewer operations at a time")]
    Lost,
}

/// One operation, as the kernel did it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// What was seen.
    pub step: Step,
    /// What the kernel chose, where it may choose either way. A store to a page that was present: did the page get another
    /// frame? [`Op::PageOut`], [`Op::Merge`]: did it happen?
    pub chose: Option<bool>,
    /// The anonymous pages that [`Op::Unprobe`] left where they were, or brought back from swap space; those of an [`Op::Pin`] that
    /// got another frame.
    pub held: Vec<(Who, u64)>,
}

/// This process as a subject. It must be a process of its own: see [`lab::calm`].
#[derive(Debug)]
pub struct Subject {
    lab: Lab,
    /// Once a script has pinned.
    pinner: Option<Pinner>,
    /// Once a script has swapped.
    swap: Option<SwapSpace>,
    /// This mm has had a breakpoint, which removals ask for.
    primed: bool,
    repeated: usize,
    records: Receiver<Notice>,
    pagemap: Pagemap,
    /// The frame of the zero page.
    zero: host::Pfn,
    /// This process, as records name it.
    tgid: u32,
    /// Dropped last but one: no more announcements.
    _subscription: kvm::Subscription,
    _source: KvmSource,
}

impl Subject {
    /// Prepares the calling process: a notifier, an arena, one CPU, no huge pages. May sleep.
    ///
    /// # Errors
    /// [`SubjectError`].
    pub fn open() -> Result<Subject, SubjectError> {
        let source = KvmSource::open(&Options { ring: Some(RING), ..Options::default() })?;
        // After the source, whose thread thereby stays free of it.
        lab::calm()?;
        let lab = Lab::open(arena())?;
        let (to, records) = channel();
        let subscription = source.subscribe(Range::ALL, move |notice| {
            // The receiver is gone only when the subject is.
            let _ = to.send(*notice);
        })?;
        let pagemap = Pagemap::open(PidOrSelf::Myself)?;
        let zero = zero_page(&lab, &pagemap)?;
        let mut subject = Subject {
            lab,
            pinner: None,
            swap: None,
            primed: false,
            repeated: 0,
            records,
            pagemap,
            zero,
            tgid: 0,
            _subscription: subscription,
            _source: source,
        };
        for _ in 0..=TRIES {
            subject.lab.mark()?;
            let since = Instant::now();
            loop {
                match subject.next(since) {
                    Ok(Notice::Range(record)) if subject.is_mark(&record) => {
                        subject.tgid = record.tgid;
                        return Ok(subject);
                    }
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
        Err(SubjectError::Silent)
    }

    /// Other processes' announcements come too, so silence is the time `since` a mark was due.
    fn next(&self, since: Instant) -> Result<Notice, SubjectError> {
        if since.elapsed() > PATIENCE {
            return Err(SubjectError::Silent);
        }
        self.records.recv_timeout(PATIENCE).map_err(|e| match e {
            RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected => SubjectError::Silent,
        })
    }

    fn is_mark(&self, record: &Record) -> bool {
        let mark = self.lab.mark_range();
        (record.start, record.end) == (mark.start(), mark.end())
    }

    /// Does `script` from an empty arena and an empty file on. Sleeps until all announcements have arrived.
    ///
    /// # Errors
    /// [`SubjectError`].
    pub fn run(&mut self, script: &[Op]) -> Result<Vec<Done>, SubjectError> {
        for _ in 0..TRIES {
            match self.run_once(script) {
                // The kernel skips a program now and then while somebody updates BPF maps: see `KvmSource::health`.
                Err(SubjectError::Silent | SubjectError::Lost) => self.forget(),
                outcome => return outcome,
            }
        }
        self.run_once(script)
    }

    /// How many scripts were run again since announcements were lost.
    #[must_use]
    pub fn repeated(&self) -> usize {
        self.repeated
    }

    fn forget(&mut self) {
        self.repeated += 1;
        while self.records.recv_timeout(QUIET).is_ok() {}
    }

    fn run_once(&mut self, script: &[Op]) -> Result<Vec<Done>, SubjectError> {
        if self.swap.is_none() && script.iter().any(|op| matches!(op, Op::PageOut(..))) {
            let added = SwapSpace::add();
            self.swap = Some(added.map_err(|source| SubjectError::Needs { what: "swap space", source })?);
        }
        if self.pinner.is_none() && script.iter().any(|op| matches!(op, Op::Pin(_))) {
            self.pinner = Some(Pinner::new(1)?);
        }
        if !self.primed && script.iter().any(|op| matches!(op, Op::Probe(_))) {
            self.prime()?;
        }
        match script.first() {
            Some(Op::Disk) => self.lab.renew_on_disk(FILE_PAGES)?,
            _ => self.lab.renew(FILE_PAGES)?,
        }
        // For as long as memory of ours is mergeable: another process's ksmd would merge it too.
        let merges = script.iter().any(|op| matches!(op, Op::Merge(..)));
        let ksm = merges.then(Ksm::take).transpose();
        let ksm = ksm.map_err(|source| SubjectError::Needs { what: "KSM", source })?;
        let done = self.run_prepared(script, ksm.as_ref());
        self.lab.clear()?;
        done
    }

    /// Has a breakpoint set and taken out, since what a removal does depends on whether the mm ever had one.
    fn prime(&mut self) -> Result<(), SubjectError> {
        let there = Call::Map(Range::page(page(0)), lab::Rights::Read, lab::Backing::PrivateFile(0));
        for call in [Call::WriteFile { page: 0, value: NOPS }, there] {
            self.lab.call(&call).map_err(io::Error::from)?;
        }
        drop(self.lab.probe(0)?);
        self.primed = true;
        Ok(self.lab.renew(FILE_PAGES)?)
    }

    fn run_prepared(&self, script: &[Op], ksm: Option<&Ksm>) -> Result<Vec<Done>, SubjectError> {
        self.lab.mark()?;
        // ksmd only while it is ours alone: what it does to others at these addresses is none of ours.
        let ksmd = ksm.and_then(|_| Ksm::pid());
        let pids = [self.tgid].into_iter().chain(ksmd).collect();
        let (mut done, pids) = run::run(self, ksm, pids, script)?;
        self.until_mark(&pids)?;
        for Done { step, .. } in &mut done {
            step.heard = self.until_mark(&pids)?;
        }
        Ok(done)
    }

    /// What `pids` announced in the arena up to the next mark.
    fn until_mark(&self, pids: &[u32]) -> Result<Vec<Heard>, SubjectError> {
        let (mut heard, since) = (Vec::new(), Instant::now());
        loop {
            match self.next(since)? {
                Notice::Range(record) if !pids.contains(&record.tgid) => {}
                Notice::Range(record) if self.is_mark(&record) => return Ok(heard),
                Notice::Range(record) if record.overlaps(self.lab.arena()) => {
                    heard.push(Heard::new(arena(), record.start, record.end));
                }
                Notice::Range(_) => {}
                _ => return Err(SubjectError::Lost),
            }
        }
    }
}

fn zero_page(lab: &Lab, pagemap: &Pagemap) -> Result<host::Pfn, SubjectError> {
    let at = page(0);
    let map = Call::Map(Range::page(at), lab::Rights::Read, lab::Backing::Anonymous);
    lab.call(&map).and_then(|_| lab.call(&Call::Load(at))).map_err(io::Error::from)?;
    run::present(pagemap.entry(at)?).ok_or(SubjectError::Hidden)
}

pub(super) fn range(span: Span) -> Range {
    let start = page(span.first).get();
    let end = arena().end();
    let pages = span.pages.clamp(1, (end - start) >> PAGE_SHIFT);
    Range::new(start, pages << PAGE_SHIFT).unwrap_or(arena())
}
