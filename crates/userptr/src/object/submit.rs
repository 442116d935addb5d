// SPDX-License-Identifier: MIT OR Apache-2.0
//! Execution: validate, submit, fence, and start over if an object's pages have moved.
//!
//! ```text
//! again:
//!   submit_init   each object of the list has pages                without the lock: it faults, waits, maps
//!   lock(userptr_objects)
//!   submit_done   each address leads into an object of the list,
//!                 each object's sequence stands; else unlock, again
//!   the batch is attached to its objects
//!   unlock
//!   the engine gets it                                             without the lock: an engine may take its time
//! ```
//! A change that begins after the unlock finds the batch attached and waits for it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use interleave::{MaySleep, Ordering};
use mmu_notifier::Access;
use mmu_notifier::primary::PrimaryMmu;

use super::core::{ATTEMPTS, Backing, Books, Core, JobOf};
use super::error::ObjectError;
use super::job::Job;
use super::{memory, table};
use crate::device::{Command, Device, DeviceAddr, Engine, Fault, Fence, FenceError, WaitError};

/// A batch that was submitted. Dropping it does not wait; the objects of its list wait for it where they must.
#[must_use = "a batch that failed says so only here"]
pub struct Execution<D: Engine> {
    job: JobOf<D>,
    /// As they were submitted in their address space, and as the engine got them.
    commands: Vec<(Command, Command)>,
}

impl<D: Engine> fmt::Debug for Execution<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execution").field("commands", &self.commands.len()).finish_non_exhaustive()
    }
}

impl<D: Engine> Execution<D> {
    /// Is it done, well or badly?
    pub fn is_done(&self) -> bool {
        MaySleep::enter(|cx| self.job.is_done(cx))
    }

    /// Waits until it is done.
    ///
    /// # Errors
    /// [`FenceError`]; a fault is told in addresses of the space that it was submitted in. What was mapped when the batch
    /// was submitted and then unmapped while it ran is such a fault on devices that hold no pages.
    pub fn wait(&self) -> Result<(), FenceError> {
        MaySleep::enter(|cx| self.job.wait(cx)).map_err(|error| match error {
            FenceError::Fault(fault) => FenceError::Fault(self.here(fault)),
            other => other,
        })
    }

    /// Waits until it is done, well or badly, which [`wait`](Self::wait) tells then; until a signal was handled; or until
    /// `timeout` is over (`None`: never). A batch that is not done runs on, its objects wait for it as before, and
    /// it can be waited for again.
    ///
    /// # Errors
    /// [`WaitError`]: it is not done.
    pub fn wait_interruptible(&self, timeout: Option<Duration>) -> Result<(), WaitError> {
        MaySleep::enter(|cx| self.job.wait_interruptible(cx, timeout))
    }

    fn here(&self, fault: Fault) -> Fault {
        let here = self
            .commands
            .get(fault.command)
            .and_then(|(here, there)| table::fault_address(here, there, fault.addr));
        Fault { addr: here.unwrap_or(fault.addr), ..fault }
    }
}

/// What the check before submission says.
enum Checked<T> {
    Stands(T),
    Moved,
}

impl<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static> Core<M, D> {
    pub(super) fn execute(
        self: &Arc<Self>,
        cx: &mut MaySleep<'_>,
        space: u64,
        list: &[u64],
        commands: &[Command],
    ) -> Result<Execution<D>, ObjectError> {
        if !self.at_home() {
            return Err(ObjectError::Forked);
        }
        commands.iter().try_for_each(Command::check)?;
        for _ in 0..ATTEMPTS {
            for object in list {
                self.get_pages(cx, *object)?;
            }
            let mut books = self.lock(cx);
            match check(&books, space, list, commands)? {
                Checked::Stands(there) => {
                    let job = Arc::new(Job::new());
                    attach(cx, &mut books, space, list, commands, &job);
                    drop(books);
                    return self.hand_over(cx, commands, there, job);
                }
                Checked::Moved => drop(books),
            }
            self.counters.retried.fetch_add(1, Ordering::Relaxed);
        }
        Err(ObjectError::Unsettled { attempts: ATTEMPTS })
    }

    fn hand_over(
        &self,
        cx: &mut MaySleep<'_>,
        commands: &[Command],
        there: Vec<Command>,
        job: JobOf<D>,
    ) -> Result<Execution<D>, ObjectError> {
        let unanswered = Unanswered(&job);
        // SAFETY: `check` has led each address into an object of the list, and the job is attached to them.
        let answer = unsafe { memory::submit(cx, &self.device, &there) };
        std::mem::forget(unanswered);
        match answer {
            Ok(fence) => {
                job.submitted(cx, Some(fence));
                let commands = commands.iter().copied().zip(there).collect();
                Ok(Execution { job, commands })
            }
            Err(error) => {
                job.submitted(cx, None);
                Err(error.into())
            }
        }
    }
}

/// A job whose engine has not answered. Dropped only if the engine panics, which means that it has not taken the batch.
struct Unanswered<'j, F: Fence>(&'j Job<F>);

impl<F: Fence> Drop for Unanswered<'_, F> {
    fn drop(&mut self) {
        let _ = MaySleep::try_enter(|cx| self.0.submitted(cx, None));
    }
}

/// submit_done: the commands as the engine will get them, if every object that is named is what it was.
fn check<M: PrimaryMmu, D: Device<M> + Engine>(
    books: &Books<M, D>,
    space: u64,
    list: &[u64],
    commands: &[Command],
) -> Result<Checked<Vec<Command>>, ObjectError> {
    let current = |object: &u64| {
        let backing = books.objects.get(object).and_then(|entry| entry.backing.as_ref());
        backing.is_some_and(Backing::is_current)
    };
    if !list.iter().all(current) {
        return Ok(Checked::Moved);
    }
    let table = books.spaces.get(&space);
    let relocated = |command: &Command| {
        table::relocate(command, |addr, len, access| {
            let reached = table.and_then(|table| table.reach(addr, len, access));
            let bus = reached.filter(|reached| list.contains(&reached.object)).and_then(|reached| {
                let backing = books.objects.get(&reached.object)?.backing.as_ref()?;
                Some(DeviceAddr(backing.remapped.bus + reached.offset))
            });
            bus.ok_or(ObjectError::NotBound { command: *command, addr, len, access })
        })
    };
    commands.iter().map(relocated).collect::<Result<_, _>>().map(Checked::Stands)
}

fn attach<M: PrimaryMmu, D: Device<M> + Engine>(
    cx: &mut MaySleep<'_>,
    books: &mut Books<M, D>,
    space: u64,
    list: &[u64],
    commands: &[Command],
    job: &JobOf<D>,
) {
    let Books { objects, spaces, .. } = books;
    for object in list {
        let Some(entry) = objects.get_mut(object) else { continue };
        entry.jobs.retain(|job| !job.is_done(cx));
        entry.jobs.push(Arc::clone(job));
    }
    let writes =
        commands.iter().flat_map(Command::spans).filter(|span| span.2 == Access::Write && span.1 != 0);
    for (addr, len, access) in writes {
        let reached = spaces.get(&space).and_then(|table| table.reach(addr, len, access));
        let backing = reached.and_then(|r| objects.get_mut(&r.object)).and_then(|e| e.backing.as_mut());
        if let Some(backing) = backing {
            backing.written = true;
        }
    }
}
