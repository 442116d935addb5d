// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the `uffd` source costs: munmap and MADV_DONTNEED of watched memory beside unwatched memory and beside a bare
//! userfaultfd with the least reader that works, and the checks. `cargo bench -p hostmm --bench uffd`
//!
//! The three take turns, so that whatever else the machine does falls on all of them; medians are compared. A call
//! waits until the reader has read, so most of its cost is a wake-up, and that depends on where the reader runs more
//! than on anything else: everything is measured once with the readers on the caller's CPU, once with them on another.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use hostmm::uffd::{Options, UffdSource};
use mmu_notifier::{PAGE_SIZE, Range};

fn main() {
    let source = match UffdSource::open(&Options::default()) {
        Ok(source) => source,
        Err(why) => return println!("skipped: {why}"),
    };
    let floor = Floor::open();
    for (place, readers) in [("on the caller's CPU", 0), ("on another CPU", 1)] {
        if !pin_threads(0, readers) {
            println!("\nreaders {place}: not available here");
            continue;
        }
        println!(
            "\n{:<30}{:>14}{:>14}{:>14}{:>14}",
            format!("readers {place}"),
            "unwatched",
            "bare uffd",
            "watched",
            "watched/bare"
        );
        for (name, op) in [("munmap", Op::Munmap), ("MADV_DONTNEED", Op::DontNeed)] {
            for (size, len, rounds) in
                [("4 KiB", 4 << 10, 4000), ("2 MiB", 2 << 20, 400), ("64 MiB", 64 << 20, 40)]
            {
                let [plain, bare, watched] = compare(&source, &floor, op, len, rounds);
                let ratio = watched.as_secs_f64() / bare.as_secs_f64();
                println!(
                    "  {name:<14}{size:>14}{:>14}{:>14}{:>14}{ratio:>14.2}",
                    format!("{plain:.1?}"),
                    format!("{bare:.1?}"),
                    format!("{watched:.1?}")
                );
            }
        }
    }
    checks(&source);
}

fn checks(source: &UffdSource) {
    let range = map(64 * PAGE_SIZE);
    let pages = || range.iter_pages().map(Range::page);
    let watches: Vec<_> = pages().map(|page| source.watch(page).expect("watched")).collect();
    let seq = watches[0].snapshot().expect("alive");
    let time = |n: u32, f: &dyn Fn()| {
        let mut runs: Vec<f64> = (0..15)
            .map(|_| {
                let start = Instant::now();
                (0..n).for_each(|_| f());
                start.elapsed().as_nanos() as f64 / f64::from(n)
            })
            .collect();
        runs.sort_by(f64::total_cmp);
        runs[runs.len() / 2]
    };
    let watch = &watches[0];
    let ordered = time(4_000_000, &|| assert!(!watch.changed_since_ordered(std::hint::black_box(seq))));
    let strict = time(200_000, &|| assert!(!watch.changed_since_strict(std::hint::black_box(seq))));
    let batch = time(50_000, &|| {
        let quiet = source.probe().expect("quiet");
        assert!(watches.iter().all(|w| !quiet.changed_since(w, std::hint::black_box(seq))));
    });
    println!(
        "check, ordered {ordered:.2} ns; strict {strict:.0} ns; of a batch of 64 {:.2} ns each",
        batch / 64.0
    );
    // The epoch has moved for something else, so the watch itself is looked at.
    let other = map(PAGE_SIZE);
    let gone = source.watch(other).expect("watched");
    unmap(other);
    drop(gone);
    let ordered = time(4_000_000, &|| assert!(!watch.changed_since_ordered(std::hint::black_box(seq))));
    println!("check, ordered, after a change elsewhere {ordered:.2} ns");
    let watch = time(2000, &|| drop(source.watch(other_page(range)).expect("watched")));
    println!("watch and drop of one page {:.2} us", watch / 1000.0);
}

/// This thread on one CPU, every other thread of the process on another (or the same). False if there is no such CPU.
fn pin_threads(mine: usize, others: usize) -> bool {
    let me = rustix::thread::gettid();
    let tasks = std::fs::read_dir("/proc/self/task").expect("proc is mounted");
    let ids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    ids.filter_map(rustix::thread::Pid::from_raw).all(|id| {
        let mut cpus = rustix::thread::CpuSet::new();
        cpus.set(if id == me { mine } else { others });
        rustix::thread::sched_setaffinity(Some(id), &cpus).is_ok()
    })
}

fn other_page(range: Range) -> Range {
    Range::page(range.iter_pages().nth(3).expect("64 pages"))
}

#[derive(Clone, Copy)]
enum Op {
    Munmap,
    DontNeed,
}

/// Medians: unwatched, bare, watched.
fn compare(source: &UffdSource, floor: &Floor, op: Op, len: u64, rounds: usize) -> [Duration; 3] {
    let mut times: [Vec<Duration>; 3] = [const { Vec::new() }; 3];
    for round in 0..rounds * 3 {
        // Not always the same one after the same one.
        let which = (round + round / 3) % 3;
        let range = map(len);
        touch(range);
        let watch = match which {
            1 => {
                floor.register(range);
                None
            }
            2 => Some(source.watch(range).expect("watched")),
            _ => None,
        };
        let start = Instant::now();
        match op {
            Op::Munmap => unmap(range),
            Op::DontNeed => dont_need(range),
        }
        times[which].push(start.elapsed());
        if matches!(op, Op::DontNeed) {
            drop(watch);
            unmap(range);
        }
        // The monitors are asleep again before the next.
        interleave::yield_now();
    }
    times.map(|mut t| {
        t.sort();
        t[t.len() / 2]
    })
}

fn map(len: u64) -> Range {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address that the kernel chooses touches no existing memory.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, prot, flags, -1, 0) };
    Range::new(at.addr() as u64, len).expect("mapped")
}

fn touch(range: Range) {
    for page in range.iter_pages() {
        // SAFETY: writable memory of this bench.
        unsafe { (page.get() as *mut u8).write_volatile(1) };
    }
}

fn unmap(range: Range) {
    // SAFETY: memory of this bench, to which nothing refers.
    unsafe { libc::munmap(range.start() as *mut libc::c_void, range.len() as usize) };
}

fn dont_need(range: Range) {
    // SAFETY: memory of this bench, to which nothing refers.
    unsafe { libc::madvise(range.start() as *mut libc::c_void, range.len() as usize, libc::MADV_DONTNEED) };
}

/// A userfaultfd in the same mode, with the same events, and a thread that reads them and does nothing else.
struct Floor {
    fd: OwnedFd,
}

impl Floor {
    fn open() -> Floor {
        // SAFETY: one integer argument; the descriptor is ours.
        let fd = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1);
            OwnedFd::from_raw_fd(fd as i32)
        };
        // UFFD_API with EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP.
        let mut api = [0xAA_u64, 1 << 2 | 1 << 3 | 1 << 6, 0];
        // SAFETY: `struct uffdio_api` is three u64.
        assert_eq!(unsafe { libc::ioctl(fd.as_raw_fd(), 0xC018_AA3F, &mut api) }, 0);
        let raw = fd.as_raw_fd();
        interleave::spawn("floor", move |_| {
            let mut poll = libc::pollfd { fd: raw, events: libc::POLLIN, revents: 0 };
            let mut msg = [0u64; 4];
            loop {
                // SAFETY: one pollfd, and a buffer of one message.
                unsafe {
                    libc::poll(&mut poll, 1, -1);
                    libc::read(raw, msg.as_mut_ptr().cast(), 32);
                }
            }
        });
        Floor { fd }
    }

    fn register(&self, range: Range) {
        let mut register = [range.start(), range.len(), 2, 0];
        // SAFETY: `struct uffdio_register` is four u64.
        assert_eq!(unsafe { libc::ioctl(self.fd.as_raw_fd(), 0xC020_AA00, &mut register) }, 0);
    }
}
