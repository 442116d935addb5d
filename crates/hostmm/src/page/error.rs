// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why the kernel did not tell.

use std::io;
use std::path::PathBuf;

use mmu_notifier::{PageAddr, Range};

/// Why a question about pages or mappings has no answer.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// The handle was opened by this process's parent and still reads the parent's address space.
    #[error(
        "this handle was opened before fork and reads the parent's memory: open another one in the child"
    )]
    Forked,
    /// The process has no mm: it has exited, or is a kernel thread.
    #[error("process {pid} has no address space (it has exited, or is a kernel thread)")]
    NoProcess {
        /// The process.
        pid: u32,
    },
    /// The kernel refuses to this user.
    #[error("{path}: permission denied: {how}", path = path.display())]
    Permission {
        /// The file.
        path: PathBuf,
        /// What to do about it.
        how: &'static str,
    },
    /// No mapping is there.
    #[error("nothing is mapped at {range}{}", match next {
        Some(next) => format!(", the next mapping is {next}"),
        None => " nor after it".to_owned(),
    })]
    Unmapped {
        /// The hole, or the part of it that was asked for.
        range: Range,
        /// The next mapping above, if any.
        next: Option<Range>,
    },
    /// The page changed its frame each time that we looked.
    #[error("the page at {0:?} changed its frame during each of several readings: read it again")]
    Unsettled(PageAddr),
    /// Anything else.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PageError {
    pub(super) fn from_io(path: impl Into<PathBuf>, source: io::Error, pid: Option<u32>) -> PageError {
        let path = path.into();
        let how = if path.starts_with("/proc/kpageflags") || path.starts_with("/proc/kpagecount") {
            "it is for root (mode 0400)"
        } else {
            "it needs the right to ptrace the process: the same user and a dumpable process, or CAP_SYS_PTRACE"
        };
        match (source.raw_os_error(), pid) {
            (Some(libc::EACCES | libc::EPERM), _) => PageError::Permission { path, how },
            (Some(libc::ESRCH | libc::ENOENT), Some(pid)) => PageError::NoProcess { pid },
            _ => PageError::Io { path, source },
        }
    }
}
