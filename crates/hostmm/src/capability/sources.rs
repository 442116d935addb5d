// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the live sources are made of.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use mmu_notifier::PAGE_SIZE;
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::{Finding, UNEXPECTED};
use crate::sys::bpf::{
    self,
    asm::{Asm, Reg},
};
use crate::sys::tracefs::{Tracefs, TracefsError};
use crate::sys::vm::{self, VmError};
use crate::sys::{perf, probe, uffd};

pub(super) fn dev_kvm() -> Finding {
    let made = vm::open(Path::new("/dev/kvm")).and_then(|kvm| vm::Vm::create(kvm.as_fd()));
    let error = match &made {
        Ok(_) => return Finding::there(""),
        Err(VmError::Open(e) | VmError::CreateVm(e) | VmError::CreateVcpu(e) | VmError::Map(e)) => {
            e.raw_os_error()
        }
        Err(VmError::NotKvm(_)) => None,
    };
    let how = match (&made, error) {
        (Err(VmError::Open(_)), Some(libc::EACCES | libc::EPERM)) => {
            "join the group that owns /dev/kvm (usually kvm), or have root give it one: chgrp kvm /dev/kvm; chmod 660 /dev/kvm"
        }
        (Err(VmError::Open(_)), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => {
            "load kvm_intel, kvm_amd or kvm; enable virtualisation in the firmware, or nesting on the host"
        }
        (Err(VmError::CreateVm(_)), _) => {
            "see the kernel log; another hypervisor may hold the CPU's virtualisation"
        }
        _ => UNEXPECTED,
    };
    Finding::missing(made.err().map_or_else(String::new, |e| format!("/dev/kvm: {e}")), how)
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

const TRACEFS_HOW: &str = "mount -t tracefs -o gid=GROUP,mode=750 tracefs /sys/kernel/tracing, or give CAP_SYS_ADMIN (kernel: CONFIG_FTRACE)";

fn no_event(e: &TracefsError) -> Finding {
    let how = match e {
        TracefsError::NoTracefs(_) | TracefsError::Denied(_) => TRACEFS_HOW,
        TracefsError::NoEvent(_) => {
            "use a later kernel (5.10 does not have it) with CONFIG_KVM; load the module kvm"
        }
        TracefsError::Read { .. } | TracefsError::Format { .. } => UNEXPECTED,
    };
    Finding::missing(e.to_string(), how)
}

pub(super) fn tracefs() -> Finding {
    Tracefs::open().map_or_else(|e| no_event(&e), |_| Finding::there(""))
}

/// The event, as perf wants it, with the two words that the source reads.
fn event() -> Result<u64, Finding> {
    let event =
        Tracefs::open().and_then(|fs| fs.event("kvm", "kvm_unmap_hva_range")).map_err(|e| no_event(&e))?;
    event.word("start").and_then(|_| event.word("end")).map_err(|e| no_event(&e))?;
    Ok(event.id)
}

pub(super) fn kvm_tracepoint() -> Finding {
    event().map_or_else(|finding| finding, |id| Finding::there(format!("event {id}")))
}

pub(super) fn bpf() -> Finding {
    let how = |errno| match errno {
        libc::EPERM | libc::EACCES => "give CAP_BPF and CAP_PERFMON (Linux 5.8; before: CAP_SYS_ADMIN)",
        libc::ENOSYS => "kernel: CONFIG_BPF_SYSCALL; or a seccomp filter hides it",
        libc::EINVAL => "use Linux 5.5 or later (BPF_F_MMAPABLE)",
        libc::ENOMEM => "raise RLIMIT_MEMLOCK (before Linux 5.11 maps count)",
        _ => UNEXPECTED,
    };
    let map = Finding::of(bpf::create_words("probe", PAGE_SIZE as u32).map(drop), "creating a map", how);
    if !map.state.is_usable() {
        return map;
    }
    let mut code = Asm::default();
    code.mov_imm(Reg::R0, 0);
    code.exit();
    let load = || {
        let code = code.finish().ok_or(io::ErrorKind::InvalidInput)?;
        bpf::load_tracepoint("probe", &code, c"Dual MIT/GPL").map(drop).map_err(|e| e.error)
    };
    Finding::of(load(), "loading a tracepoint program", how)
}

pub(super) fn perf_ring() -> Finding {
    let id = match event() {
        Ok(id) => id,
        Err(finding) => return finding,
    };
    Finding::of(
        perf::Ring::open(id, 0, 1, None, false).map(drop),
        "a ring on the event for all tasks",
        |errno| match errno {
            libc::EPERM | libc::EACCES => {
                "give CAP_PERFMON (Linux 5.8), or set kernel.perf_event_paranoid to -1"
            }
            libc::ENOMEM => "raise RLIMIT_MEMLOCK or kernel.perf_event_mlock_kb",
            libc::ENOSYS => "kernel: CONFIG_PERF_EVENTS; or a seccomp filter hides it",
            _ => UNEXPECTED,
        },
    )
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
    let by_call = probe::userfaultfd(false);
    let (fd, way) = match (by_call, uffd::create_from_device()) {
        (Ok(fd), _) => (fd, "system call"),
        (Err(_), Ok(fd)) => (fd, "/dev/userfaultfd"),
        (Err(_), Err(_)) => match probe::userfaultfd(true) {
            Ok(fd) => (fd, "user mode only"),
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
    let features = match uffd::api(fd.as_raw_fd(), 0) {
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
    let again = probe::userfaultfd(way == "user mode only").or_else(|_| uffd::create_from_device());
    let fork_events = again.and_then(|fd| uffd::api(fd.as_raw_fd(), EVENT_FORK));
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
