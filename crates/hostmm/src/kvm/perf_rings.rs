// SPDX-License-Identifier: MIT OR Apache-2.0
//! Listening without BPF: one perf ring per CPU on the tracepoint.
//!
//! The rings are mapped read-only, so the kernel overwrites the oldest records and nobody has to read them. The head
//! of a ring counts every byte ever written: the check is one acquire load per CPU, and a head that has moved by more
//! than the ring holds is how the monitor knows that it lost records.
//!
//! It is coarser and dearer than the program: no buckets (the window is all that tells ranges apart, filtered by the
//! kernel), no ageing, no tgid or time in a record, a record written for each range whether it is read or not, and
//! **a CPU that comes online later is not heard**: [`super::Health::unheard_cpus`] says so, a watch cannot. Another BPF
//! program on the same tracepoint that returns 0 would also take the record away; ours returns 1.

use super::Options;
use super::canary::Canary;
use super::error::{self, OpenError, system};
use super::layout::Kind;
use super::parts::{self, check_ring};
use super::record::Record;
use crate::sys::perf::Ring;
use crate::sys::tracefs::Tracefs;
use std::os::fd::OwnedFd;

/// The rings and what is needed to read and to wait for them.
#[derive(Debug)]
pub(crate) struct PerfRings {
    pub(crate) rings: Vec<Ring>,
    pub(crate) cpus: Vec<u32>,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) fields: Fields,
}

/// Offsets of the two words in the tracepoint's record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields {
    start: usize,
    end: usize,
}

/// Data pages where nobody reads: enough to verify a record.
const QUIET_PAGES: usize = 2;

impl PerfRings {
    pub(crate) fn open(options: &Options, canary: &Canary) -> Result<PerfRings, OpenError> {
        if options.age {
            return Err(OpenError::Options("perf rings do not carry ageing; it needs BPF".to_owned()));
        }
        let pages = match options.ring {
            None => QUIET_PAGES,
            Some(len) => check_ring(len)? as usize / 4096,
        };
        let fs = Tracefs::open().map_err(error::tracepoint)?;
        let (event, start, end) = parts::tracepoint(&fs, Kind::Unmap)?;
        let fields = Fields { start: start as usize, end: end as usize };
        let filter = options.window.map(|w| {
            let c = canary.range();
            let overlaps =
                |r: mmu_notifier::Range| format!("(start < {:#x} && end > {:#x})", r.end(), r.start());
            format!("{} || {}", overlaps(w), overlaps(c))
        });
        let mut out = PerfRings { rings: Vec::new(), cpus: Vec::new(), fds: Vec::new(), fields };
        for cpu in online_cpus().map_err(system("reading the online CPUs"))? {
            let (ring, fd) =
                Ring::open(event.id, cpu as i32, pages, filter.as_deref(), options.ring.is_some())
                    .map_err(error::perf)?;
            out.rings.push(ring);
            out.cpus.push(cpu);
            out.fds.push(fd);
        }
        Ok(out)
    }
}

/// The records of one ring since `tail`; `None` if some were overwritten or are not as expected.
pub(crate) fn read(ring: &Ring, tail: &mut u64, cpu: u32, fields: Fields) -> Option<Vec<Record>> {
    let word = |raw: &[u8], at: usize| Some(u64::from_ne_bytes(raw.get(at..at + 8)?.try_into().ok()?));
    let record = |raw: Vec<u8>| {
        // common_pid of every trace event: the thread.
        let pid = u32::from_ne_bytes(raw.get(4..8)?.try_into().ok()?);
        let (start, end) = (word(&raw, fields.start)?, word(&raw, fields.end)?);
        Some(Record { kind: Kind::Unmap, start, end, cpu, tgid: 0, pid, ktime_ns: 0 })
    };
    ring.read(tail)?.into_iter().map(record).collect()
}

/// The CPUs that are online now.
pub(crate) fn online_cpus() -> std::io::Result<Vec<u32>> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
    parse_cpu_list(&text)
        .ok_or_else(|| std::io::Error::other(format!("cannot read the CPU list `{}`", text.trim())))
}

/// `0-3,5` as the kernel writes it.
fn parse_cpu_list(text: &str) -> Option<Vec<u32>> {
    let mut out = Vec::new();
    for part in text.trim().split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (u32, u32) = (from.parse().ok()?, to.parse().ok()?);
        if from > to || to > 1 << 16 {
            return None;
        }
        out.extend(from..=to);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0\n"), Some(vec![0]));
        assert_eq!(parse_cpu_list("0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        for bad in ["", "x", "3-1", "0-", "0-99999999"] {
            assert_eq!(parse_cpu_list(bad), None, "{bad}");
        }
    }
}
