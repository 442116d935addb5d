// SPDX-License-Identifier: MIT OR Apache-2.0
//! The running kernel's side: this process does the operations on memory of its own and listens to its notifier.
//!
//! Announcements arrive late, on a thread of the source. After each operation the process makes the kernel announce a
//! page of its own, and the stream is cut at these marks once the script is over. The task that changes the memory runs on
//! one CPU, so the stream is in order.

use super::script::{FILE_PAGES, Op, PAGES, Span, Who};
use super::step::{Answer, Frame, Frames, Heard, Page, Step, arena, page};
use hostmm::kvm::{self, KvmSource, Notice, Options, Record};
use hostmm::lab::{self, Call, Errno, Fork, Lab};
use hostmm::page::{self as host, Pagemap, PidOrSelf};
use mmu_notifier::{PAGE_SHIFT, Range};
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// How long an announcement may take to arrive. Usually a quarter of a millisecond.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of the ring for records: 48 each, and a script is not read before it is over.
const RING: u32 = 1 << 20;

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
    /// A store to a page that was present: did it get another frame? (For what the kernel may choose either way.)
    pub moved: Option<bool>,
}

/// This process as a subject. It must be a process of its own: see [`lab::calm`].
#[derive(Debug)]
pub struct Subject {
    lab: Lab,
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
        let mut subject =
            Subject { lab, records, pagemap, zero, tgid: 0, _subscription: subscription, _source: source };
        subject.lab.mark()?;
        while subject.tgid == 0 {
            match subject.next()? {
                Notice::Range(record) if subject.is_mark(&record) => subject.tgid = record.tgid,
                _ => {}
            }
        }
        Ok(subject)
    }

    fn next(&self) -> Result<Notice, SubjectError> {
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
        self.lab.renew(FILE_PAGES)?;
        self.lab.mark()?;
        let mut run = Run { subject: self, child: None };
        let mut done = script.iter().map(|op| run.one(op)).collect::<Result<Vec<_>, _>>()?;
        drop(run);
        self.until_mark()?;
        for Done { step, .. } in &mut done {
            step.heard = self.until_mark()?;
        }
        Ok(done)
    }

    /// What was announced in the arena up to the next mark.
    fn until_mark(&self) -> Result<Vec<Heard>, SubjectError> {
        let mut heard = Vec::new();
        loop {
            match self.next()? {
                Notice::Range(record) if record.tgid != self.tgid => {}
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
    present(pagemap, 0)?.ok_or(SubjectError::Hidden)
}

fn present(pagemap: &Pagemap, n: u64) -> Result<Option<host::Pfn>, SubjectError> {
    Ok(match pagemap.entry(page(n))?.frame() {
        host::Frame::Present(pfn) => Some(pfn),
        _ => None,
    })
}

/// A script under way.
struct Run<'a> {
    subject: &'a Subject,
    child: Option<(Fork<'a>, Pagemap)>,
}

impl<'a> Run<'a> {
    fn one(&mut self, op: &Op) -> Result<Done, SubjectError> {
        let before = self.frame_behind(op)?;
        let answer = self.answer(op)?;
        self.subject.lab.mark()?;
        let after = self.frame_behind(op)?;
        let moved = before.zip(after).map(|(before, after)| before != after);
        Ok(Done { step: Step { answer, heard: Vec::new(), pages: self.pages()? }, moved })
    }

    fn answer(&mut self, op: &Op) -> Result<Answer, SubjectError> {
        let (by, call) = match *op {
            Op::Fork if self.child.is_some() => return Ok(Answer::Skipped),
            Op::Fork => {
                let child = self.subject.lab.fork()?;
                let pagemap = Pagemap::open(PidOrSelf::Pid(child.pid()))?;
                self.child = Some((child, pagemap));
                return Ok(Answer::Done);
            }
            Op::Exit => {
                return Ok(if self.child.take().is_some() { Answer::Done } else { Answer::Skipped });
            }
            Op::Map(by, span, rights, backing) => (by, Call::Map(range(span), rights, backing)),
            Op::Unmap(by, span) => (by, Call::Unmap(range(span))),
            Op::Protect(by, span, rights) => (by, Call::Protect(range(span), rights)),
            Op::DontNeed(by, span) => (by, Call::DontNeed(range(span))),
            Op::Load(by, at) => (by, Call::Load(page(at))),
            Op::Store(by, at, value) => (by, Call::Store(page(at), value)),
            Op::Truncate(pages) => (Who::Parent, Call::Truncate { pages }),
            Op::Punch(first, last) => (Who::Parent, Call::Punch { first, pages: last + 1 - first }),
            Op::WriteFile(at, value) => (Who::Parent, Call::WriteFile { page: at, value }),
        };
        let Some(got) = self.call(by, &call) else { return Ok(Answer::Skipped) };
        Ok(match got {
            Ok(word) if matches!(op, Op::Load(..)) => Answer::Word(word),
            Ok(_) => Answer::Done,
            Err(Errno::FAULT) => Answer::Fault,
            Err(Errno::NOMEM) => Answer::Hole,
            Err(errno) => Answer::Errno(errno.raw_os_error()),
        })
    }

    fn call(&mut self, by: Who, call: &Call) -> Option<lab::Answer> {
        match by {
            Who::Parent => Some(self.subject.lab.call(call)),
            Who::Child => self.child.as_mut().map(|(child, _)| child.call(call)),
        }
    }

    /// For a store: which frame is there?
    fn frame_behind(&self, op: &Op) -> Result<Option<host::Pfn>, SubjectError> {
        Ok(match (op, &self.child) {
            (&Op::Store(Who::Parent, at, _), _) => present(&self.subject.pagemap, at)?,
            (&Op::Store(Who::Child, at, _), Some((_, pagemap))) => present(pagemap, at)?,
            _ => None,
        })
    }

    fn pages(&mut self) -> Result<Vec<Page>, SubjectError> {
        let mut frames = Frames::new();
        let mut pages = Vec::new();
        for by in [Who::Parent, Who::Child] {
            let pagemap = match (by, &self.child) {
                (Who::Parent, _) => &self.subject.pagemap,
                (Who::Child, Some((_, pagemap))) => pagemap,
                (Who::Child, None) => continue,
            };
            let entries = pagemap.entries(arena())?;
            for (n, entry) in (0..PAGES).zip(entries) {
                let frame = match entry.frame() {
                    host::Frame::None => Frame::None,
                    host::Frame::Present(pfn) if pfn == self.subject.zero => Frame::Zero,
                    host::Frame::Present(pfn) => frames.number(pfn),
                    host::Frame::Hidden => return Err(SubjectError::Hidden),
                    odd => return Err(SubjectError::Odd(n, odd)),
                };
                // A load of a page that is not there would bring it in.
                let there = frame != Frame::None;
                let word =
                    if there { self.call(by, &Call::Load(page(n))).and_then(Result::ok) } else { None };
                pages.push(Page { frame, word });
            }
        }
        Ok(pages)
    }
}

pub(super) fn range(span: Span) -> Range {
    let start = page(span.first).get();
    let end = arena().end();
    let pages = span.pages.clamp(1, (end - start) >> PAGE_SHIFT);
    Range::new(start, pages << PAGE_SHIFT).unwrap_or(arena())
}
