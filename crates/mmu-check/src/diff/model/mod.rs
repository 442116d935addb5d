// SPDX-License-Identifier: MIT OR Apache-2.0
//! softmm's side.
//!
//! Where the kernel may choose, its choice is read from what it did, and softmm is made to do the same:
//!
//! * a write fault on an anonymous page that is not exclusive and has one mapping reuses it unless somebody holds a
//!   reference for a moment (an LRU batch, a reader of the page), and the removal of a uprobe gives the copy up unless
//!   somebody does: softmm then holds one too, which is counted as told;
//! * reclaim and ksmd pass over a page that somebody works on, so that what should have gone or merged did not: counted as
//!   not provoked.

mod paths;

use self::paths::{hold, prime, through_pin};
use super::script::{FILE_PAGES, Op, PAGES, Who};
use super::step::{Answer, Frame, Frames, Heard, Page, Step, arena, page};
use super::subject::{Done, range};
use hostmm::lab::{Backing, Rights};
use interleave::{LockClass, MaySleep, Sleep, SpinLock};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, Range, RegisterError, WouldBlock};
use softmm::{
    AccessError, ChangeError, Config, FaultError, File, FileError, FileKind, ForkError, KernelProfile,
    Machine, MapKind, MmUser, MmapError, MremapError, OutOfMemory, Placement, Prot, UserPages, ZERO_PAGE,
};
use std::sync::Arc;

static HEARD: LockClass = LockClass::new("diff_heard");

/// softmm could not do it for a reason of its own.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The machine is too small for the script.
    #[error("softmm ran out of memory: {0}")]
    OutOfMemory(#[from] OutOfMemory),
    /// Something that no script asks for.
    #[error("softmm failed with {0}")]
    Odd(String),
    /// Frames were not given back.
    #[error("softmm kept {0} page frames after the last process was gone")]
    Leak(usize),
}

/// What softmm made of a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modelled {
    /// A step for each operation.
    pub steps: Vec<Step>,
    /// How often it was told what the kernel had chosen.
    pub told: usize,
    /// Pages that the kernel was asked to swap out or merge, and could have, and did not.
    pub unprovoked: usize,
}

struct Listener(SpinLock<Vec<Heard>>);

impl MmuNotifier for Listener {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let heard = Heard::new(arena(), inv.range.start(), inv.range.end());
        self.0.lock(&mut cx).push(heard);
        Ok(())
    }
}

struct Model {
    machine: Arc<Machine>,
    parent: MmUser,
    child: Option<MmUser>,
    file: Arc<File>,
    /// The first operation is done.
    started: bool,
    pin: Option<UserPages>,
    probe: Option<u64>,
    told: usize,
    unprovoked: usize,
}

/// Does `script` on a machine of `profile`, choosing as the kernel did in `done`.
///
/// # Errors
/// [`ModelError`].
pub fn run(profile: KernelProfile, script: &[Op], done: &[Done]) -> Result<Modelled, ModelError> {
    MaySleep::enter(|cx| {
        let machine = Machine::new(Config {
            frames: 1024,
            tables: 64,
            // Never more than half of them used, so that no page leaves the swap cache early.
            swap_slots: 512,
            cpus: 1,
            words_per_page: 1,
            // The kernel's own batches are larger than the arena.
            gather_batch: 4096,
            fault_around: 16,
            profile,
        });
        let parent = machine.new_mm()?;
        if script.iter().any(|op| matches!(op, Op::Probe(_))) {
            prime(cx, &machine, &parent)?;
        }
        let listener = Arc::new(Listener(SpinLock::new(&HEARD, Vec::new())));
        let registration = parent
            .notifiers()
            .register(cx, listener.clone())
            .map_err(|e: RegisterError| ModelError::Odd(e.to_string()))?;
        let on_disk = script.first() == Some(&Op::Disk);
        let kind = if on_disk { FileKind::Regular } else { FileKind::Shmem };
        let file = machine.new_file(kind, FILE_PAGES);
        if on_disk {
            (0..FILE_PAGES).try_for_each(|at| file.write(cx, at, 0, 0)).map_err(odd)?;
        }
        let mut model = Model {
            machine: machine.clone(),
            parent,
            child: None,
            file,
            started: false,
            pin: None,
            probe: None,
            told: 0,
            unprovoked: 0,
        };
        let mut steps = Vec::new();
        for (n, op) in script.iter().enumerate() {
            let answer = match (op, done.get(n)) {
                (Op::Unprobe, Some(done)) => model.unprobe(cx, &done.held)?,
                (Op::Pin(span), Some(done)) => model.pin(cx, range(*span), &done.held)?,
                (_, done) => model.one(cx, op, done.and_then(|done| done.chose))?,
            };
            model.started = true;
            let heard = std::mem::take(&mut *listener.0.lock(cx));
            steps.push(Step { answer, heard, pages: model.pages(cx)? });
        }
        let (told, unprovoked) = (model.told, model.unprovoked);
        drop(registration);
        model.end(cx);
        let frames = machine.frames();
        match frames.total_frames() - frames.free_frames() {
            0 => Ok(Modelled { steps, told, unprovoked }),
            kept => Err(ModelError::Leak(kept)),
        }
    })
}

fn prot(rights: Rights) -> Prot {
    match rights {
        Rights::None => Prot::None,
        Rights::Read => Prot::Read,
        Rights::ReadWrite => Prot::ReadWrite,
    }
}

impl Model {
    fn end(self, cx: &mut MaySleep<'_>) {
        drop(self.pin);
        if let Some(child) = self.child {
            child.mmput(cx);
        }
        self.parent.mmput(cx);
    }

    fn mm(&self, who: Who) -> Option<&MmUser> {
        match who {
            Who::Parent => Some(&self.parent),
            Who::Child => self.child.as_ref(),
        }
    }

    fn one(&mut self, cx: &mut MaySleep<'_>, op: &Op, chose: Option<bool>) -> Result<Answer, ModelError> {
        let by = match *op {
            _ if self.probe.is_some_and(|at| op.changes_file(at)) => return Ok(Answer::Skipped),
            Op::Fork if self.child.is_some() || self.probe.is_some() => return Ok(Answer::Skipped),
            Op::Fork => {
                self.child = Some(self.parent.fork(cx).map_err(|e| match e {
                    ForkError::OutOfMemory(e) => ModelError::OutOfMemory(e),
                    ForkError::Exited => ModelError::Odd(e.to_string()),
                })?);
                return Ok(Answer::Done);
            }
            Op::Exit => {
                let Some(child) = self.child.take() else { return Ok(Answer::Skipped) };
                child.mmput(cx);
                return Ok(Answer::Done);
            }
            Op::Disk => return Ok(if self.started { Answer::Skipped } else { Answer::Done }),
            Op::Truncate(_) | Op::Punch(..) | Op::WriteFile(..) | Op::Sync => return self.on_file(cx, op),
            Op::Probe(at) => return self.probe(cx, at),
            Op::Unprobe => return self.unprobe(cx, &[]),
            Op::Pin(span) => return self.pin(cx, range(span), &[]),
            Op::Unpin => return Ok(if self.pin.take().is_some() { Answer::Done } else { Answer::Skipped }),
            Op::Merge(first, second) => return self.merge(cx, first, second, chose),
            Op::Unmerge(span) => {
                return changed(self.parent.madvise_mergeable(cx, range(span), false));
            }
            Op::PageOut(by, at) => return self.page_out(cx, by, at, chose),
            Op::Map(by, ..)
            | Op::Unmap(by, _)
            | Op::Protect(by, ..)
            | Op::DontNeed(by, _)
            | Op::Free(by, _)
            | Op::Move(by, ..)
            | Op::Load(by, _)
            | Op::Store(by, ..)
            | Op::ReadPinned(by, _)
            | Op::WritePinned(by, ..) => by,
        };
        let Some(mm) = self.mm(by) else { return Ok(Answer::Skipped) };
        let cpu = &self.machine.cpus()[0];
        match *op {
            Op::Map(_, span, rights, backing) => {
                let (place, prot) = (Placement::Fixed(range(span)), prot(rights));
                let file = &self.file;
                let mapped = match backing {
                    Backing::Anonymous => mm.mmap(cx, place, prot),
                    Backing::PrivateFile(at) => mm.mmap_file(cx, place, prot, file, at, MapKind::Private),
                    Backing::SharedFile(at) => mm.mmap_file(cx, place, prot, file, at, MapKind::Shared),
                };
                mapped.map(|_| Answer::Done).map_err(|e: MmapError| ModelError::Odd(e.to_string()))
            }
            Op::Unmap(_, span) => {
                mm.munmap(cx, range(span));
                Ok(Answer::Done)
            }
            Op::Protect(_, span, rights) => changed(mm.mprotect(cx, range(span), prot(rights))),
            Op::DontNeed(_, span) => changed(mm.madvise_dontneed(cx, range(span))),
            Op::Free(_, span) => changed(mm.madvise_free(cx, range(span))),
            Op::Move(_, from, to) => match mm.mremap(cx, Range::page(page(from)), Range::page(page(to))) {
                Ok(()) => Ok(Answer::Done),
                Err(MremapError::Ranges) => Ok(Answer::Invalid),
                Err(MremapError::NotOneVma) => Ok(Answer::Fault),
                Err(e) => Err(odd(e)),
            },
            Op::Load(_, at) => accessed(cpu.load(cx, mm, page(at).get()).map(Answer::Word)),
            Op::Store(_, at, value) | Op::WritePinned(_, at, value) => {
                let held = if chose == Some(true) { hold(cx, mm, page(at)) } else { None };
                let answer = match op {
                    Op::Store(..) => {
                        accessed(cpu.store(cx, mm, page(at).get(), value).map(|()| Answer::Done))
                    }
                    _ => through_pin(cx, mm, page(at), Some(value)),
                };
                self.told += usize::from(held.is_some());
                answer
            }
            Op::ReadPinned(_, at) => through_pin(cx, mm, page(at), None),
            _ => Ok(Answer::Skipped),
        }
    }

    fn on_file(&self, cx: &mut MaySleep<'_>, op: &Op) -> Result<Answer, ModelError> {
        let done = match *op {
            Op::Truncate(pages) => self.file.truncate(cx, pages),
            Op::Punch(first, last) => {
                self.file.punch_hole(cx, first..last + 1);
                Ok(())
            }
            Op::WriteFile(at, value) => self.file.write(cx, at, 0, value),
            Op::Sync => {
                self.file.fsync(cx);
                Ok(())
            }
            _ => return Ok(Answer::Skipped),
        };
        done.map(|()| Answer::Done).map_err(|e| match e {
            FileError::OutOfMemory(e) => ModelError::OutOfMemory(e),
            e => ModelError::Odd(e.to_string()),
        })
    }

    fn pages(&self, cx: &mut MaySleep<'_>) -> Result<Vec<Page>, ModelError> {
        let mut frames = Frames::new();
        let mut pages = Vec::new();
        let cpu = &self.machine.cpus()[0];
        for mm in [Some(&self.parent), self.child.as_ref()].into_iter().flatten() {
            for n in 0..PAGES {
                let pte = mm.peek_pte(page(n));
                let frame = match pte.is_mapped() {
                    false if pte.is_swap() => Frame::Swapped,
                    false => Frame::None,
                    true if pte.pfn() == ZERO_PAGE => Frame::Zero,
                    true => frames.number(pte.pfn()),
                };
                let word = match frame {
                    Frame::None | Frame::Swapped => None,
                    _ => match accessed(cpu.load(cx, mm, page(n).get()).map(Answer::Word))? {
                        Answer::Word(word) => Some(word),
                        _ => None,
                    },
                };
                pages.push(Page { frame, word });
            }
        }
        Ok(pages)
    }
}

fn changed(done: Result<(), ChangeError>) -> Result<Answer, ModelError> {
    match done {
        Ok(()) => Ok(Answer::Done),
        Err(ChangeError::Hole(_)) => Ok(Answer::Hole),
        Err(ChangeError::NotAnonymous(_)) => Ok(Answer::Invalid),
        Err(e) => Err(ModelError::Odd(e.to_string())),
    }
}

fn odd(error: impl std::fmt::Display) -> ModelError {
    ModelError::Odd(error.to_string())
}

fn faulted(error: FaultError) -> Result<Answer, ModelError> {
    match error {
        FaultError::OutOfMemory(e) => Err(ModelError::OutOfMemory(e)),
        FaultError::Unmapped(_)
        | FaultError::Access(_)
        | FaultError::PastEnd(_)
        | FaultError::NotPinnable(_) => Ok(Answer::Fault),
        e => Err(odd(e)),
    }
}

fn accessed(done: Result<Answer, AccessError>) -> Result<Answer, ModelError> {
    match done {
        Ok(answer) => Ok(answer),
        Err(AccessError::Fault(e)) => faulted(e),
        Err(e) => Err(odd(e)),
    }
}
