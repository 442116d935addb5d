// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong, and what to do about it.

use crate::sys::tracefs::TracefsError;
use crate::sys::vm::VmError;
use std::io;
use std::path::PathBuf;

/// Why there is no source. Nothing is left behind: no VM, no program, no thread.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// An option that makes no sense.
    #[error("kvm source: {0}")]
    Options(String),
    /// No VM.
    #[error("kvm source: {path}: {cause}; {hint}")]
    Kvm {
        /// The device.
        path: PathBuf,
        /// What failed.
        cause: String,
        /// What to do.
        hint: &'static str,
    },
    /// The tracepoint cannot be found or is not as expected.
    #[error("kvm source: {cause}; {hint}")]
    Tracepoint {
        /// What failed.
        cause: String,
        /// What to do.
        hint: &'static str,
    },
    /// bpf(2) refused.
    #[error("kvm source: {what}: {cause}; {hint}")]
    Bpf {
        /// The step.
        what: &'static str,
        /// What failed, with the verifier's words where it has some.
        cause: String,
        /// The error number's kind.
        kind: io::ErrorKind,
        /// What to do.
        hint: &'static str,
    },
    /// perf_event_open(2) refused.
    #[error("kvm source: perf_event_open: {cause}; {hint}")]
    Perf {
        /// What failed.
        cause: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// Neither way of listening could be had.
    #[error("{bpf}\n{perf}")]
    Neither {
        /// Why not by BPF.
        bpf: Box<OpenError>,
        /// Why not by perf rings.
        perf: Box<OpenError>,
    },
    /// Memory, threads or descriptors ran out.
    #[error("kvm source: {what}: {cause}")]
    System {
        /// The step.
        what: &'static str,
        /// What failed.
        cause: io::Error,
    },
    /// Everything was there, and yet a change made on purpose was not heard, or not as it was made.
    #[error("kvm source: not trusted, its own change was not heard right: {0}")]
    Canary(String),
    /// The descriptors handed over are not what a grant is made of.
    #[error("kvm source: grant: {0}")]
    Grant(String),
}

/// Why a source that was there answers no more. Whoever cached something must throw it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Gone {
    /// This process is a forked child: the notifier is on the parent's mm. Open a source of its own here.
    #[error("the source belongs to the parent process; open one in this process")]
    Forked,
    /// The source was closed.
    #[error("the source was closed")]
    Closed,
    /// The monitor thread is dead (a callback panicked, or its descriptors failed): callbacks come no more.
    #[error("the monitor thread is dead; open a new source")]
    MonitorDead,
}

/// Why a subscription was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The source is gone.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The source was opened without a ring, so nobody carries records to callbacks.
    #[error("the source has no ring; open it with Options::ring")]
    NoRing,
}

pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> OpenError {
    move |cause| OpenError::System { what, cause }
}

pub(crate) fn kvm(path: &std::path::Path, cause: VmError) -> OpenError {
    let hint = match &cause {
        VmError::Open(e) if e.kind() == io::ErrorKind::NotFound => {
            "load kvm_intel or kvm_amd; in a guest the host must offer nested virtualisation"
        }
        VmError::Open(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            "add the user to group kvm, or have a privileged process hand over a Grant"
        }
        VmError::Open(_) => "is virtualisation enabled in the firmware?",
        VmError::NotKvm(_) => "give the path of the KVM device",
        VmError::CreateVm(_) | VmError::CreateVcpu(_) | VmError::Map(_) => {
            "see dmesg; memory or a cgroup limit?"
        }
    };
    OpenError::Kvm { path: path.to_owned(), cause: cause.to_string(), hint }
}

pub(super) fn tracepoint(cause: TracefsError) -> OpenError {
    let hint = match &cause {
        TracefsError::NoTracefs(_) => {
            "needs CONFIG_EVENT_TRACING, and CAP_SYS_ADMIN to mount it or a mount at /sys/kernel/tracing"
        }
        TracefsError::Denied(_) => {
            "needs to read /sys/kernel/tracing (root, or a mount with gid=), or a Grant from a privileged process"
        }
        TracefsError::NoEvent(_) => "needs Linux 5.13 or later with kvm.ko loaded",
        TracefsError::Read { .. } | TracefsError::Format { .. } => {
            "a kernel that this library does not know: report it"
        }
    };
    OpenError::Tracepoint { cause: cause.to_string(), hint }
}

pub(super) fn bpf(what: &'static str, cause: &io::Error, log: &str) -> OpenError {
    let hint = match cause.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "needs CAP_BPF and CAP_PERFMON (CAP_SYS_ADMIN before Linux 5.8), or a Grant from a process that has them; \
             Options::prefer can fall back to perf rings"
        }
        Some(libc::EINVAL) => "needs Linux 5.8 or later for the ring, 5.5 for the counters",
        Some(libc::ENOSYS) => "needs CONFIG_BPF_SYSCALL",
        Some(libc::ENOMEM) => "needs memory: RLIMIT_MEMLOCK before Linux 5.11, the cgroup's limit after",
        _ => "see bpf(2)",
    };
    let log = if log.is_empty() { String::new() } else { format!("; the verifier says:\n{log}") };
    OpenError::Bpf { what, cause: format!("{cause}{log}"), kind: cause.kind(), hint }
}

pub(super) fn perf(cause: io::Error) -> OpenError {
    let hint = match cause.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "needs CAP_PERFMON (CAP_SYS_ADMIN before Linux 5.8) or kernel.perf_event_paranoid = -1"
        }
        Some(libc::ENOSYS | libc::ENOENT) => "needs CONFIG_PERF_EVENTS and CONFIG_EVENT_TRACING",
        _ => "see perf_event_open(2)",
    };
    OpenError::Perf { cause, hint }
}
