// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the live sources are made of.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use kvm_ioctls::Kvm;
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::{Finding, UNEXPECTED};
use crate::sys::probe;

/// Signals interrupt the making of a VM.
const ATTEMPTS: usize = 8;

pub(super) fn dev_kvm() -> Finding {
    let kvm = match retry(Kvm::new) {
        Ok(kvm) => kvm,
        Err(e) => {
            let how = match e.errno() {
                libc::EACCES | libc::EPERM => {
                    "join the group that owns /dev/kvm (usually kvm), or have root give it one: chgrp kvm /dev/kvm; chmod 660 /dev/kvm"
                }
                libc::ENOENT | libc::ENODEV | libc::ENXIO => {
                    "load kvm_intel, kvm_amd or kvm; enable virtualisation in the firmware, or nesting on the host"
                }
                _ => UNEXPECTED,
            };
            return Finding::missing(format!("/dev/kvm: {}", io::Error::from_raw_os_error(e.errno())), how);
        }
    };
    match retry(|| kvm.create_vm()) {
        Ok(_) => Finding::there(format!("API {}", kvm.get_api_version())),
        Err(e) => Finding::missing(
            format!("KVM_CREATE_VM: {}", io::Error::from_raw_os_error(e.errno())),
            "see the kernel log; another hypervisor may hold the CPU's virtualisation",
        ),
    }
}

fn retry<T>(mut f: impl FnMut() -> Result<T, kvm_ioctls::Error>) -> Result<T, kvm_ioctls::Error> {
    for _ in 1..ATTEMPTS {
        match f() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other,
        }
    }
    f()
}

/// The root directory of a file system of the kernel: where it is mounted, else a mount of our own that nobody sees
/// (Linux 5.2, CAP_SYS_ADMIN).
pub(super) fn kernel_fs(kind: &str, mounted_at: &str, must_have: &str) -> io::Result<OwnedFd> {
    let dir = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let mounted = rustix::fs::open(mounted_at, dir, Mode::empty()).map_err(io::Error::from);
    if let Ok(root) = &mounted
        && openat(root, must_have, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).is_ok()
    {
        return mounted;
    }
    let own = || {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(context.as_fd())?;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
    };
    own().map_err(|e: rustix::io::Errno| match mounted {
        // The directory is there and shut: that is the better news.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => e,
        _ => e.into(),
    })
}

pub(super) fn read_below(root: &OwnedFd, path: &str) -> io::Result<String> {
    let mut text = String::new();
    let file = openat(root, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    File::from(file).read_to_string(&mut text)?;
    Ok(text)
}

fn trace_root() -> io::Result<OwnedFd> {
    kernel_fs("tracefs", "/sys/kernel/tracing", "events")
}

const TRACEFS_HOW: &str = "mount -t tracefs -o gid=GROUP,mode=750 tracefs /sys/kernel/tracing, or give CAP_SYS_ADMIN (kernel: CONFIG_FTRACE)";

pub(super) fn tracefs() -> Finding {
    match trace_root() {
        Ok(_) => Finding::there(""),
        Err(e) => Finding::missing(format!("tracefs: {e}"), TRACEFS_HOW),
    }
}

/// The id of the event, as perf wants it.
fn event_id() -> Result<u64, Finding> {
    let root = trace_root().map_err(|e| Finding::missing(format!("tracefs: {e}"), TRACEFS_HOW))?;
    let id = match read_below(&root, "events/kvm/kvm_unmap_hva_range/id") {
        Ok(id) => id,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let how = "use a later kernel (5.10 does not have it) with CONFIG_KVM; load the module kvm";
            return Err(Finding::missing("no event kvm:kvm_unmap_hva_range", how));
        }
        Err(e) => return Err(Finding::missing(format!("the event's id: {e}"), TRACEFS_HOW)),
    };
    id.trim().parse().map_err(|_| Finding::missing(format!("the event's id is {id:?}"), UNEXPECTED))
}

pub(super) fn kvm_tracepoint() -> Finding {
    event_id().map_or_else(|finding| finding, |id| Finding::there(format!("event {id}")))
}

pub(super) fn bpf() -> Finding {
    let how = |errno| match errno {
        libc::EPERM | libc::EACCES => "give CAP_BPF and CAP_PERFMON (Linux 5.8; before: CAP_SYS_ADMIN)",
        libc::ENOSYS => "kernel: CONFIG_BPF_SYSCALL; or a seccomp filter hides it",
        libc::EINVAL => "use Linux 5.5 or later (BPF_F_MMAPABLE)",
        libc::ENOMEM => "raise RLIMIT_MEMLOCK (before Linux 5.11 maps count)",
        _ => UNEXPECTED,
    };
    let map = Finding::of(probe::bpf_map().map(drop), "creating a map", how);
    if !map.state.is_usable() {
        return map;
    }
    Finding::of(probe::bpf_program().map(drop), "loading a tracepoint program", how)
}

pub(super) fn perf_ring() -> Finding {
    let id = match event_id() {
        Ok(id) => id,
        Err(finding) => return finding,
    };
    Finding::of(probe::perf_ring(id), "a ring on the event for all tasks", |errno| match errno {
        libc::EPERM | libc::EACCES => "give CAP_PERFMON (Linux 5.8), or set kernel.perf_event_paranoid to -1",
        libc::ENOMEM => "raise RLIMIT_MEMLOCK or kernel.perf_event_mlock_kb",
        libc::ENOSYS => "kernel: CONFIG_PERF_EVENTS; or a seccomp filter hides it",
        _ => UNEXPECTED,
    })
}

/// In the order of their bits.
const UFFD_FEATURES: [&str; 17] = [
    "PAGEFAULT_FLAG_WP",
    "EVENT_FORK",
    "EVENT_REMAP",
    "EVENT_REMOVE",
    "MISSING_HUGETLBFS",
    "MISSING_SHMEM",
    "EVENT_UNMAP",
    "SIGBUS",
    "THREAD_ID",
    "MINOR_HUGETLBFS",
    "MINOR_SHMEM",
    "EXACT_ADDRESS",
    "WP_HUGETLBFS_SHMEM",
    "WP_UNPOPULATED",
    "POISON",
    "WP_ASYNC",
    "MOVE",
];
const EVENT_FORK: u64 = 1 << 1;
/// What the source is made of: REMAP, REMOVE, UNMAP, and write-protection to register by.
const UFFD_NEEDED: u64 = 1 | 1 << 2 | 1 << 3 | 1 << 6;

pub(super) fn userfaultfd() -> Finding {
    let by_device =
        || probe::userfaultfd_from(&File::options().read(true).write(true).open("/dev/userfaultfd")?);
    let by_call = probe::userfaultfd(false);
    let (uffd, way) = match (by_call, by_device()) {
        (Ok(uffd), _) => (uffd, "system call"),
        (Err(_), Ok(uffd)) => (uffd, "/dev/userfaultfd"),
        (Err(_), Err(_)) => match probe::userfaultfd(true) {
            Ok(uffd) => (uffd, "user mode only"),
            Err(e) => {
                return Finding::of(Err(e), "userfaultfd", |errno| match errno {
                    libc::ENOSYS => "kernel: CONFIG_USERFAULTFD; or a seccomp filter hides it",
                    _ => {
                        "set vm.unprivileged_userfaultfd to 1, give CAP_SYS_PTRACE or the right to open /dev/userfaultfd, or lift the seccomp filter"
                    }
                });
            }
        },
    };
    let features = match probe::uffd_features(&uffd, 0) {
        Ok(features) => features,
        Err(e) => return Finding::missing(format!("UFFDIO_API: {e}"), UNEXPECTED),
    };
    let name = |bit: usize| UFFD_FEATURES.get(bit).map_or_else(|| format!("bit {bit}"), |n| (*n).to_owned());
    let names = |set: u64| (0..64).filter(|b| set >> b & 1 == 1).map(name).collect::<Vec<_>>().join(" ");
    if features & UFFD_NEEDED != UFFD_NEEDED {
        let why = format!("the kernel does not offer {}", names(UFFD_NEEDED & !features));
        return Finding::missing(why, "use Linux 5.15 or later with CONFIG_HAVE_ARCH_USERFAULTFD_WP");
    }
    // One descriptor can be asked once only.
    let again = probe::userfaultfd(way == "user mode only").or_else(|_| by_device());
    let fork_events = again.and_then(|uffd| probe::uffd_features(&uffd, EVENT_FORK));
    let detail = format!("{way}; features {}", names(features));
    if way == "user mode only" {
        return Finding::partial(
            format!("faults of user mode only, no fork events; {detail}"),
            "set vm.unprivileged_userfaultfd to 1, or give CAP_SYS_PTRACE or the right to open /dev/userfaultfd",
        );
    }
    match fork_events {
        Ok(_) => Finding::there(detail),
        Err(e) => Finding::partial(format!("no fork events ({e}); {detail}"), "give CAP_SYS_PTRACE"),
    }
}

/// The lockdown mode, if it can be told.
pub(super) fn lockdown() -> Option<String> {
    let text = match fs::read_to_string("/sys/kernel/security/lockdown") {
        Ok(text) => text,
        Err(_) => {
            let root = kernel_fs("securityfs", "/sys/kernel/security", "lockdown").ok()?;
            match read_below(&root, "lockdown") {
                Ok(text) => text,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Some("none".to_owned()),
                Err(_) => return None,
            }
        }
    };
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}
