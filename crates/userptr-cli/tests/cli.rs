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
        // Another test may have a swap device just now.
        if name == "swap" {
            continue;
        }
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
        &["live", "--race", "--seconds", "0"],
        &["live", "--save", "/no/such/directory/file"],
        &["diff", "--script", "/no/such/file"],
        &["diff", "--script", "/proc/self/status"],
        &["diff", "--list", "--seed", "2"],
        &["live-row", "no_such_event", "kvm", "pinned"],
        &["live-row", "munmap/raw", "no_such_source", "pinned"],
        &["live-row", "munmap/raw", "kvm", "no_such_device"],
        &["answer", "--profile", "v9_99"],
        &["answer", "--driver", "no such driver"],
        &["answer", "--explain", "i915-3.16/write/cow"],
        &["answer", "--explain", "i915-3.16/write/cow/v3_16", "--without", "no_such_callback"],
        &["answer", "--explain", "i915-3.16/write/cow/v3_16", "--replay", "@#"],
        &["answer", "--callbacks", "--cost"],
        &["answer", "--ledger", "--check", "/no/such/file"],
        &["mutate", "no such driver"],
        &["mutate", "--bound", "many"],
        &["mutate", "--json", "--all"],
    ] {
        let out = userptr(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        assert!(!out.stderr.is_empty(), "{args:?} says nothing");
    }
}

#[test]
fn help_has_an_example_for_every_command() {
    for args in [
        &["--help"][..],
        &["live", "--help"],
        &["doctor", "--help"],
        &["answer", "--help"],
        &["diff", "--help"],
        &["mutate", "--help"],
    ] {
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
    let words = ["live", "--race", "--rounds", "2000", "--seconds", "5", "--threads", "2", "--json"];
    let out = userptr(&words);
    let document = json(&out);
    for race in document["races"].as_array().unwrap() {
        let stale = race["stale"].as_u64().unwrap();
        match race["contestant"].as_str().unwrap() {
            "nothing" => assert_eq!(race["stale"], race["lookups"], "{race}"),
            "kvm" | "uffd" => assert_eq!(stale, 0, "{race}"),
            // Five seconds may be too few for a control that loses now and then.
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

/// One driver that has no change_pte beside copy-on-write, with and without the pair around it.
const SMALL: [&str; 8] = [
    "answer",
    "--driver",
    "design-start",
    "--path",
    "cow-file",
    "--profile",
    "v3_16,unwrapped_a",
    "--bound=0",
];

#[test]
fn the_table_says_what_breaks_and_how_far_it_looked() {
    let out = userptr(&SMALL);
    assert_eq!(out.status.code(), Some(0));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let reads = text.lines().find(|line| line.contains("design-start-with-seq read")).expect("a row");
    assert!(reads.split_whitespace().eq(["design-start-with-seq", "read", "ok0", "C0"]), "{text}");
    let writes = text.lines().find(|line| line.contains("design-start-with-seq write")).expect("a row");
    assert!(writes.split_whitespace().eq(["design-start-with-seq", "write", "ok0"]), "{text}");
    assert!(text.contains("C  coherence"), "{text}");
}

#[test]
fn a_table_does_not_depend_on_the_threads_and_its_schedules_replay() {
    let with = |threads| userptr(&[&SMALL[..], &["--json", "--threads", threads]].concat());
    let (one, two) = (with("1"), with("2"));
    assert_eq!(json(&one), json(&two));
    let cells = json(&one);
    let broken: Vec<_> =
        cells.as_array().unwrap().iter().filter(|cell| cell["broken"] != Value::Array(vec![])).collect();
    assert!(!broken.is_empty(), "{cells:#}");
    for cell in broken {
        let (name, found) = (cell["cell"].as_str().unwrap(), &cell["broken"][0]);
        let out = userptr(&["answer", "--explain", name, "--replay", found["replay"].as_str().unwrap()]);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains(found["rule"].as_str().unwrap()), "{name}: {text}");
    }
}

#[test]
fn callbacks_are_switched_off_one_by_one_and_change_pte_is_weighed() {
    let small = ["--driver", "kvm-3.16", "--path", "cow-file", "--bound", "0", "--json"];
    let kept = json(&userptr(&[&["answer", "--callbacks", "--profile", "v3_16"][..], &small].concat()));
    for line in kept.as_array().unwrap() {
        assert!(line["has"].as_str().unwrap().contains("change_pte"), "{line}");
        assert!(!line["needs"].as_str().unwrap().contains("change_pte"), "{line}");
    }
    let profiles = ["answer", "--change-pte", "--profile", "v3_16,unwrapped_a,v6_18"];
    let worth = json(&userptr(&[&profiles[..], &small].concat()));
    for line in worth.as_array().unwrap() {
        let (needed, dead) = match line["profile"].as_str().unwrap() {
            "v3_16" => (false, true),
            "unwrapped_a" => (true, false),
            _ => (false, false),
        };
        assert_eq!((&line["needed"], &line["dead"]), (&needed.into(), &dead.into()), "{line}");
    }
}

#[test]
fn what_an_operation_costs_is_counted() {
    let args =
        ["answer", "--cost", "--rounds", "3", "--driver", "design-exact", "--path", "cow-zero", "--json"];
    let lines = json(&userptr(&args));
    let unbinds = |profile: &str| {
        let mine = lines.as_array().unwrap().iter().filter(|line| line["profile"] == profile);
        mine.map(|line| line["unbinds"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!((unbinds("v3_16"), unbinds("unwrapped_a")), (1, 0), "{lines:#}");
}

#[test]
fn every_counterexample_of_the_ledger_replays() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/thread.md");
    let ledger = std::fs::read_to_string(file).expect("docs/thread.md");
    let mut replayed = 0;
    let mut rule = "";
    for line in ledger.lines() {
        if let Some(of) = line.strip_prefix("Counterexample (") {
            rule = of.split(',').next().unwrap();
        }
        let Some(args) = line.strip_prefix("userptr answer --explain") else { continue };
        let (cell, schedule) = args.split_once(" --replay ").expect("a replay string");
        let mut words = vec!["answer", "--explain"];
        words.extend(cell.split_whitespace());
        words.extend(["--replay", schedule.trim_matches('\'')]);
        let out = userptr(&words);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success() && text.contains(&format!(": {rule} (")), "{line}\n{text}");
        replayed += 1;
    }
    assert!(replayed > 10, "{replayed}");
}

fn can_run_diff() -> bool {
    [Capability::DevKvm, Capability::KvmTracepoint, Capability::Bpf, Capability::Pfn].into_iter().all(require)
}

#[test]
fn mutate_tells_what_became_of_everything_it_switched_off() {
    let out = userptr(&["mutate", "vfio", "--json"]);
    let document = json(&out);
    assert_eq!(out.status.code(), Some(0), "{document:#}");
    let fates = document.as_array().unwrap();
    let locks = fates.iter().filter(|fate| fate["off"].as_str().unwrap().starts_with("lock in ")).count();
    assert_eq!((fates.len(), locks), (5, 4));
    for fate in fates {
        assert_eq!((&fate["driver"], &fate["noticed"]), (&"vfio-6.13".into(), &true.into()), "{fate}");
        assert!(fate["by"].is_string() && fate["cell"].is_string() && fate["why"].is_null(), "{fate}");
        assert!(fate["executions"].as_u64() > Some(0) && fate["cells"].as_u64() > Some(0), "{fate}");
    }
    let text = userptr(&["mutate", "vfio", "--all"]);
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(text.contains("5 of 5 noticed (100.0 %)") && text.contains("lock in "), "{text}");
}

/// Where nobody is preempted, much survives that is needed.
#[test]
fn mutate_fails_where_too_much_survives() {
    let out = userptr(&["mutate", "amd-iommu-v2-3.16", "--bound", "0", "--json"]);
    let document = json(&out);
    assert_eq!(out.status.code(), Some(1), "{document:#}");
    let survivors = document.as_array().unwrap().iter().filter(|fate| fate["noticed"] == false);
    assert!(survivors.clone().count() > 0);
    assert!(survivors.clone().all(|fate| fate["by"].is_null() && fate["cell"].is_null()), "{document:#}");
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
