// SPDX-License-Identifier: MIT OR Apache-2.0
//! The report against what can be found out otherwise, as root and as nobody.

use std::path::Path;
use std::time::Duration;

use super::*;
use crate::testing::{become_nobody, in_child};

const DEADLINE: Duration = Duration::from_secs(30);

fn state(report: &Report, capability: Capability) -> &'static str {
    report.entry(capability).unwrap().state
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Every file in `/sys` and `/proc` that a probe looks at for writing.
const SETTINGS: [&str; 5] = [
    "/sys/kernel/mm/ksm/run",
    "/proc/sys/vm/nr_hugepages",
    "/proc/partitions",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/proc/swaps",
];

#[test]
fn the_report_is_whole_and_changes_nothing() {
    in_child("capability::tests::the_report_is_whole_and_changes_nothing", DEADLINE, || {
        let settings = || SETTINGS.map(|path| std::fs::read_to_string(path).ok());
        let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        // Other tests set things meanwhile. A probe that changed something would do it every time.
        let pass = || {
            let before = (settings(), fds(), mounts());
            let report = Report::new();
            ((settings(), fds(), mounts()) == before).then_some(report)
        };
        let report = (0..20).find_map(|_| pass()).expect("every pass changed something");
        assert_eq!(report.capabilities.len(), Capability::ALL.len());
        for entry in &report.capabilities {
            assert_eq!(entry.state == "there", entry.how_to_get_it.is_empty(), "{entry:?}");
            assert!(entry.state == "there" || !entry.detail.is_empty(), "{entry:?}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["verdict"], report.verdict().to_string());
        assert_eq!(json["capabilities"][0]["name"], "dev_kvm");
        assert!(!report.kernel.is_empty());
        println!("{report:#?}");
    });
}

#[test]
fn root_has_what_root_must_have() {
    in_child("capability::tests::root_has_what_root_must_have", DEADLINE, || {
        if !is_root() {
            return;
        }
        let report = Report::new();
        let there = |capability| state(&report, capability) == "there";
        // Each against another sign of the same thing.
        assert_eq!(there(Capability::DevKvm), Path::new("/dev/kvm").exists());
        assert_eq!(there(Capability::Kpageflags), Path::new("/proc/kpageflags").exists());
        assert_eq!(there(Capability::Kpagecount), Path::new("/proc/kpagecount").exists());
        assert_eq!(there(Capability::Ksm), Path::new("/sys/kernel/mm/ksm").exists());
        assert_eq!(there(Capability::Compaction), Path::new("/proc/sys/vm/compact_memory").exists());
        let (major, rest) = report.kernel.split_once('.').unwrap();
        let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let version: (u32, u32) = (major.parse().unwrap(), minor.parse().unwrap());
        assert_eq!(there(Capability::ProcmapQuery), version >= (6, 11));
        assert_eq!(there(Capability::PagemapScan), version >= (6, 7));
        assert_eq!(there(Capability::GuardPages), version >= (6, 13));
        assert_eq!(there(Capability::ProcessMadvise), version >= (6, 13));
        assert_eq!(there(Capability::Zram), Path::new("/sys/class/zram-control").exists());
        assert_eq!(there(Capability::SysV), Path::new("/proc/sys/kernel/shmmax").exists());
        assert_eq!(there(Capability::Hugetlb), Path::new("/sys/kernel/mm/hugepages").exists());
        assert_eq!(there(Capability::Mseal), version >= (6, 10));
    });
}

#[test]
fn nobody_has_what_nobody_may_have() {
    in_child("capability::tests::nobody_has_what_nobody_may_have", DEADLINE, || {
        if !is_root() {
            return;
        }
        let root = Report::new();
        become_nobody();
        let nobody = Report::new();
        assert_eq!(nobody.uid, crate::testing::NOBODY);
        for capability in [
            Capability::Pfn,
            Capability::Kpageflags,
            Capability::Kpagecount,
            Capability::Bpf,
            Capability::Ksm,
            Capability::Zram,
            Capability::Compaction,
            Capability::Hugetlb,
            Capability::Damon,
            Capability::Uprobes,
        ] {
            let entry = nobody.entry(capability).unwrap();
            assert!(entry.state == "missing" && !entry.how_to_get_it.is_empty(), "{entry:?}");
        }
        for capability in [
            Capability::ProcmapQuery,
            Capability::PagemapScan,
            Capability::GuardPages,
            Capability::Mseal,
            Capability::MemfdSecret,
            Capability::ProcessMadvise,
            Capability::SysV,
            Capability::DiskFile,
            Capability::Thp,
            Capability::PidfdGetfd,
        ] {
            assert_eq!(state(&nobody, capability), state(&root, capability), "{capability} is for everybody");
        }
        if state(&root, Capability::Userfaultfd) == "there" {
            assert_ne!(state(&nobody, Capability::Userfaultfd), "missing", "user mode only is for everybody");
        }
        // root may do whatever nobody may.
        for (all, some) in root.capabilities.iter().zip(&nobody.capabilities) {
            if all.name == Capability::Swap.name() {
                continue; // other tests swap
            }
            assert!(all.state != "missing" || some.state == "missing", "{all:?} {some:?}");
        }
        assert!(nobody.verdict().exit_code() >= root.verdict().exit_code());
        println!("{nobody:#?}");
    });
}

#[test]
fn a_probe_of_one_is_the_entry_of_all() {
    in_child("capability::tests::a_probe_of_one_is_the_entry_of_all", DEADLINE, || {
        let report = Report::new();
        let by_others = [Capability::Swap];
        for capability in Capability::ALL.iter().filter(|c| !by_others.contains(c)) {
            let usable = probe(*capability).is_usable();
            assert_eq!(usable, state(&report, *capability) != "missing", "{capability}");
        }
    });
}
