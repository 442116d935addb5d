// SPDX-License-Identifier: MIT OR Apache-2.0
//! What /proc and kcmp(2) say of a task that is traced, or cannot be.

use super::Tgid;
use super::ptrace::Tid;
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::io::{self, Read};

const KCMP_VM: libc::c_long = 1;

/// CLOCK_MONOTONIC in nanoseconds: the clock of the stream's records and of an [`Observer`](super::Observer)'s times.
#[must_use]
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// A file of /proc, mostly in two reads: std's begins with small ones, and somebody is stopped meanwhile.
pub(super) fn read(path: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(8192);
    File::open(path)?.take(u64::MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// `/proc/TID/status`.
fn status(tid: Tid) -> Option<String> {
    String::from_utf8(read(&format!("/proc/{tid}/status")).ok()?).ok()
}

/// A field of it.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// A field of `/proc/TID/status`.
fn status_field(tid: Tid, name: &str) -> Option<String> {
    field(&status(tid)?, name).map(str::to_owned)
}

/// Process and parent of a thread.
pub(super) fn kinship(tid: Tid) -> Option<(Tgid, Tgid)> {
    let status = status(tid)?;
    let number = |name| field(&status, name)?.parse().ok();
    Some((number("Tgid")?, number("PPid")?))
}

/// Does a filter judge its system calls?
pub(super) fn has_seccomp(tid: Tid) -> bool {
    status_field(tid, "Seccomp").is_some_and(|mode| mode != "0")
}

/// Is it dead, if perhaps not waited for? Such a thread never stops again.
pub(super) fn is_dead(tid: Tid) -> bool {
    status_field(tid, "State").is_none_or(|state| state.starts_with(['Z', 'X']))
}

/// Its command.
pub(super) fn command(tgid: Tgid) -> String {
    let comm = read(&format!("/proc/{tgid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(&comm).trim_end().to_owned()
}

/// Do two processes live in one mm?
pub(super) fn same_mm(a: Tgid, b: Tgid) -> bool {
    // SAFETY: takes integers.
    unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) == 0 }
}

/// What to do about a process that cannot be seized.
pub(super) fn attach_hint(tgid: Tgid, cause: &io::Error) -> String {
    match cause.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => "there is no such process".to_owned(),
        Some(libc::EPERM) => match status_field(tgid, "TracerPid").as_deref() {
            Some("0") | None => {
                "it belongs to another user, or kernel.yama.ptrace_scope forbids it: run as root".to_owned()
            }
            Some(tracer) => format!("process {tracer} traces it already"),
        },
        _ => "see ptrace(2)".to_owned(),
    }
}
