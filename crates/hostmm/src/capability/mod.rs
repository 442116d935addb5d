// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this machine offers to this process, and how to get what is missing.
//!
//! A probe tries the thing itself rather than guess from version numbers, uid or configuration: containers, seccomp,
//! lockdown and capabilities make any guess wrong. It changes nothing that outlives it, writes no setting, and waits for
//! nobody. What it finds is true for the calling thread's credentials at that moment.

mod list;
mod machine;
mod pages;
mod report;
mod sources;
#[cfg(test)]
mod tests;

use std::io;

pub use list::Capability;
pub use report::{Entry, Report, Verdict};

/// How much of a capability this process has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// All of it; the text says what was found.
    There(String),
    /// Some of it: the text says what is missing.
    Partial(String),
    /// None of it: the text says why.
    Missing(String),
}

impl State {
    /// All or some of it is there.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        !matches!(self, State::Missing(_))
    }

    /// The text.
    #[must_use]
    pub fn detail(&self) -> &str {
        match self {
            State::There(text) | State::Partial(text) | State::Missing(text) => text,
        }
    }
}

/// Ask the kernel. Changes nothing and cannot hang; some milliseconds at most.
#[must_use]
pub fn probe(capability: Capability) -> State {
    examine(capability).state
}

/// As [`probe`] of [`Capability::DiskFile`], for files in `dir`.
#[must_use]
pub(crate) fn disk_file(dir: &std::path::Path) -> State {
    machine::disk_file(dir).state
}

/// What to do where we have no advice.
const UNEXPECTED: &str = "unexpected: please report it, with the kernel's version";

/// A state and, where something is missing, what would give it.
struct Finding {
    state: State,
    how: &'static str,
}

impl Finding {
    fn there(detail: impl Into<String>) -> Finding {
        Finding { state: State::There(detail.into()), how: "" }
    }

    fn partial(detail: impl Into<String>, how: &'static str) -> Finding {
        Finding { state: State::Partial(detail.into()), how }
    }

    fn missing(why: impl Into<String>, how: &'static str) -> Finding {
        Finding { state: State::Missing(why.into()), how }
    }

    /// `Ok` is there; an error is missing, and `how` is looked up by its number.
    fn of(tried: io::Result<()>, what: &str, how: impl FnOnce(i32) -> &'static str) -> Finding {
        match tried {
            Ok(()) => Finding::there(""),
            Err(e) => Finding::missing(format!("{what}: {e}"), how(e.raw_os_error().unwrap_or(0))),
        }
    }
}

fn examine(capability: Capability) -> Finding {
    match capability {
        Capability::DevKvm => sources::dev_kvm(),
        Capability::KvmTracepoint => sources::kvm_tracepoint(),
        Capability::Bpf => sources::bpf(),
        Capability::PerfRing => sources::perf_ring(),
        Capability::Userfaultfd => sources::userfaultfd(),
        Capability::Tracefs => sources::tracefs(),
        Capability::IoUring => pages::io_uring(),
        Capability::Pfn => pages::pfn(),
        Capability::Kpageflags => pages::frame_file("/proc/kpageflags"),
        Capability::Kpagecount => pages::frame_file("/proc/kpagecount"),
        Capability::ProcmapQuery => pages::procmap_query(),
        Capability::PagemapScan => pages::pagemap_scan(),
        Capability::GuardPages => pages::guard_pages(),
        Capability::ProcessMadvise => pages::process_madvise(),
        Capability::SysV => machine::sysv(),
        Capability::Damon => machine::damon(),
        Capability::DiskFile => machine::disk_file(&std::env::temp_dir()),
        Capability::Hugetlb => machine::hugetlb(),
        Capability::Mseal => pages::mseal(),
        Capability::MemfdSecret => pages::memfd_secret(),
        Capability::Ksm => machine::ksm(),
        Capability::Swap => machine::swap(),
        Capability::Zram => machine::zram(),
        Capability::Uprobes => machine::uprobes(),
        Capability::Thp => machine::thp(),
        Capability::Compaction => machine::compaction(),
        Capability::Numa => machine::numa(),
        Capability::Ptrace => machine::ptrace(),
        Capability::PidfdGetfd => machine::pidfd_getfd(),
    }
}
