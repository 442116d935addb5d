// SPDX-License-Identifier: MIT OR Apache-2.0
//! Failure modes of registration caches, by the number that docs/failure-modes.md has for them: children of every kind.

mod common;

use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;

use common::memory::{Memory, in_fork, memfd};
use common::{DEADLINE, cache, get, has, kvm_source, over_both, see, uffd_source};
use hostmm::capability::Capability;
use hostmm::primary::{HostMm, Source};
use hostmm::testing;
use mmu_notifier::Access;
use userptr::CacheError;
use userptr::cache::{Options, RegistrationCache};
use userptr::device::io_uring::IoUring;

#[test]
fn b6_12_a_forked_child_is_refused_and_its_parent_stays_right() {
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options::default());
        let memory = Memory::stamped(2, 1);
        let held = get(&cache, memory.page(0)).unwrap();
        for _ in 0..20 {
            drop(get(&cache, memory.page(1)).unwrap());
            let refused = in_fork(|| {
                let all = matches!(get(&cache, memory.0), Err(CacheError::Forked))
                    && matches!(
                        cache
                            .session()
                            .and_then(|s| s.get(memory.0.start() as usize, 1, Access::Read))
                            .map(drop),
                        Err(CacheError::Forked)
                    )
                    && matches!(cache.reap(), Err(CacheError::Forked))
                    && cache.lookup(memory.0.start() as usize, 1, Access::Read).is_none()
                    && cache.device().write_at(&std::io::stdout(), 0, &held).is_err();
                // Its copy of the memory is not listened to: this must not wait for anybody.
                memory.unmap_here();
                all
            });
            assert!(refused);
            memory.fill(9);
            assert_eq!(see(&cache, &held), 9, "fork copies a pinned page for the child");
            assert_eq!(see(&cache, &get(&cache, memory.page(1)).unwrap()), 9);
        }
    }
    over_both(
        "b6_12_a_forked_child_is_refused_and_its_parent_stays_right",
        || body(kvm_source()),
        || body(uffd_source()),
    );
}

/// A child that clone(2) makes with `flags`, which runs `body` and leaves; its status.
fn cloned(flags: i32, body: extern "C" fn(*mut libc::c_void) -> i32, arg: *mut libc::c_void) -> i32 {
    let mut stack = vec![0_u128; 1 << 14];
    // SAFETY: the child runs on the stack above, of which clone takes the end, until it has left; the parent waits.
    unsafe {
        let top = stack.as_mut_ptr().add(stack.len()).cast();
        let pid = libc::clone(body, top, flags | libc::SIGCHLD, arg);
        assert!(pid > 0, "{}", std::io::Error::last_os_error());
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        status
    }
}

/// Gives up the first page of the range that `arg` names, as a child with an mm of its own may.
extern "C" fn unmaps(arg: *mut libc::c_void) -> i32 {
    // SAFETY: the address of a page of the test's; no reference to it exists.
    unsafe { libc::munmap(arg, 4096) }
}

/// Lets go of the first page without unmapping it: of its parent's, with which it shares the mm.
extern "C" fn discards(arg: *mut libc::c_void) -> i32 {
    // SAFETY: as above.
    unsafe { libc::madvise(arg, 4096, libc::MADV_DONTNEED) }
}

#[test]
fn b6_12_children_that_the_libraries_do_not_see() {
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options::default());
        let memory = Memory::stamped(2, 1);
        let at = memory.0.start() as *mut libc::c_void;
        for value in (2..30).step_by(4) {
            let held = get(&cache, memory.page(1)).unwrap();
            drop(get(&cache, memory.page(0)).unwrap());
            // Each goes on with this memory only until it has executed something, or left.
            assert!(Command::new("/bin/true").status().unwrap().success(), "posix_spawn");
            assert_eq!(cloned(0, unmaps, at), 0, "its own copy: heard by nobody, and waits for nobody");
            memory.fill(value);
            assert_eq!(see(&cache, &held), value);
            assert_eq!(see(&cache, &get(&cache, memory.page(0)).unwrap()), value);
            // The parent's memory, changed by a process that is not the parent.
            assert_eq!(cloned(libc::CLONE_VM | libc::CLONE_VFORK, discards, at), 0);
            memory.fill(value + 1);
            assert_eq!(see(&cache, &get(&cache, memory.page(0)).unwrap()), value + 1);
        }
    }
    over_both("b6_12_children_that_the_libraries_do_not_see", || body(kvm_source()), || body(uffd_source()));
}

#[test]
fn b6_41_a_ring_of_the_parent_in_a_child() {
    if !has(&[Capability::IoUring, Capability::Userfaultfd]) {
        return;
    }
    testing::in_child("b6_41_a_ring_of_the_parent_in_a_child", DEADLINE, || {
        let device = IoUring::new(4).unwrap();
        let file = memfd();
        let memory = Memory::stamped(1, 3);
        let refused = in_fork(|| {
            // A cache of the child's own, over the ring of its parent.
            let mm = Arc::new(HostMm::new(uffd_source(), 1).unwrap());
            let cache = RegistrationCache::new(mm, device, Options::default()).unwrap();
            let lease = get(&cache, memory.0).map(drop);
            let scope = cache.device().scope(|_| ());
            let _ = file.as_fd();
            matches!(lease, Err(CacheError::Device(_))) && scope.is_err()
        });
        assert!(refused);
    });
}
