// SPDX-License-Identifier: MIT OR Apache-2.0
//! A correct program: every thread allocates a buffer, looks it up in a cache that all share, and frees it.

use std::collections::HashMap;
use std::time::Instant;

use interleave::{AtomicU64, LockClass, MaySleep, Mutex, Ordering, scope};
use mmu_notifier::Range;

use super::{Outcome, RaceError, Subject};

static CACHE: LockClass = LockClass::new("race_cache");

/// Above the threshold from which malloc maps each buffer for itself, and free unmaps it.
const BYTES: usize = 256 << 10;

/// Runs `rounds` rounds, spread over `threads` threads.
///
/// Sets malloc's M_MMAP_THRESHOLD to 128 KiB for the whole process, for good: otherwise glibc raises it after the
/// first free, and then buffers are reused without being unmapped. A chunk of the heap that happens to be large enough
/// is put aside: what is reused without being unmapped is not stale. Written for glibc's malloc; with another
/// allocator there are no lookups.
///
/// # Errors
/// [`RaceError`] if the subject refuses a buffer.
pub fn churn<S: Subject>(subject: &S, threads: usize, rounds: u64) -> Result<Outcome, RaceError> {
    // SAFETY: mallopt may be called at any time.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10) };
    let start = Instant::now();
    let shared = Churn {
        subject,
        cache: Mutex::new(&CACHE, HashMap::new()),
        stamps: AtomicU64::new(0),
        rounds,
        lookups: AtomicU64::new(0),
        stale: AtomicU64::new(0),
    };
    MaySleep::enter(|cx| {
        scope(cx, |scope, cx| {
            let threads: Vec<_> =
                (0..threads).map(|_| scope.spawn("race-churn", |cx| shared.run(cx))).collect();
            // All of them, also after an error: the scope panics over a thread that panicked and was not joined.
            let ends: Vec<_> = threads.into_iter().map(|thread| thread.join(cx)).collect();
            ends.into_iter().try_for_each(|end| end?)
        })
    })?;
    Ok(Outcome {
        rounds,
        lookups: shared.lookups.into_inner(),
        stale: shared.stale.into_inner(),
        elapsed: start.elapsed(),
    })
}

/// Is the chunk a mapping of its own? glibc's are page aligned, but for a header of 16 bytes with the bit IS_MMAPPED.
fn is_unmapped_by_free(buffer: *mut libc::c_void) -> bool {
    const IS_MMAPPED: usize = 2;
    // The word lies before what the compiler knows as the allocation, so its address is made from a number.
    let size = std::ptr::with_exposed_provenance::<usize>(buffer.expose_provenance().wrapping_sub(8));
    // SAFETY: the size word of a chunk of malloc; at that offset it is in the page that the buffer begins in.
    buffer.addr() % 4096 == 16 && unsafe { std::hint::black_box(size).read_volatile() } & IS_MMAPPED != 0
}

/// Chunks that malloc must not hand out again.
struct Aside(Vec<*mut libc::c_void>);

impl Drop for Aside {
    fn drop(&mut self) {
        for chunk in self.0.drain(..) {
            // SAFETY: from malloc, and freed once.
            unsafe { libc::free(chunk) };
        }
    }
}

struct Entry<T> {
    stamp: u64,
    token: T,
}

struct Churn<'s, S: Subject> {
    subject: &'s S,
    /// The cache by the address of the buffer. Never held across malloc's munmap: tokens are dropped outside.
    cache: Mutex<HashMap<u64, Entry<S::Token>>>,
    stamps: AtomicU64,
    rounds: u64,
    lookups: AtomicU64,
    stale: AtomicU64,
}

impl<S: Subject> Churn<'_, S> {
    fn run(&self, cx: &mut MaySleep<'_>) -> Result<(), RaceError> {
        let mut aside = Aside(Vec::new());
        loop {
            // Each buffer has a stamp of its own, so one that was cached under another stamp is another buffer.
            let stamp = self.stamps.fetch_add(1, Ordering::Relaxed) + 1;
            if stamp > self.rounds {
                return Ok(());
            }
            // SAFETY: freed below, and used within its size.
            let buffer = unsafe { libc::malloc(BYTES) };
            if buffer.is_null() {
                return Err(RaceError::last("malloc"));
            }
            if !is_unmapped_by_free(buffer) {
                aside.0.push(buffer);
                continue;
            }
            // SAFETY: as above; malloc aligns to 16 bytes.
            unsafe { buffer.cast::<u64>().write_volatile(stamp) };
            let got = self.get(cx, buffer.addr() as u64, stamp);
            // SAFETY: from malloc, and freed once.
            unsafe { libc::free(buffer) };
            got?;
        }
    }

    /// What a program does before it hands the buffer to a device.
    fn get(&self, cx: &mut MaySleep<'_>, addr: u64, stamp: u64) -> Result<(), RaceError> {
        let old = {
            let mut cache = self.cache.lock(cx);
            match cache.get(&addr) {
                Some(entry) if self.subject.is_current(&entry.token) => {
                    let stale = entry.stamp != stamp;
                    self.lookups.fetch_add(1, Ordering::Relaxed);
                    self.stale.fetch_add(u64::from(stale), Ordering::Relaxed);
                    return Ok(());
                }
                Some(_) => {
                    self.lookups.fetch_add(1, Ordering::Relaxed);
                    cache.remove(&addr)
                }
                None => None,
            }
        };
        drop(old);
        let Ok(range) = Range::enclosing(addr, BYTES as u64) else { return Ok(()) };
        let token = self.subject.take(range).map_err(|why| RaceError::Refused { range, why })?;
        let old = self.cache.lock(cx).insert(addr, Entry { stamp, token });
        drop(old);
        Ok(())
    }
}
