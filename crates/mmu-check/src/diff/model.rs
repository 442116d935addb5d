// SPDX-License-Identifier: MIT OR Apache-2.0
//! softmm's side.
//!
//! One choice is the kernel's: a write fault on an anonymous page that is not exclusive and has one mapping reuses it
//! unless somebody holds a reference for a moment (an LRU batch, a reader of the page). What the kernel did is read from its frame
//! numbers, and softmm is made to do the same by holding a reference too. It is counted.

use super::script::{FILE_PAGES, Op, PAGES, Who};
use super::step::{Answer, Frame, Frames, Heard, Page, Step, arena, page};
use super::subject::{Done, range};
use hostmm::lab::{Backing, Rights};
use interleave::{LockClass, MaySleep, Sleep, SpinLock};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, PageAddr, RegisterError, WouldBlock};
use softmm::{
    AccessError, ChangeError, Config, FaultError, File, FileError, FileKind, Foll, ForkError, KernelProfile,
    Machine, MapKind, Mm, MmUser, MmapError, OutOfMemory, Placement, Prot, UserPages, ZERO_PAGE,
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
    told: usize,
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
            swap_slots: 0,
            cpus: 1,
            words_per_page: 1,
            // The kernel's own batches are larger than the arena.
            gather_batch: 4096,
            fault_around: 16,
            profile,
        });
        let parent = machine.new_mm()?;
        let listener = Arc::new(Listener(SpinLock::new(&HEARD, Vec::new())));
        let registration = parent
            .notifiers()
            .register(cx, listener.clone())
            .map_err(|e: RegisterError| ModelError::Odd(e.to_string()))?;
        let file = machine.new_file(FileKind::Shmem, FILE_PAGES);
        let mut model = Model { machine: machine.clone(), parent, child: None, file, told: 0 };
        let mut steps = Vec::new();
        for (n, op) in script.iter().enumerate() {
            let moved = done.get(n).and_then(|done| done.moved);
            let answer = model.one(cx, op, moved)?;
            let heard = std::mem::take(&mut *listener.0.lock(cx));
            steps.push(Step { answer, heard, pages: model.pages(cx)? });
        }
        let told = model.told;
        drop(registration);
        model.end(cx);
        let frames = machine.frames();
        match frames.total_frames() - frames.free_frames() {
            0 => Ok(Modelled { steps, told }),
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

    fn one(&mut self, cx: &mut MaySleep<'_>, op: &Op, moved: Option<bool>) -> Result<Answer, ModelError> {
        let by = match *op {
            Op::Fork if self.child.is_some() => return Ok(Answer::Skipped),
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
            Op::Truncate(_) | Op::Punch(..) | Op::WriteFile(..) => return self.on_file(cx, op),
            Op::Map(by, ..)
            | Op::Unmap(by, _)
            | Op::Protect(by, ..)
            | Op::DontNeed(by, _)
            | Op::Load(by, _)
            | Op::Store(by, ..) => by,
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
            Op::Load(_, at) => accessed(cpu.load(cx, mm, page(at).get()).map(Answer::Word)),
            Op::Store(_, at, value) => {
                let held = moved.and_then(|moved| if moved { hold(cx, mm, page(at)) } else { None });
                let answer = accessed(cpu.store(cx, mm, page(at).get(), value).map(|()| Answer::Done));
                self.told += usize::from(held.is_some());
                answer
            }
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
                    false => Frame::None,
                    true if pte.pfn() == ZERO_PAGE => Frame::Zero,
                    true => frames.number(pte.pfn()),
                };
                let word = match frame {
                    Frame::None => None,
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
        Err(e) => Err(ModelError::Odd(e.to_string())),
    }
}

fn accessed(done: Result<Answer, AccessError>) -> Result<Answer, ModelError> {
    match done {
        Ok(answer) => Ok(answer),
        Err(AccessError::Fault(FaultError::Unmapped(_) | FaultError::Access(_) | FaultError::PastEnd(_))) => {
            Ok(Answer::Fault)
        }
        Err(AccessError::Fault(FaultError::OutOfMemory(e))) => Err(ModelError::OutOfMemory(e)),
        Err(e) => Err(ModelError::Odd(e.to_string())),
    }
}

/// The kernel copied the page. If softmm, left alone, would reuse it and may as well copy, hold it while it writes.
fn hold(cx: &mut MaySleep<'_>, mm: &Mm, at: PageAddr) -> Option<UserPages> {
    let (pte, frames) = (mm.peek_pte(at), mm.machine().frames());
    let free_to_choose = pte.is_present()
        && !pte.is_writable()
        && frames.is_anon(pte.pfn())
        && !frames.exclusive(pte.pfn())
        && frames.refcount(pte.pfn()) == 1;
    if free_to_choose { mm.get_user_pages(cx, mmu_notifier::Range::page(at), Foll::GET).ok() } else { None }
}
