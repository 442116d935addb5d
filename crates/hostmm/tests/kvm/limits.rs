// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is missing is named, and nothing is left behind.

use crate::memory::{Memory, PAGE};
use crate::{live, live_both};
use hostmm::capability::Capability;
use hostmm::kvm::{Buckets, KvmSource, OpenError, Options, Prefer};
use hostmm::pin::Pinner;
use hostmm::testing;
use interleave::{AtomicBool, Ordering};

fn refusal(options: &Options) -> OpenError {
    KvmSource::open(options).expect_err("must be refused")
}

#[test]
fn no_device() {
    live_both("limits::no_device", |prefer| {
        let options = Options { prefer, kvm_path: "/dev/no-such-kvm".into(), ..Options::default() };
        let e = refusal(&options);
        assert!(matches!(e, OpenError::Kvm { .. }), "{e}");
        assert!(e.to_string().contains("load kvm_intel or kvm_amd"), "{e}");
        let e = refusal(&Options { prefer, kvm_path: "/dev/null".into(), ..Options::default() });
        assert!(e.to_string().contains("not KVM"), "{e}");
        let e = refusal(&Options { prefer, kvm_path: "/dev/\0".into(), ..Options::default() });
        assert!(matches!(e, OpenError::Kvm { .. }), "{e}");
    });
}

#[test]
fn no_privilege() {
    live_both("limits::no_privilege", |prefer| {
        testing::become_nobody();
        let e = refusal(&Options { prefer, ..Options::default() });
        // /dev/kvm may be open to all; then tracefs or bpf(2) is what refuses.
        let text = e.to_string();
        assert!(text.contains("Grant") || text.contains("CAP_"), "{text}");
    });
}

#[test]
fn odd_options() {
    live("limits::odd_options", || {
        let base = Options { prefer: Prefer::Any, ..Options::default() };
        for options in [
            Options { ring: Some(0), ..base.clone() },
            Options { ring: Some(5000), ..base.clone() },
            Options { buckets: Some(Buckets { count: 3, ..Buckets::default() }), ..base.clone() },
            Options { prefer: Prefer::PerfRing, age: true, ..base.clone() },
            Options { prefer: Prefer::PerfRing, ring: Some(0), ..base },
        ] {
            assert!(matches!(refusal(&options), OpenError::Options(_)), "{options:?}");
        }
    });
}

/// The kernel takes a ring apart in the thread that had it, at a moment of its own, and has it leave what it is at for that.
#[test]
fn opens_while_rings_of_io_uring_go() {
    if !testing::require(Capability::IoUring) {
        return;
    }
    live("limits::opens_while_rings_of_io_uring_go", || {
        for _ in 0..30 {
            drop(Pinner::new(1).unwrap());
            crate::open(Prefer::Bpf);
        }
    });
}

#[test]
fn nothing_is_left_behind() {
    live_both("limits::nothing_is_left_behind", |prefer| {
        let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let kept = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.lines()
                .filter(|l| l.contains("kvm") || l.contains("bpf") || l.contains("perf_event"))
                .count()
        };
        let tasks = || std::fs::read_dir("/proc/self/task").unwrap().count();
        let before = (fds(), kept(), tasks());
        for ring in [None, Some(1 << 16)] {
            let source = KvmSource::open(&Options { prefer, ring, ..Options::default() }).unwrap();
            let programs = usize::from(prefer == Prefer::Bpf);
            assert_eq!(fds() - before.0, programs, "only the program's descriptor stays open");
            source.close();
            // A joined thread leaves /proc a moment after it has left the mm.
            while tasks() != before.2 {
                interleave::yield_now();
            }
            assert_eq!((fds(), kept(), tasks()), before);
        }
    });
}

/// Its ring is full of others' records time and again while the canary is listened for.
#[test]
fn opens_while_memory_changes_all_the_time() {
    live_both("limits::opens_while_memory_changes_all_the_time", |prefer| {
        let _events = crate::open(prefer);
        let stop = AtomicBool::new(false);
        let busy = || {
            let memory = Memory::touched(PAGE);
            while !stop.load(Ordering::Relaxed) {
                memory.advise(libc::MADV_DONTNEED);
            }
        };
        std::thread::scope(|threads| {
            threads.spawn(busy);
            threads.spawn(busy);
            let errors: Vec<_> = (0..10)
                .filter_map(|_| {
                    KvmSource::open(&Options { prefer, ring: Some(1 << 12), ..Options::default() }).err()
                })
                .collect();
            stop.store(true, Ordering::Relaxed);
            assert!(errors.is_empty(), "{} of 10: {}", errors.len(), errors[0]);
        });
    });
}
