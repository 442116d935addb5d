// SPDX-License-Identifier: MIT OR Apache-2.0
//! How many files a process may have open (RLIMIT_NOFILE), changed for a while.

use super::Tgid;
use std::ptr::{null, null_mut};

/// By how much a limit is raised.
#[derive(Debug, Clone, Copy)]
pub(super) enum Raise {
    /// So many more, above the hard limit if need be (CAP_SYS_RESOURCE).
    By(u64),
    /// The soft limit up to the hard one.
    ToHard,
}

/// A raised limit; dropping it puts the old one back.
pub(super) struct FileLimit {
    tgid: Tgid,
    old: libc::rlimit,
}

impl FileLimit {
    /// Raises that of process `tgid` (0: ours). `None`: not allowed.
    pub(super) fn raise(tgid: Tgid, raise: Raise) -> Option<FileLimit> {
        let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: a local struct to write to; no new limit.
        let got = unsafe { libc::prlimit(tgid, libc::RLIMIT_NOFILE, null(), &raw mut old) };
        let cur = match raise {
            Raise::By(more) => old.rlim_cur.checked_add(more)?,
            Raise::ToHard => old.rlim_max,
        };
        let new = libc::rlimit { rlim_cur: cur, rlim_max: old.rlim_max.max(cur) };
        (got == 0 && set(tgid, &new)).then_some(FileLimit { tgid, old })
    }

    /// The limit that was there, for a child that is to have it.
    pub(super) fn old(&self) -> libc::rlimit {
        self.old
    }
}

impl Drop for FileLimit {
    fn drop(&mut self) {
        set(self.tgid, &self.old);
    }
}

fn set(tgid: Tgid, limit: &libc::rlimit) -> bool {
    // SAFETY: a struct to read from; the old limit is not asked for.
    unsafe { libc::prlimit(tgid, libc::RLIMIT_NOFILE, limit, null_mut()) == 0 }
}
