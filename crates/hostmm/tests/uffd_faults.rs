// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the `uffd` source does when something is missing, breaks or is in the way: an error or a closed door, never a
//! hang and never a stale answer.

#[macro_use]
mod uffd_support;

use std::sync::{Arc, mpsc};

use hostmm::uffd::{Fault, Gone, OpenError, Options, UffdSource, WatchError};
use interleave::{AtomicBool, AtomicU64, LockClass, MaySleep, Mutex, Ordering};
use mmu_notifier::Range;
use uffd_support::*;

static APPLICATION: LockClass = LockClass::new("application");

/// Forks; the child runs `body` and must return true within the deadline of the test.
fn in_forked_child(body: impl FnOnce() -> bool, raw: bool) {
    // SAFETY: the child uses what it inherited, ends with _exit and returns to nobody.
    let pid = unsafe {
        if raw { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32 } else { libc::fork() }
    };
    assert!(pid >= 0);
    if pid == 0 {
        let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(false);
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(if ok { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "the child failed");
}

/// Every door is closed, and nobody who changes watched memory waits.
fn is_closed(source: &UffdSource, watch: &hostmm::uffd::Watch, seq: hostmm::uffd::Seq) {
    assert!(watch.changed_since_ordered(seq) && watch.changed_since_strict(seq));
    assert_eq!(watch.snapshot(), Err(Gone::Closed));
    assert_eq!(source.probe().map(drop), Err(Gone::Closed));
    assert!(matches!(source.watch(anon(1)), Err(WatchError::Gone(Gone::Closed))));
}

live!(a_monitor_that_ends_frees_unmappers_and_closes_every_handle, || {
    for fault in [Fault::Return, Fault::Panic] {
        let source = open();
        let (r, other) = (anon(4), anon(4));
        let (tx, rx) = mpsc::channel();
        let watch = source.watch_with(r, move |change| tx.send(*change).unwrap()).unwrap();
        let seq = watch.snapshot().unwrap();
        source.inject(fault);
        // Races with the end of the monitor on purpose: whichever comes first, munmap returns.
        unmap(part(r, 0, 1));
        assert!(eventually(|| watch.snapshot() == Err(Gone::Closed)));
        is_closed(&source, &watch, seq);
        unmap(r);
        let told = rx.recv_timeout(SOON).unwrap();
        assert!(told.lost || told.unmapped, "{told:?}");
        // The descriptor is really gone: another can have the memory.
        let again = open();
        again.watch(other).unwrap();
    }
});

live!(a_forked_child_that_keeps_the_descriptor_hangs_nobody, || {
    let source = open();
    let r = anon(4);
    let watch = source.watch(r).unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    // SAFETY: the child only closes and reads, then ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        drop(write);
        let _ = rustix::io::read(&read, &mut [0u8; 1]);
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(0) };
    }
    source.inject(Fault::Return);
    assert!(eventually(|| watch.snapshot() == Err(Gone::Closed)));
    unmap(r);
    drop(write);
});

live!(a_descriptor_closed_behind_its_back_is_not_missed, || {
    let source = open();
    let r = anon(4);
    let watch = source.watch(r).unwrap();
    let seq = watch.snapshot().unwrap();
    // As daemons do that close all descriptors. Something else takes the number.
    let devnull = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: the test takes the descriptor away on purpose.
    unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&devnull), source.raw_fd()) };
    assert!(watch.changed_since_strict(seq), "the probe is not answered by a userfaultfd");
    assert!(matches!(source.watch(anon(1)), Err(WatchError::Gone(Gone::Closed))));
    assert_eq!(source.probe().map(drop), Err(Gone::Closed));
    assert!(!watch.changed_since_ordered(seq), "the monitor still hears");
    unmap(part(r, 0, 1));
    assert!(watch.changed_since_ordered(seq));
    source.inject(Fault::Return);
    assert!(eventually(|| watch.snapshot() == Err(Gone::Closed)));
    unmap(r);
    is_closed(&source, &watch, seq);
    let mut byte = [0u8];
    // SAFETY: reads into one byte; the number is the test's own file now.
    let read = unsafe { libc::read(source.raw_fd(), byte.as_mut_ptr().cast(), 1) };
    assert_eq!(read, 0, "the stranger's file was left alone");
});

live!(forked_children_refuse_and_may_unmap, || {
    for raw in [false, true] {
        let source = open();
        let r = anon(4);
        let (tx, rx) = mpsc::channel();
        let watch = source.watch_with(r, move |change| tx.send(*change).unwrap()).unwrap();
        let seq = watch.snapshot().unwrap();
        in_forked_child(
            || {
                let refuses = watch.changed_since_ordered(seq)
                    && watch.changed_since_strict(seq)
                    && watch.snapshot() == Err(Gone::Forked)
                    && source.probe().map(drop) == Err(Gone::Forked)
                    && matches!(source.watch(r), Err(WatchError::Gone(Gone::Forked)));
                unmap(part(r, 0, 2));
                // SAFETY: copies of the parent's handles; the parent's own are untouched.
                let (watch, source) = unsafe { (std::ptr::read(&watch), std::ptr::read(&source)) };
                drop(watch);
                drop(source);
                refuses
            },
            raw,
        );
        // The child's drop took nothing away from the parent.
        assert!(!watch.changed_since_strict(seq));
        unmap(part(r, 0, 1));
        assert!(watch.changed_since_ordered(seq));
        assert!(rx.recv_timeout(SOON).unwrap().unmapped);
    }
});

live!(lost_events_kill_everything_and_are_counted, || {
    let source = open();
    let watches: Vec<_> = (0..100).map(|_| source.watch(anon(1)).unwrap()).collect();
    let seqs: Vec<_> = watches.iter().map(|w| w.snapshot().unwrap()).collect();
    source.inject(Fault::Lose);
    assert!(eventually(|| source.stats().lost == 1));
    for (watch, seq) in watches.iter().zip(seqs) {
        assert!(watch.changed_since_strict(seq) && watch.snapshot() == Err(Gone::Unmapped));
    }
    // It goes on.
    let r = anon(1);
    let watch = source.watch(r).unwrap();
    let seq = watch.snapshot().unwrap();
    unmap(r);
    assert!(watch.changed_since_ordered(seq));
});

live!(a_full_batch_is_counted_and_loses_nothing, || {
    let source = UffdSource::open(&Options { batch: 1, ..Options::default() }).unwrap();
    with_threads(8, || {
        for _ in 0..200 {
            let r = anon(2);
            let watch = source.watch(r).unwrap();
            let seq = watch.snapshot().unwrap();
            assert!(!watch.changed_since_strict(seq));
            unmap(r);
            assert!(watch.changed_since_ordered(seq));
        }
    });
    let stats = source.stats();
    assert!(stats.full_batches > 0 && stats.lost == 0 && stats.unmaps >= 1600, "{stats:?}");
});

static TICKS: AtomicU64 = AtomicU64::const_new(0);

extern "C" fn on_alarm(_signal: libc::c_int) {
    TICKS.fetch_add(1, Ordering::Relaxed);
}

live!(a_storm_of_signals_changes_nothing, || {
    // SAFETY: the handler only adds to an atomic; the timer is this process's own.
    unsafe {
        libc::signal(libc::SIGALRM, on_alarm as *const () as libc::sighandler_t);
        let every = libc::timeval { tv_sec: 0, tv_usec: 1000 };
        let timer = libc::itimerval { it_interval: every, it_value: every };
        libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut());
    }
    let source = open();
    while TICKS.load(Ordering::Relaxed) < 500 {
        let r = anon(4);
        let watch = source.watch(r).unwrap();
        let seq = watch.snapshot().unwrap();
        assert!(!watch.changed_since_strict(seq));
        unmap(r);
        assert!(watch.changed_since_ordered(seq));
    }
    assert_eq!(source.stats().lost, 0);
});

live!(another_userfaultfd_has_the_pages, || {
    let (mine, other) = (open(), open());
    let r = anon(4);
    let theirs = other.watch(part(r, 1, 1)).unwrap();
    let seq = theirs.snapshot().unwrap();
    assert!(matches!(mine.watch(r), Err(WatchError::Busy { range }) if range == r));
    // Being refused took nothing from its owner, and left nothing behind.
    madvise(part(r, 1, 1), libc::MADV_DONTNEED).unwrap();
    assert!(theirs.changed_since_ordered(seq));
    drop(theirs);
    other.watch(r).unwrap();
});

live!(bad_ranges_are_refused_and_leave_nothing, || {
    let source = open();
    let r = anon(8);
    unmap(part(r, 5, 1));
    let error = source.watch(r).unwrap_err();
    assert!(matches!(error, WatchError::Hole { at, .. } if at == r.start() + 5 * PAGE), "{error}");
    unmap(r);
    assert!(matches!(source.watch(r), Err(WatchError::Hole { at, .. }) if at == r.start()));
    // SAFETY: asks for a number.
    let vdso = Range::enclosing(unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) }, 1).unwrap();
    assert!(matches!(source.watch(vdso), Err(WatchError::Unsupported { .. })));
    // Several mappings side by side are one range.
    let r = anon(6);
    call(libc::SYS_mprotect, [r.start() + PAGE, PAGE, libc::PROT_READ as u64, 0, 0, 0]).unwrap();
    let watch = source.watch(r).unwrap();
    let seq = watch.snapshot().unwrap();
    unmap(part(r, 5, 1));
    assert!(watch.changed_since_ordered(seq));
});

live!(the_vma_budget_is_kept_and_heals, || {
    let source = UffdSource::open(&Options { vma_budget: Some(100), ..Options::default() }).unwrap();
    let r = map_at(0, 400 * PAGE, RW, ANON, -1).unwrap();
    let mut watches: Vec<_> = (0..50).map(|i| source.watch(part(r, 2 * i, 1)).unwrap()).collect();
    assert!(matches!(source.watch(part(r, 200, 1)), Err(WatchError::VmaBudget { budget: 100, .. })));
    // What closes a gap costs nothing.
    watches.push(source.watch(part(r, 1, 1)).unwrap());
    watches.clear();
    source.watch(part(r, 200, 1)).unwrap();
});

live!(a_refused_system_call_is_explained, || {
    in_forked_child(
        || {
            refuse_userfaultfd(libc::EPERM);
            // SAFETY: gives up the rights to open the device; root of this child only.
            unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            let error = UffdSource::open(&Options::default()).unwrap_err();
            matches!(error, OpenError::NotPermitted { .. }) && error.to_string().contains("seccomp")
        },
        false,
    );
    in_forked_child(
        || {
            refuse_userfaultfd(libc::ENOSYS);
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            matches!(UffdSource::open(&Options::default()).unwrap_err(), OpenError::NotSupported)
        },
        false,
    );
    if std::path::Path::new("/dev/userfaultfd").exists() {
        in_forked_child(
            || {
                refuse_userfaultfd(libc::EPERM);
                UffdSource::open(&Options::default()).is_ok()
            },
            false,
        );
    }
});

live!(an_unprivileged_user_can_open_it, || {
    in_forked_child(
        || {
            // SAFETY: gives up the rights of this child.
            unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            let source = open();
            let r = anon(1);
            let watch = source.watch(r).unwrap();
            let seq = watch.snapshot().unwrap();
            unmap(r);
            watch.changed_since_ordered(seq)
        },
        false,
    );
});

/// A seccomp filter that answers userfaultfd(2) with `errno`.
fn refuse_userfaultfd(errno: i32) {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load_number = op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0);
    let is_it = op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_userfaultfd as u32);
    let ret = libc::BPF_RET | libc::BPF_K;
    let refuse = op(ret, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32);
    let mut filter = [load_number, is_it, refuse, op(ret, 0, 0, libc::SECCOMP_RET_ALLOW)];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

live!(callbacks_may_want_a_lock_that_an_unmapper_holds, || {
    let source = open();
    let lock = Arc::new(Mutex::new(&APPLICATION, 0u32));
    let (r, other) = (anon(8), anon(1));
    let (inner, called) = (Arc::clone(&lock), Arc::new(AtomicU64::new(0)));
    let count = Arc::clone(&called);
    let watch = source
        .watch_with(r, move |_| {
            MaySleep::enter(|cx| *inner.lock(cx) += 1);
            drop(vec![0u8; 4 << 20]);
            if count.fetch_add(1, Ordering::SeqCst) == 0 {
                unmap(other);
            }
        })
        .unwrap();
    let also = source.watch(other).unwrap();
    let seq = also.snapshot().unwrap();
    for i in 0..8 {
        MaySleep::enter(|cx| {
            let _held = lock.lock(cx);
            unmap(part(r, i, 1));
        });
    }
    assert!(eventually(|| called.load(Ordering::SeqCst) > 0 && also.changed_since_strict(seq)));
    drop(watch);
});

// A program that would hang one day is told on the first day.
live!(dropping_a_watch_under_a_lock_of_its_callback_is_reported, || {
    let source = open();
    let lock = Arc::new(Mutex::new(&APPLICATION, 0u32));
    let (inner, r) = (Arc::clone(&lock), anon(1));
    let watch = source.watch_with(r, move |_| MaySleep::enter(|cx| *inner.lock(cx) += 1)).unwrap();
    unmap(r);
    assert!(eventually(|| MaySleep::enter(|cx| *lock.lock(cx)) == 1));
    assert!(interleave::lockdep::take_reports().is_empty());
    MaySleep::enter(|cx| {
        let _held = lock.lock(cx);
        drop(watch);
    });
    let reports = interleave::lockdep::take_reports();
    assert!(reports.iter().any(|r| r.to_string().contains("uffd_callback")), "{reports:?}");
});

live!(a_callback_may_drop_its_own_watch_and_panic, || {
    let source = open();
    let r = anon(1);
    let slot = Arc::new(Mutex::new(&APPLICATION, None));
    let (inner, done) = (Arc::clone(&slot), Arc::new(AtomicBool::new(false)));
    let flag = Arc::clone(&done);
    let watch = source.watch_with(r, move |_| {
        drop(MaySleep::enter(|cx| inner.lock(cx).take()));
        flag.store(true, Ordering::SeqCst);
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    MaySleep::enter(|cx| *slot.lock(cx) = Some(watch.unwrap()));
    unmap(r);
    assert!(eventually(|| done.load(Ordering::SeqCst) && source.stats().callback_panics == 1));
    assert!(eventually(|| Arc::strong_count(&done) == 1), "the closure is dropped");
    let r = anon(1);
    let watch = source.watch(r).unwrap();
    drop(source);
    let seq = watch.snapshot().unwrap();
    unmap(r);
    assert!(watch.changed_since_ordered(seq), "a watch keeps its source alive");
});

live!(the_monitor_holds_no_file_of_the_application, || {
    let (read, write) = rustix::pipe::pipe().unwrap();
    let source = open();
    drop(write);
    assert_eq!(rustix::io::read(&read, &mut [0u8; 1]), Ok(0), "the last writer is gone");
    drop(source);
});

live!(sources_and_watches_leave_nothing_behind, || {
    let count = |dir| std::fs::read_dir(dir).unwrap().count();
    let before = (count("/proc/self/fd"), count("/proc/self/task"));
    let r = anon(64);
    for _ in 0..20 {
        let source = open();
        let watches: Vec<_> = (0..500).map(|i| source.watch(part(r, i % 64, 1)).unwrap()).collect();
        drop(source);
        drop(watches);
        unmap(anon(1));
    }
    assert!(eventually(|| (count("/proc/self/fd"), count("/proc/self/task")) == before));
});
