// SPDX-License-Identifier: MIT OR Apache-2.0
//! B is given the address while A is still in the system call that gave it up.

use std::time::Instant;

use interleave::{AtomicBool, AtomicU64, LockClass, MaySleep, Mutex, Ordering, scope, yield_now};
use mmu_notifier::{PAGE_SIZE, Range};

use super::{Outcome, RaceError, StopOnDrop, Subject, wait_for, with_hogs};

static HANDOVER: LockClass = LockClass::new("race_handover");

/// How A gives the page up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// munmap.
    Munmap,
    /// mremap to another address.
    Mremap,
}

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANON: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Races `rounds` times, with `hogs` threads besides that only burn CPU time.
///
/// # Errors
/// [`RaceError`] if the kernel or the subject refuses something; the rounds until then are lost.
pub fn reuse<S: Subject>(subject: &S, way: Way, rounds: u64, hogs: usize) -> Result<Outcome, RaceError> {
    let start = Instant::now();
    // The page that is raced for, and a place for A to move it to, out of the way of other mappings.
    let arena = map(0, 4 * PAGE_SIZE, libc::PROT_NONE, 0).ok_or_else(|| RaceError::last("mmap"))?;
    let page = Range::new(arena + PAGE_SIZE, PAGE_SIZE).map_err(|_| RaceError::last("mmap"))?;
    let away = arena + 3 * PAGE_SIZE;
    unmap(page.start());
    let race = Race {
        subject,
        page,
        token: Mutex::new(&HANDOVER, None),
        go: AtomicU64::new(0),
        done: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    };
    let stale = MaySleep::enter(|cx| {
        with_hogs(cx, hogs, |cx| {
            scope(cx, |scope, cx| {
                let b = scope.spawn("race-take-over", |cx| race.take_over(cx, rounds));
                let given_up = {
                    let _stop = StopOnDrop(&race.stop);
                    // Not all rounds only if B has panicked, which its join says.
                    (1..=rounds)
                        .map(|round| race.give_up(cx, round, way, away))
                        .find(|done| !matches!(done, Ok(true)))
                        .unwrap_or(Ok(true))
                };
                let stale = b.join(cx)?;
                given_up.map(|_| stale)
            })
        })
    });
    // SAFETY: the arena is ours, and nothing refers to it.
    unsafe { libc::munmap(arena as *mut libc::c_void, 4 * PAGE_SIZE as usize) };
    Ok(Outcome { rounds, lookups: rounds, stale: stale?, elapsed: start.elapsed() })
}

struct Race<'s, S: Subject> {
    subject: &'s S,
    page: Range,
    /// From A to B.
    token: Mutex<Option<S::Token>>,
    go: AtomicU64,
    done: AtomicU64,
    stop: AtomicBool,
}

impl<S: Subject> Race<'_, S> {
    /// Thread A. Whether B has answered.
    fn give_up(&self, cx: &mut MaySleep<'_>, round: u64, way: Way, away: u64) -> Result<bool, RaceError> {
        let addr = self.page.start();
        map(addr, PAGE_SIZE, RW, libc::MAP_FIXED_NOREPLACE).ok_or_else(|| RaceError::last("mmap"))?;
        stamp(addr, round);
        let token = self.subject.take(self.page);
        let token = token.map_err(|why| RaceError::Refused { range: self.page, why })?;
        *self.token.lock(cx) = Some(token);
        self.go.store(round, Ordering::Release);
        match way {
            Way::Munmap => unmap(addr),
            Way::Mremap => {
                let (len, flags) = (PAGE_SIZE as usize, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
                // SAFETY: both pages are in the arena of this race, and nothing refers to them.
                let to = unsafe { libc::mremap(addr as *mut libc::c_void, len, len, flags, away) };
                if to == libc::MAP_FAILED {
                    return Err(RaceError::last("mremap"));
                }
            }
        }
        Ok(wait_for(&self.done, round, &self.stop))
    }

    /// Thread B: how many stale hits.
    fn take_over(&self, cx: &mut MaySleep<'_>, rounds: u64) -> u64 {
        // Also when it panics: A would wait for it for ever.
        let _stop = StopOnDrop(&self.stop);
        let mut stale = 0;
        for round in 1..=rounds {
            if !wait_for(&self.go, round, &self.stop) {
                break;
            }
            let token = self.token.lock(cx).take();
            let addr = self.page.start();
            let mut tries = 0;
            while map(addr, PAGE_SIZE, RW, libc::MAP_FIXED_NOREPLACE).is_none() {
                if self.stop.load(Ordering::Relaxed) {
                    return stale;
                }
                tries += 1;
                // Far more than fit into A's system call: A does not run.
                if tries % 1000 == 0 {
                    yield_now();
                }
            }
            // From here on the address is ours, whatever A is doing.
            stale += u64::from(token.as_ref().is_some_and(|t| self.subject.is_current(t)));
            stamp(addr, u64::MAX);
            drop(token);
            unmap(addr);
            self.done.store(round, Ordering::Release);
        }
        stale
    }
}

fn map(addr: u64, len: u64, prot: libc::c_int, flags: libc::c_int) -> Option<u64> {
    // SAFETY: without MAP_FIXED no existing mapping is touched.
    let at = unsafe { libc::mmap(addr as *mut libc::c_void, len as usize, prot, ANON | flags, -1, 0) };
    (at != libc::MAP_FAILED).then(|| at.addr() as u64)
}

fn unmap(addr: u64) {
    // SAFETY: a page of the arena of this race, and nothing refers to it.
    unsafe { libc::munmap(addr as *mut libc::c_void, PAGE_SIZE as usize) };
}

fn stamp(addr: u64, value: u64) {
    // SAFETY: a writable page of the arena that this thread has just mapped.
    unsafe { (addr as *mut u64).write_volatile(value) };
}
