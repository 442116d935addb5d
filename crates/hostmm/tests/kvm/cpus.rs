// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several CPUs: every one is heard, address reuse between threads is never missed, and what is skipped is reported.

use crate::memory::{Memory, PAGE};
use crate::{live, live_both, open};
use hostmm::kvm::{KvmSource, Options, Prefer};
use mmu_notifier::Range;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

/// Binds the calling thread to `cpu`; false if there is no such CPU for us.
fn pin(cpu: usize) -> bool {
    // SAFETY: a local CPU set for the calling thread.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set) == 0
    }
}

#[test]
fn every_cpu_is_heard() {
    live_both("cpus::every_cpu_is_heard", |prefer| {
        let source = open(prefer);
        let m = Memory::touched(PAGE);
        let watch = source.watch(m.range()).unwrap();
        let mut heard = 0;
        for cpu in (0..256).filter(|cpu| pin(*cpu)) {
            let seq = watch.snapshot().unwrap();
            m.advise(libc::MADV_DONTNEED);
            assert!(watch.changed_since(seq), "CPU {cpu}");
            heard += 1;
        }
        assert!(heard > 0);
    });
}

/// Thread A unmaps a page; thread B maps the same address as soon as the kernel lets it, while A is still in munmap, and
/// asks at once. Whoever asks must be told: the page is another one now.
#[test]
fn an_address_that_another_thread_reuses_at_once() {
    const ROUNDS: u32 = 20_000;
    const AT_MOST: Duration = Duration::from_secs(5);
    live_both("cpus::an_address_that_another_thread_reuses_at_once", |prefer| {
        let source = open(prefer);
        let far = Memory::touched(PAGE);
        // The control listens to another page alone: it must miss every single reuse.
        let deaf =
            KvmSource::open(&Options { prefer, window: Some(far.range()), ..Options::default() }).unwrap();
        // The middle of a large hole: what else this process maps meanwhile goes to the hole's end.
        let hint = hole();
        let (heard, control) = (source.watch(hint).unwrap(), deaf.watch(hint).unwrap());
        let (to_a, from_b) = sync_channel::<()>(0);
        let a = interleave::spawn("a", move |_| {
            pin(1);
            while from_b.recv().is_ok() {
                // SAFETY: the page that B mapped for this.
                unsafe { libc::munmap(hint.start() as *mut _, PAGE) };
            }
        });
        let map = || {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: NOREPLACE maps only where nothing is.
            let p = unsafe {
                libc::mmap(hint.start() as *mut _, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
            };
            p as u64 == hint.start()
        };
        pin(0);
        while !map() {}
        let (mut rounds, mut stale, mut control_stale) = (0, 0, 0);
        let start = Instant::now();
        while rounds < ROUNDS && start.elapsed() < AT_MOST {
            rounds += 1;
            // SAFETY: mapped above, by this thread.
            unsafe { (hint.start() as *mut u8).write_volatile(1) };
            let (seq, control_seq) = (heard.snapshot().unwrap(), control.snapshot().unwrap());
            to_a.send(()).unwrap();
            while !map() {
                std::hint::spin_loop();
            }
            stale += u32::from(!heard.changed_since(seq));
            control_stale += u32::from(!control.changed_since(control_seq));
        }
        drop(to_a);
        interleave::MaySleep::enter(|cx| a.join(cx)).unwrap();
        assert_eq!(stale, 0);
        assert!(control_stale * 10 > rounds * 9, "the control is stale {control_stale} times of {rounds}");
    });
}

fn hole() -> Range {
    let m = Memory::reserved(1 << 30);
    m.part(1 << 17, 1)
}

fn bpf<T>(cmd: i32, attr: &T) -> i64 {
    // SAFETY: an attribute of the size given, whose pointers live over the call.
    unsafe { libc::syscall(libc::SYS_bpf, cmd, attr, size_of::<T>()) }
}

/// While a task is inside bpf(BPF_MAP_UPDATE_ELEM) the kernel keeps tracing programs off its CPU, and on a preemptible
/// kernel other tasks run there meanwhile. Such a change is not counted; it must be reported.
#[test]
fn what_is_skipped_for_other_bpf_users_is_reported() {
    live("cpus::what_is_skipped_for_other_bpf_users_is_reported", || {
        const BPF_MAP_CREATE: i32 = 0;
        const BPF_MAP_UPDATE_ELEM: i32 = 2;
        const LEN: u32 = 4 << 20;
        assert!(pin(0));
        let source = open(Prefer::Bpf);
        // An array of one entry of 4 MiB: each update copies for a long time.
        let map = bpf(BPF_MAP_CREATE, &[2u32, 4, LEN, 1, 0]);
        assert!(map >= 0, "{}", std::io::Error::last_os_error());
        interleave::spawn("bpf-user", move |_| {
            let (key, value) = (0u32, vec![1u8; LEN as usize]);
            loop {
                let attr = [map as u64, (&raw const key) as u64, value.as_ptr() as u64, 0];
                assert_eq!(bpf(BPF_MAP_UPDATE_ELEM, &attr), 0);
            }
        });
        let m = Memory::touched(PAGE);
        let watch = source.watch(m.range()).unwrap();
        let mut stale = 0;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            let seq = watch.snapshot().unwrap();
            m.advise(libc::MADV_DONTNEED);
            stale += u64::from(!watch.changed_since(seq));
        }
        let misses = source.health().unwrap().misses.unwrap_or(u64::MAX);
        assert!(stale <= misses, "{stale} stale, {misses} reported");
    });
}
