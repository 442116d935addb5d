// SPDX-License-Identifier: MIT OR Apache-2.0
//! Getting a userfaultfd that works, and starting the threads on it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use interleave::{JoinHandle, MaySleep, Ordering, time, try_spawn};
use mmu_notifier::{PAGE_SIZE, Range};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::epoch::Epoch;
use super::shared::Shared;
use super::{Core, OpenError, Options, UffdSource, callbacks, monitor};
use crate::sys::signal::blocking_signals;
use crate::sys::uffd::{self as sys, Event, Msg, Probe};

const EVENTS: u64 = sys::EVENT_UNMAP | sys::EVENT_REMAP | sys::EVENT_REMOVE;
const WISHES: u64 = sys::WP_HUGETLBFS_SHMEM | sys::WP_ASYNC;

pub(super) fn open(options: &Options) -> Result<UffdSource, OpenError> {
    let release = release();
    if !options.ordered_only && !at_least(&release, (5, 15)) {
        return Err(OpenError::NoStrictProbe { release });
    }
    // A descriptor takes one handshake, which fixes its features: ask a throw-away one what there is.
    let offered = sys::api(create()?.as_raw_fd(), 0).map_err(OpenError::system("UFFDIO_API"))?;
    if offered & EVENTS != EVENTS {
        return Err(OpenError::Features {
            missing: "EVENT_UNMAP, EVENT_REMAP or EVENT_REMOVE",
            offered,
            since: "4.11",
        });
    }
    if offered & sys::PAGEFAULT_FLAG_WP == 0 {
        return Err(OpenError::Features {
            missing: "PAGEFAULT_FLAG_WP (registration in write-protect mode)",
            offered,
            since: "5.7 (x86-64; CONFIG_HAVE_ARCH_USERFAULTFD_WP elsewhere)",
        });
    }
    let uffd = create()?;
    let features = EVENTS | (offered & WISHES);
    sys::api(uffd.as_raw_fd(), features).map_err(OpenError::system("UFFDIO_API"))?;
    canary(&uffd, options)?;
    let source = start(uffd, features, options)?;
    canary_of_monitor(&source)?;
    Ok(source)
}

fn create() -> Result<OwnedFd, OpenError> {
    let syscall = match sys::create() {
        Ok(fd) => return Ok(fd),
        Err(e) => e,
    };
    match (syscall.raw_os_error(), sys::create_from_device()) {
        (Some(libc::EPERM | libc::ENOSYS | libc::EACCES), Ok(fd)) => Ok(fd),
        (Some(libc::EPERM | libc::EACCES), Err(device)) => Err(OpenError::NotPermitted { syscall, device }),
        (Some(libc::ENOSYS), Err(_)) => Err(OpenError::NotSupported),
        _ => Err(OpenError::System { what: "userfaultfd(2)", source: syscall }),
    }
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn at_least(release: &str, floor: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= floor
}

/// One page of our own, to be unmapped.
fn scratch() -> Result<Range, OpenError> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address that the kernel chooses touches no existing memory.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE_SIZE as usize, prot, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(OpenError::System { what: "mmap of a page to try", source: io::Error::last_os_error() });
    }
    Range::new(page.addr() as u64, PAGE_SIZE)
        .map_err(|_| OpenError::Canary("the kernel mapped an odd address"))
}

fn unmap(page: Range) {
    // SAFETY: a page from `scratch`, which nothing refers to.
    unsafe { libc::munmap(page.start() as *mut libc::c_void, page.len() as usize) };
}

/// Does the kernel keep its half of the protocol? Without a monitor yet, so that every step can be looked at.
fn canary(uffd: &OwnedFd, options: &Options) -> Result<(), OpenError> {
    let page = scratch()?;
    let fd = uffd.as_raw_fd();
    if let Err(e) = sys::register(fd, page) {
        unmap(page);
        return Err(OpenError::System { what: "UFFDIO_REGISTER of a page of its own", source: e });
    }
    if sys::probe(fd) != Probe::Quiet {
        return Err(OpenError::Canary("the probe is not quiet although nothing changes"));
    }
    let unmapper = spawn("uffd-canary", move |_| unmap(page))?;
    let verdict = (|| {
        let mut fds = [PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN)];
        let patience = Timespec { tv_sec: 5, tv_nsec: 0 };
        loop {
            match poll(&mut fds, Some(&patience)) {
                Ok(0) => return Err("an munmap of its own was not reported within 5 s"),
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return Err("poll failed"),
            }
        }
        if !options.ordered_only && sys::probe(fd) != Probe::InFlight {
            return Err("the probe does not see an munmap that is in flight");
        }
        let mut msg = [Msg::default()];
        let read = sys::read(fd, &mut msg);
        let want = Event::Unmap { start: page.start(), end: page.end() };
        if !matches!(read, Ok(1)) || msg[0].event() != want {
            return Err("an munmap of its own was reported as something else");
        }
        Ok(())
    })();
    if verdict.is_err() {
        // Lets the helper go, whatever it waits for: it is not worth waiting for it.
        let _ = sys::unregister(fd, page);
        let _ = sys::read(fd, &mut [Msg::default()]);
    } else {
        let _ = MaySleep::enter(|cx| unmapper.join(cx));
    }
    verdict.map_err(OpenError::Canary)
}

/// The same through the monitor.
fn canary_of_monitor(source: &UffdSource) -> Result<(), OpenError> {
    let page = scratch()?;
    let watch = source.watch(page);
    let seq = watch.as_ref().ok().map(|w| w.snapshot());
    unmap(page);
    match (watch, seq) {
        (Ok(watch), Some(Ok(seq))) if watch.changed_since_ordered(seq) => Ok(()),
        (Ok(_), Some(Ok(_))) => Err(OpenError::Canary("the monitor did not mark a watch whose page is gone")),
        _ => Err(OpenError::Canary("a page of its own cannot be watched")),
    }
}

fn start(uffd: OwnedFd, features: u64, options: &Options) -> Result<UffdSource, OpenError> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| OpenError::System { what: "eventfd", source: e.into() })?;
    let epoch = Epoch::new().map_err(OpenError::system("a page with MADV_WIPEONFORK (Linux 4.14)"))?;
    let budget = options.vma_budget.unwrap_or_else(|| max_map_count() / 2);
    let shared = Arc::new(Shared::new(uffd, wake, epoch, options.patience, budget));
    let batch = vec![Msg::default(); options.batch.max(1)].into_boxed_slice();
    let monitor = {
        let shared = Arc::clone(&shared);
        spawn("uffd-monitor", move |_| monitor::run(shared, batch))?
    };
    let callbacks = {
        let shared = Arc::clone(&shared);
        spawn("uffd-callback", move |cx| callbacks::run(cx, &shared))
    };
    let callbacks = match callbacks {
        Ok(thread) => thread,
        Err(e) => {
            shared.stop.store(true, Ordering::Release);
            shared.wake_monitor();
            let _ = MaySleep::enter(|cx| monitor.join(cx));
            return Err(e);
        }
    };
    // The canary asks for the monitor's thread id next.
    MaySleep::enter(|cx| {
        while shared.monitor_tid.load(Ordering::Acquire) == 0 {
            time::sleep(cx, Duration::from_micros(20));
        }
    });
    Ok(UffdSource { core: Arc::new(Core { shared, threads: Some((monitor, callbacks)), features }) })
}

fn max_map_count() -> usize {
    let text = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    text.trim().parse().unwrap_or(65_530)
}

/// A thread with all signals blocked: a handler of the application must not run on the monitor, where it could munmap.
fn spawn(
    name: &str,
    body: impl FnOnce(&mut MaySleep<'_>) + Send + 'static,
) -> Result<JoinHandle<()>, OpenError> {
    blocking_signals(|| try_spawn(name, body)).map_err(OpenError::system("starting a thread"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_as_numbers() {
        assert!(
            at_least("6.18.44-fc", (5, 15)) && at_least("5.15.0", (5, 15)) && at_least("10.0-rc1", (5, 15))
        );
        assert!(!at_least("5.9.1", (5, 15)) && !at_least("4.19", (5, 15)) && !at_least("", (5, 15)));
    }
}
