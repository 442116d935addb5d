// SPDX-License-Identifier: MIT OR Apache-2.0
//! The monitor allocates and frees nothing: under an allocator that aborts when it does.

#[macro_use]
mod uffd_support;

use hostmm::testing::Guarded;
use uffd_support::*;

#[global_allocator]
static ALLOCATOR: Guarded = Guarded;

live!(the_monitor_neither_allocates_nor_frees, || {
    let source = open();
    Guarded::forbid(source.monitor_tid().cast_unsigned());
    with_threads(4, || {
        for _ in 0..500 {
            let r = anon(8);
            let watch = source.watch_with(r, |change| drop(format!("{change:?}"))).unwrap();
            let half = source.watch(part(r, 2, 3)).unwrap();
            let seq = watch.snapshot().unwrap();
            madvise(r, libc::MADV_DONTNEED).unwrap();
            assert!(half.changed_since_strict(seq));
            drop(half);
            let to = mremap(part(r, 0, 4), 4 * PAGE, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, 0);
            unmap(r);
            unmap(mmu_notifier::Range::new(to.unwrap(), 4 * PAGE).unwrap());
            assert!(watch.changed_since_ordered(seq));
        }
    });
    let stats = source.stats();
    assert!(stats.unmaps >= 2000 && stats.removes >= 2000 && stats.remaps >= 2000, "{stats:?}");
    Guarded::allow();
});

live!(the_allocator_under_test_does_abort, || {
    let aborts = || {
        // SAFETY: the child of this test forks to see itself abort.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            Guarded::forbid(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned());
            drop(std::hint::black_box(Box::new(1)));
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: waits for our own child.
        unsafe { libc::waitpid(pid, &mut status, 0) };
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT
    };
    assert!(aborts());
});
