// SPDX-License-Identifier: MIT OR Apache-2.0
//! A second thread that looks at the watched page all the time and speaks up at the first sight of the change.
//!
//! With it a caller checks that a source had reported *before another thread could see the new bytes*: the hook runs
//! on the observing thread right after the read that saw them.
//!
//! A read is a `process_vm_writev` from the watched page to a word of our own, in this very process: the kernel loads
//! from the page as the CPU would, with the program's rights, and a fault is an answer and not a signal. The other
//! way round, `process_vm_readv`, would not do: it takes a pin on the watched page, and a pin parts a page that is
//! shared by fork or KSM. `/proc/self/mem` would not do either: it reads what the program may not.
//! Reads still fault pages in, so do not observe a change that cannot be seen
//! ([`Scene::is_visible`](super::Scene::is_visible)).
//!
//! Order: the stop flag is only a request; the sighting travels through the join of the thread.

use interleave::{AtomicBool, MaySleep, Ordering, scope, yield_now};
use mmu_notifier::Range;

/// What the observer saw first that was not the old content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sighting {
    /// Another number at the start of the page.
    Stamp(u64),
    /// The read faulted.
    Fault,
}

/// A thread's view of one page.
#[derive(Debug, Clone, Copy)]
pub struct Observer {
    addr: u64,
    before: u64,
}

impl Observer {
    /// Look at the first page of `watched`, which holds `before` now.
    #[must_use]
    pub const fn new(watched: Range, before: u64) -> Observer {
        Observer { addr: watched.start(), before }
    }

    /// One look, safe whatever is mapped there.
    #[must_use]
    pub fn look(&self) -> Sighting {
        let mut word = 0_u64;
        let from = libc::iovec { iov_base: self.addr as *mut libc::c_void, iov_len: 8 };
        let to = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
        // SAFETY: the kernel reads eight bytes at the address, which it checks itself, and writes them to `word`.
        let got = unsafe { libc::process_vm_writev(libc::getpid(), &raw const from, 1, &raw const to, 1, 0) };
        if got == 8 { Sighting::Stamp(word) } else { Sighting::Fault }
    }

    /// Run `change` on this thread while another one looks; `seen` runs on that one at the first sight of anything
    /// but the old content.
    ///
    /// Returns what `change` returned and what was seen: `None` if the old content was all there was to see up to
    /// the return of `change`. `change` starts only after the observer has had its first look. Sleeps until both
    /// threads are done.
    ///
    /// # Panics
    /// As `seen` or `change` does; and if the system refuses a thread.
    pub fn during<T>(
        &self,
        seen: &(dyn Fn(Sighting) + Sync),
        change: impl FnOnce() -> T,
    ) -> (T, Option<Sighting>) {
        let (ready, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        let watch = || {
            loop {
                // Read before the look: one more look after the change is over finds what it left.
                let last = stop.load(Ordering::Acquire);
                let sight = self.look();
                if sight != Sighting::Stamp(self.before) {
                    seen(sight);
                    ready.store(true, Ordering::Release);
                    return Some(sight);
                }
                ready.store(true, Ordering::Release);
                if last {
                    return None;
                }
            }
        };
        MaySleep::enter(|cx| {
            scope(cx, |threads, cx| {
                let observing = threads.spawn("observer", |_| {
                    // Also when `seen` panics: the other thread waits for it.
                    let _ready = SetOnDrop(&ready);
                    watch()
                });
                while !ready.load(Ordering::Acquire) {
                    yield_now();
                }
                // Also when `change` panics: the scope waits for the observer.
                let stopper = SetOnDrop(&stop);
                let result = change();
                drop(stopper);
                let sight = observing.join(cx).unwrap_or_else(|p| std::panic::resume_unwind(p.payload));
                (result, sight)
            })
        })
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
