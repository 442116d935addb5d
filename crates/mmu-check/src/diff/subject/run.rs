// SPDX-License-Identifier: MIT OR Apache-2.0
//! One script on the kernel: each operation as system calls, and what is to be seen after it.

use super::{Done, KSM_PATIENCE, NOPS, PAGE_OUT_TRIES, Subject, SubjectError, range};
use crate::diff::script::{Op, PAGES, Who};
use crate::diff::step::{Answer, Frame, Frames, Page, Step, arena, page};
use hostmm::lab::{self, Call, Errno, Fork, Ksm};
use hostmm::page::{self as host, Pagemap, PagemapEntry, PidOrSelf};
use hostmm::pin::Pin;
use interleave::{MaySleep, time};
use mmu_notifier::Range;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

pub(super) fn present(entry: PagemapEntry) -> Option<host::Pfn> {
    match entry.frame() {
        host::Frame::Present(pfn) => Some(pfn),
        _ => None,
    }
}

/// A word of a script with probes, as softmm has it: its breakpoints are as long as a word, and so is what a removal puts back.
/// Such a script stores no word that ends like either.
fn seen(word: u64) -> u64 {
    match word & 0xff {
        0xcc => softmm::uprobes::BREAKPOINT,
        byte if byte == NOPS & 0xff => NOPS,
        _ => word,
    }
}

/// An anonymous page.
#[derive(PartialEq)]
struct Owned {
    by: Who,
    at: u64,
    /// `None`: it is in swap space.
    frame: Option<host::Pfn>,
}

/// Does `script`, and says who may have announced something to the parent: those in `pids`, and its children.
pub(super) fn run(
    subject: &Subject,
    ksm: Option<&Ksm>,
    pids: Vec<u32>,
    script: &[Op],
) -> Result<(Vec<Done>, Vec<u32>), SubjectError> {
    let probes = script.iter().any(|op| matches!(op, Op::Probe(_)));
    let mut run = Run { subject, ksm, probes, started: false, pin: None, probe: None, child: None, pids };
    let done = script.iter().map(|op| run.one(op)).collect::<Result<_, _>>()?;
    Ok((done, std::mem::take(&mut run.pids)))
}

/// A script under way. What it holds is let go in the order of the fields.
struct Run<'a> {
    subject: &'a Subject,
    ksm: Option<&'a Ksm>,
    /// The script sets breakpoints.
    probes: bool,
    /// The first operation is done.
    started: bool,
    pin: Option<Pin>,
    probe: Option<(u64, OwnedFd)>,
    /// Who may announce something to the parent: itself, its children, ksmd.
    pids: Vec<u32>,
    child: Option<(Fork<'a>, Pagemap)>,
}

impl<'a> Run<'a> {
    fn one(&mut self, op: &Op) -> Result<Done, SubjectError> {
        let mut held = Vec::new();
        let (answer, chose) = match *op {
            Op::PageOut(by, at) => self.page_out(by, at)?,
            Op::Merge(first, second) => self.merge(first, second)?,
            Op::Store(by, at, _) | Op::WritePinned(by, at, _) => {
                let before = self.entry(by, at)?.and_then(present);
                let answer = self.answer(op)?;
                let after = self.entry(by, at)?.and_then(present);
                (answer, before.zip(after).map(|(before, after)| before != after))
            }
            Op::Pin(_) => {
                let before = self.all_anonymous()?;
                let answer = self.answer(op)?;
                let after = self.all_anonymous()?;
                let moved =
                    |page: &Owned| page.by == Who::Parent && page.frame.is_some() && !after.contains(page);
                held = before.into_iter().filter(moved).map(|page| (page.by, page.at)).collect();
                (answer, None)
            }
            Op::Unprobe => {
                let before = self.all_anonymous()?;
                let answer = self.answer(op)?;
                let stayed =
                    |page: &Owned| before.contains(page) || before.contains(&Owned { frame: None, ..*page });
                let after = self.all_anonymous()?.into_iter();
                let there = after.filter(|page| page.frame.is_some() && stayed(page));
                held = there.map(|page| (page.by, page.at)).collect();
                (answer, None)
            }
            _ => (self.answer(op)?, None),
        };
        self.started = true;
        self.subject.lab.mark()?;
        Ok(Done { step: Step { answer, heard: Vec::new(), pages: self.pages()? }, chose, held })
    }

    fn pagemap(&self, by: Who) -> Option<&Pagemap> {
        match by {
            Who::Parent => Some(&self.subject.pagemap),
            Who::Child => self.child.as_ref().map(|(_, pagemap)| pagemap),
        }
    }

    /// `None`: there is no such process.
    fn entry(&self, by: Who, at: u64) -> Result<Option<PagemapEntry>, SubjectError> {
        let Some(pagemap) = self.pagemap(by) else { return Ok(None) };
        Ok(Some(pagemap.entry(page(at))?))
    }

    /// The frame of an anonymous page.
    fn anonymous(&self, by: Who, at: u64) -> Result<Option<host::Pfn>, SubjectError> {
        let entry = self.entry(by, at)?.filter(|entry| !entry.is_file());
        Ok(entry.and_then(present).filter(|&pfn| pfn != self.subject.zero))
    }

    /// Every anonymous page and its frame, if it is not in swap space.
    fn all_anonymous(&self) -> Result<Vec<Owned>, SubjectError> {
        let mut found = Vec::new();
        for (by, at) in
            [Who::Parent, Who::Child].into_iter().flat_map(|by| (0..PAGES).map(move |at| (by, at)))
        {
            let entry = self.entry(by, at)?;
            if entry.is_some_and(|entry| matches!(entry.frame(), host::Frame::Swapped(_))) {
                found.push(Owned { by, at, frame: None });
            } else if let Some(pfn) = self.anonymous(by, at)? {
                found.push(Owned { by, at, frame: Some(pfn) });
            }
        }
        Ok(found)
    }

    fn page_out(&mut self, by: Who, at: u64) -> Result<(Answer, Option<bool>), SubjectError> {
        let alone = self.entry(by, at)?.filter(|entry| entry.is_exclusive());
        if alone.and_then(present).is_none_or(|pfn| pfn == self.subject.zero) {
            return Ok((Answer::Skipped, None));
        }
        for _ in 0..PAGE_OUT_TRIES {
            // Reclaim passes over a page that is in some CPU's batch.
            self.subject.lab.drain();
            if let Some(Err(errno)) = self.call(by, &Call::PageOut(Range::page(page(at)))) {
                return Ok((Answer::Errno(errno.raw_os_error()), None));
            }
            if self.entry(by, at)?.and_then(present).is_none() {
                return Ok((Answer::Done, Some(true)));
            }
            MaySleep::enter(|cx| time::sleep(cx, Duration::from_millis(1)));
        }
        Ok((Answer::Skipped, Some(false)))
    }

    fn merge(&mut self, first: u64, second: u64) -> Result<(Answer, Option<bool>), SubjectError> {
        let frames = |run: &Run<'_>| -> Result<_, SubjectError> {
            Ok((run.anonymous(Who::Parent, first)?, run.anonymous(Who::Parent, second)?))
        };
        let (Some(ksm), None, None) = (self.ksm, &self.child, &self.pin) else {
            return Ok((Answer::Skipped, None));
        };
        match frames(self)? {
            (Some(one), Some(other)) if one != other => {}
            _ => return Ok((Answer::Skipped, None)),
        }
        for at in [first, second] {
            if let Some(Err(errno)) = self.call(Who::Parent, &Call::Mergeable(Range::page(page(at)), true)) {
                return Ok((Answer::Errno(errno.raw_os_error()), None));
            }
        }
        self.subject.lab.drain();
        let merged = ksm.run_until(KSM_PATIENCE, || frames(self).map(|(one, other)| one == other))?;
        Ok((if merged { Answer::Done } else { Answer::Skipped }, Some(merged)))
    }

    fn answer(&mut self, op: &Op) -> Result<Answer, SubjectError> {
        let (by, call) = match *op {
            _ if self.probe.as_ref().is_some_and(|(at, _)| op.changes_file(*at)) => {
                return Ok(Answer::Skipped);
            }
            Op::Fork if self.child.is_some() || self.probe.is_some() => return Ok(Answer::Skipped),
            Op::Fork => {
                let child = self.subject.lab.fork()?;
                let pagemap = Pagemap::open(PidOrSelf::Pid(child.pid()))?;
                self.pids.push(child.pid());
                self.child = Some((child, pagemap));
                return Ok(Answer::Done);
            }
            Op::Exit => {
                return Ok(if self.child.take().is_some() { Answer::Done } else { Answer::Skipped });
            }
            Op::Disk => return Ok(if self.started { Answer::Skipped } else { Answer::Done }),
            Op::Pin(span) => {
                let (None, Some(pinner)) = (&self.pin, &self.subject.pinner) else {
                    return Ok(Answer::Skipped);
                };
                return Ok(match pinner.pin(range(span)) {
                    Ok(pin) => {
                        self.pin = Some(pin);
                        Answer::Done
                    }
                    // The ring has one slot, which is free, so what is wrong is the range.
                    Err(_) => Answer::Fault,
                });
            }
            Op::Unpin => return Ok(if self.pin.take().is_some() { Answer::Done } else { Answer::Skipped }),
            Op::Probe(_) if self.probe.is_some() => return Ok(Answer::Skipped),
            Op::Probe(at) => {
                self.subject.lab.call(&Call::WriteFile { page: at, value: NOPS }).map_err(io::Error::from)?;
                self.probe = Some((at, self.subject.lab.probe(at)?));
                return Ok(Answer::Done);
            }
            Op::Unprobe => {
                return Ok(if self.probe.take().is_some() { Answer::Done } else { Answer::Skipped });
            }
            Op::PageOut(..) | Op::Merge(..) => return Ok(Answer::Skipped),
            Op::Map(by, span, rights, backing) => (by, Call::Map(range(span), rights, backing)),
            Op::Unmap(by, span) => (by, Call::Unmap(range(span))),
            Op::Protect(by, span, rights) => (by, Call::Protect(range(span), rights)),
            Op::DontNeed(by, span) => (by, Call::DontNeed(range(span))),
            Op::Free(by, span) => {
                // A page that waits in a CPU's batch for its list is not marked.
                self.subject.lab.drain();
                (by, Call::Free(range(span)))
            }
            Op::Move(by, from, to) => (by, Call::Move { from: page(from), to: page(to) }),
            Op::Load(by, at) => (by, Call::Load(page(at))),
            Op::Store(by, at, value) => (by, Call::Store(page(at), value)),
            Op::ReadPinned(by, at) => (by, Call::ReadPinned(page(at))),
            Op::WritePinned(by, at, value) => (by, Call::WritePinned(page(at), value)),
            Op::Unmerge(span) => (Who::Parent, Call::Mergeable(range(span), false)),
            Op::Sync => (Who::Parent, Call::Sync),
            Op::Truncate(pages) => (Who::Parent, Call::Truncate { pages }),
            Op::Punch(first, last) => (Who::Parent, Call::Punch { first, pages: last + 1 - first }),
            Op::WriteFile(at, value) => (Who::Parent, Call::WriteFile { page: at, value }),
        };
        let Some(got) = self.call(by, &call) else { return Ok(Answer::Skipped) };
        Ok(match got {
            Ok(word) if matches!(op, Op::Load(..) | Op::ReadPinned(..)) => Answer::Word(self.seen(word)),
            Ok(_) => Answer::Done,
            Err(Errno::FAULT) => Answer::Fault,
            Err(Errno::INVAL) => Answer::Invalid,
            Err(Errno::NOMEM) => Answer::Hole,
            Err(errno) => Answer::Errno(errno.raw_os_error()),
        })
    }

    fn seen(&self, word: u64) -> u64 {
        if self.probes { seen(word) } else { word }
    }

    fn call(&mut self, by: Who, call: &Call) -> Option<lab::Answer> {
        match by {
            Who::Parent => Some(self.subject.lab.call(call)),
            Who::Child => self.child.as_mut().map(|(child, _)| child.call(call)),
        }
    }

    fn pages(&mut self) -> Result<Vec<Page>, SubjectError> {
        let mut frames = Frames::new();
        let mut pages = Vec::new();
        for by in [Who::Parent, Who::Child] {
            let Some(pagemap) = self.pagemap(by) else { continue };
            let entries = pagemap.entries(arena())?;
            for (n, entry) in (0..PAGES).zip(entries) {
                let frame = match entry.frame() {
                    host::Frame::None => Frame::None,
                    host::Frame::Present(pfn) if pfn == self.subject.zero => Frame::Zero,
                    host::Frame::Present(pfn) => frames.number(pfn),
                    host::Frame::Hidden => return Err(SubjectError::Hidden),
                    host::Frame::Swapped(_) if self.subject.swap.is_some() => Frame::Swapped,
                    odd => return Err(SubjectError::Odd(n, odd)),
                };
                // A load of a page that is not there would bring it in.
                let there = !matches!(frame, Frame::None | Frame::Swapped);
                let word =
                    if there { self.call(by, &Call::Load(page(n))).and_then(Result::ok) } else { None };
                let word = word.map(|word| self.seen(word));
                pages.push(Page { frame, word });
            }
        }
        Ok(pages)
    }
}
