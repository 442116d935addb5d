// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command as a script sees it: exit codes, one JSON document, errors on standard error.

use std::process::{Command, Output};

use hostmm::capability::{Capability, Report};
use hostmm::testing::require;
use serde_json::Value;

fn userptr(args: &[&str]) -> Output {
    // Rows have deadlines of their own; this one is for the whole.
    Command::new("timeout")
        .args(["-k", "5", "300", env!("CARGO_BIN_EXE_userptr")])
        .args(args)
        .output()
        .expect("timeout and userptr start")
}

fn json(out: &Output) -> Value {
    serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("not one JSON document: {e}\n{}", String::from_utf8_lossy(&out.stdout)))
}

fn can_run_live() -> bool {
    [Capability::IoUring, Capability::Pfn, Capability::DevKvm, Capability::Userfaultfd]
        .into_iter()
        .all(require)
}

#[test]
fn doctor_tells_its_verdict_by_exit_code_and_document() {
    let out = userptr(&["doctor", "--json"]);
    let report = Report::new();
    assert_eq!(out.status.code(), Some(report.verdict().exit_code().into()));
    let document = json(&out);
    let capabilities = document["capabilities"].as_array().unwrap();
    assert_eq!(capabilities.len(), Capability::ALL.len());
    for entry in capabilities {
        assert!(["there", "partial", "missing"].contains(&entry["state"].as_str().unwrap()));
        assert!(!entry["how_to_get_it"].as_str().unwrap().is_empty() || entry["state"] == "there", "{entry}");
    }
    for capability in capabilities {
        let name = capability["name"].as_str().unwrap();
        let there = capability["state"] == "there";
        assert_eq!(userptr(&["doctor", "--has", name]).status.code(), Some(i32::from(!there)), "{name}");
    }
    assert_eq!(userptr(&["doctor", "--has", "no_such_thing"]).status.code(), Some(2));
}

#[test]
fn bad_input_is_refused_with_2_and_a_reason() {
    for args in [
        &["no-such-command"][..],
        &["live", "--only", "no such event"],
        &["live", "--rounds", "5"],
        &["live", "--race", "--rounds", "0"],
        &["live", "--race", "--threads", "0"],
        &["live", "--save", "/no/such/directory/file"],
        &["diff", "--script", "/no/such/file"],
        &["diff", "--script", "/proc/self/status"],
        &["diff", "--list", "--seed", "2"],
        &["live-row", "no_such_event", "kvm", "pinned"],
        &["live-row", "munmap/raw", "no_such_source", "pinned"],
        &["live-row", "munmap/raw", "kvm", "no_such_device"],
    ] {
        let out = userptr(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        assert!(!out.stderr.is_empty(), "{args:?} says nothing");
    }
}

#[test]
fn help_has_an_example_for_every_command() {
    for args in [&["--help"][..], &["live", "--help"], &["doctor", "--help"], &["diff", "--help"]] {
        let out = userptr(args);
        assert!(out.status.success());
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains("Example") && text.contains("Exit codes"), "{args:?}:\n{text}");
    }
}

#[test]
fn live_lists_every_event_with_its_declaration() {
    let rows = json(&userptr(&["live", "--list", "--json"]));
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), hostmm::disturb::catalogue().len());
    assert!(rows.iter().all(|row| row["event"].is_string() && row["why"] != ""));
}

#[test]
fn live_rows_hold_and_carry_their_event() {
    if !can_run_live() {
        return;
    }
    let out = userptr(&["live", "--only", "madv_dontneed", "--json"]);
    let document = json(&out);
    assert_eq!(out.status.code(), Some(0), "{document:#}");
    assert_eq!(document["holds"], true);
    let rows = document["rows"].as_array().unwrap();
    assert!(rows.len() >= 4);
    for row in rows {
        assert!(row["event"].as_str().unwrap().contains("madv_dontneed"));
        assert_eq!(row["no_notifier"]["pinned"]["ran"]["found"], "stale");
        assert_eq!(row["kvm"]["pinned"]["ran"]["found"], "coherent");
        assert_eq!(row["kvm"]["pinned"]["ran"]["heard"]["before_return"], true);
    }
}

#[test]
fn the_race_has_teeth_and_both_sources_win_it() {
    if !can_run_live() {
        return;
    }
    let out = userptr(&["live", "--race", "--rounds", "2000", "--threads", "2", "--json"]);
    let document = json(&out);
    for race in document["races"].as_array().unwrap() {
        let stale = race["stale"].as_u64().unwrap();
        match race["contestant"].as_str().unwrap() {
            "nothing" => assert_eq!(race["stale"], race["lookups"], "{race}"),
            "kvm" | "uffd" => assert_eq!(stale, 0, "{race}"),
            // Two thousand rounds may be too few for a control that loses now and then.
            _ => {}
        }
        assert_eq!(race["failed"], Value::Null, "{race}");
    }
}

#[test]
fn without_dev_kvm_live_says_so_and_uffd_alone_holds() {
    if !can_run_live() {
        return;
    }
    // A private mount namespace with nothing behind /dev/kvm: root alone can make one.
    let hidden = |args: &str| {
        let script =
            format!("mount --bind /dev/null /dev/kvm && exec {} {args}", env!("CARGO_BIN_EXE_userptr"));
        Command::new("timeout")
            .args(["-k", "5", "60", "unshare", "-m", "sh", "-c", &script])
            .output()
            .expect("unshare starts")
    };
    let out = hidden("live --only munmap/raw");
    assert_eq!(out.status.code(), Some(2));
    let why = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(why.contains("no kvm source") && why.contains("--source"), "{why}");
    assert_eq!(hidden("doctor").status.code(), Some(1));

    let out = hidden("live --only munmap/raw --source uffd --json");
    let document = json(&out);
    assert_eq!(out.status.code(), Some(0), "{document:#}");
    let row = &document["rows"][0];
    assert_eq!((&row["kvm"], &row["uffd"]["pinned"]["ran"]["found"]), (&Value::Null, &"coherent".into()));
}

fn can_run_diff() -> bool {
    [Capability::DevKvm, Capability::KvmTracepoint, Capability::Bpf, Capability::Pfn].into_iter().all(require)
}

#[test]
fn diff_lists_a_script_or_a_reason_for_every_path() {
    let listed = json(&userptr(&["diff", "--list", "--json"]));
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), mmu_check::PATHS.len());
    for path in listed {
        let scripts = path["scripts"].as_array().unwrap();
        assert!(scripts.is_empty() != path["without"].is_null(), "{path}");
    }
    assert!(String::from_utf8_lossy(&userptr(&["diff", "--list"]).stdout).contains("ksm-replace"));
}

#[test]
fn diff_holds_and_counts_what_it_was_told() {
    if !can_run_diff() {
        return;
    }
    let out = userptr(&["diff", "--ops", "800", "--seed", "9", "--json"]);
    let document = json(&out);
    assert_eq!(out.status.code(), Some(0), "{document:#}");
    assert_eq!(document["holds"], true);
    assert!(document["operations"].as_u64().unwrap() > 900 && document["ranges"].as_u64().unwrap() > 250);
    assert!(document["told_share"].as_f64().unwrap() < 0.01);
}

#[test]
fn diff_runs_a_script_from_a_file() {
    if !can_run_diff() {
        return;
    }
    let path = std::env::temp_dir().join(format!("userptr-diff-{}", std::process::id()));
    std::fs::write(&path, "mmap [4,8) PROT_READ|PROT_WRITE MAP_FIXED|MAP_PRIVATE|MAP_ANONYMOUS\nstore 5 = 7 # first touch\n\nmunmap [5,6)\n").unwrap();
    let out = userptr(&["diff", "--json", "--script", path.to_str().unwrap()]);
    std::fs::remove_file(&path).unwrap();
    let document = json(&out);
    assert_eq!(out.status.code(), Some(0), "{document:#}");
    assert_eq!((&document["operations"], &document["ranges"]), (&3.into(), &1.into()));
}
