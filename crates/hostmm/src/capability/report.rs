// SPDX-License-Identifier: MIT OR Apache-2.0
//! All probes together, for `userptr doctor`.

use std::fmt;

use serde::Serialize;

use super::{Capability, State, examine, sources};

/// What one probe found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// [`Capability::name`].
    pub name: &'static str,
    /// `there`, `partial` or `missing`.
    pub state: &'static str,
    /// What was found, or why it is missing. May be empty where it is there.
    pub detail: String,
    /// What does not work without it.
    pub needed_for: &'static str,
    /// Group, capability, sysctl, kernel version or configuration. Empty where nothing is missing.
    pub how_to_get_it: &'static str,
}

/// Which sources this process can open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Source kvm: hears everything.
    Complete,
    /// Source uffd alone: does not hear truncate, hole punch, mprotect, copy-on-write, swap, migration, ...
    Partial,
    /// No source.
    None,
}

impl Verdict {
    /// Exit status of `userptr doctor`.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Verdict::Complete => 0,
            Verdict::Partial => 1,
            Verdict::None => 2,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Complete => "complete",
            Verdict::Partial => "partial",
            Verdict::None => "none",
        })
    }
}

/// What this machine offers to this process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Release of the running kernel.
    pub kernel: String,
    /// `none`, `integrity` or `confidentiality`; absent where this process cannot tell.
    pub lockdown: Option<String>,
    /// Effective user.
    pub uid: u32,
    /// Which sources can be opened.
    pub verdict: Verdict,
    /// One for each of [`Capability::ALL`], in that order.
    pub capabilities: Vec<Entry>,
}

impl Report {
    /// Probe everything. Changes nothing and cannot hang; some 10 ms.
    #[must_use]
    pub fn new() -> Report {
        let findings: Vec<_> = Capability::ALL.iter().map(|c| (*c, examine(*c))).collect();
        let state = |wanted| findings.iter().find(|(c, _)| *c == wanted).map(|(_, f)| &f.state);
        let verdict = verdict(|c| state(c).is_some_and(State::is_usable));
        let capabilities = findings
            .iter()
            .map(|(capability, finding)| Entry {
                name: capability.name(),
                state: match finding.state {
                    State::There(_) => "there",
                    State::Partial(_) => "partial",
                    State::Missing(_) => "missing",
                },
                detail: finding.state.detail().to_owned(),
                needed_for: capability.needed_for(),
                how_to_get_it: finding.how,
            })
            .collect();
        Report {
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            lockdown: sources::lockdown(),
            uid: rustix::process::geteuid().as_raw(),
            verdict,
            capabilities,
        }
    }

    /// Which sources can be opened.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// What was found of one capability.
    #[must_use]
    pub fn entry(&self, capability: Capability) -> Option<&Entry> {
        self.capabilities.iter().find(|e| e.name == capability.name())
    }
}

impl Default for Report {
    fn default() -> Report {
        Report::new()
    }
}

fn verdict(has: impl Fn(Capability) -> bool) -> Verdict {
    let tracepoint = has(Capability::DevKvm) && has(Capability::KvmTracepoint);
    // BPF programs hang on a perf event, which needs no ring of its own.
    if tracepoint && (has(Capability::Bpf) || has(Capability::PerfRing)) {
        Verdict::Complete
    } else if has(Capability::Userfaultfd) {
        Verdict::Partial
    } else {
        Verdict::None
    }
}

#[cfg(test)]
mod tests {
    use Capability::*;

    use super::*;

    #[test]
    fn a_complete_source_needs_a_vm_its_event_and_a_way_to_hear_it() {
        let of = |there: &[Capability]| verdict(|c| there.contains(&c)).exit_code();
        assert_eq!(of(&[DevKvm, KvmTracepoint, Bpf]), 0);
        assert_eq!(of(&[DevKvm, KvmTracepoint, PerfRing]), 0);
        assert_eq!(of(&[DevKvm, KvmTracepoint, Userfaultfd]), 1);
        assert_eq!(of(&[DevKvm, Bpf, PerfRing, Userfaultfd]), 1);
        assert_eq!(of(&[KvmTracepoint, Bpf, PerfRing]), 2);
        assert_eq!(of(&[]), 2);
    }
}
