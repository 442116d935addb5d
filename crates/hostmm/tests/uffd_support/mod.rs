// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory to disturb, by raw system calls, for the tests of the `uffd` source.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test binary uses its part")]

use std::io;
use std::time::{Duration, Instant};

use hostmm::uffd::{Options, UffdSource};
use mmu_notifier::{PAGE_SIZE, Range};

pub const PAGE: u64 = PAGE_SIZE;
pub const DEADLINE: Duration = Duration::from_secs(300);
/// For what another thread does in its own time.
pub const SOON: Duration = Duration::from_secs(60);

/// A test whose body runs in a child process with a deadline.
#[macro_export]
macro_rules! live {
    ($(#[$doc:meta])* $name:ident, $body:expr) => {
        $(#[$doc])*
        #[test]
        fn $name() {
            if hostmm::testing::require(hostmm::capability::Capability::Userfaultfd) {
                hostmm::testing::in_child(stringify!($name), $crate::uffd_support::DEADLINE, $body);
            }
        }
    };
}

/// With more patience than programs have: here a monitor that is late is the machine's doing.
pub fn open() -> UffdSource {
    UffdSource::open(&Options { patience: SOON, ..Options::default() }).expect("a userfaultfd")
}

pub fn call(number: libc::c_long, args: [u64; 6]) -> io::Result<u64> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the tests only pass memory of their own, which no Rust object lives in.
    let rc = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if rc == -1 { Err(io::Error::last_os_error()) } else { Ok(rc as u64) }
}

pub fn map_at(addr: u64, len: u64, prot: i32, flags: i32, fd: i32) -> io::Result<Range> {
    let start = call(libc::SYS_mmap, [addr, len, prot as u64, flags as u64, fd as u64, 0])?;
    Ok(Range::new(start, len).expect("page aligned"))
}

pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
pub const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

pub fn anon(pages: u64) -> Range {
    let range = map_at(0, pages * PAGE, RW, ANON, -1).unwrap();
    touch(range);
    range
}

/// Anonymous memory with unmapped pages before and behind, so that nothing merges with it.
pub fn island(pages: u64) -> Range {
    let wide = map_at(0, (pages + 2) * PAGE, libc::PROT_NONE, ANON, -1).unwrap();
    unmap(wide);
    let range = map_at(wide.start() + PAGE, pages * PAGE, RW, ANON | libc::MAP_FIXED_NOREPLACE, -1).unwrap();
    touch(range);
    range
}

pub fn touch(range: Range) {
    for page in range.iter_pages() {
        // SAFETY: writable memory of the test.
        unsafe { (page.get() as *mut u64).write_volatile(page.get()) };
    }
}

pub fn unmap(range: Range) {
    call(libc::SYS_munmap, [range.start(), range.len(), 0, 0, 0, 0]).unwrap();
}

pub fn madvise(range: Range, advice: i32) -> io::Result<u64> {
    call(libc::SYS_madvise, [range.start(), range.len(), advice as u64, 0, 0, 0])
}

pub fn mremap(range: Range, len: u64, flags: i32, to: u64) -> io::Result<u64> {
    call(libc::SYS_mremap, [range.start(), range.len(), len, flags as u64, to, 0])
}

pub fn part(range: Range, first: u64, pages: u64) -> Range {
    Range::new(range.start() + first * PAGE, pages * PAGE).unwrap()
}

/// Polls `what`: for what another thread does in its own time.
pub fn eventually(what: impl Fn() -> bool) -> bool {
    let end = Instant::now() + SOON;
    while Instant::now() < end {
        if what() {
            return true;
        }
        rustix::thread::sched_yield();
    }
    false
}

/// Runs `body` on `count` threads at once.
pub fn with_threads(count: usize, body: impl Fn() + Sync) {
    interleave::MaySleep::enter(|cx| {
        interleave::scope(cx, |scope, _| {
            for _ in 0..count {
                scope.spawn("uffd-test", |_| body());
            }
        });
    });
}
