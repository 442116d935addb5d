// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr bench` as a script sees it. No time is asserted; that nothing of ours is stale is.

use std::path::Path;
use std::process::{Command, Output};

use hostmm::capability::Capability;
use hostmm::testing::{require, skip_for};
use serde_json::Value;

fn bench(args: &[&str]) -> Output {
    Command::new("timeout")
        .args(["-k", "5", "200", env!("CARGO_BIN_EXE_userptr"), "bench"])
        .args(args)
        .output()
        .expect("timeout and userptr start")
}

fn json(out: &Output) -> Value {
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
        let (said, complained) = (&out.stdout, &out.stderr);
        panic!("{e}: {}\n{}", String::from_utf8_lossy(said), String::from_utf8_lossy(complained))
    })
}

fn has_source() -> bool {
    [Capability::DevKvm, Capability::Bpf, Capability::Userfaultfd, Capability::IoUring]
        .into_iter()
        .all(require)
}

fn list<'v>(document: &'v Value, name: &str) -> &'v [Value] {
    document[name].as_array().expect(name)
}

/// Is the peer there? Where it is not the document must say so, and how to get it.
fn has_ucx(document: &Value) -> bool {
    let missing = list(document, "missing").iter().find(|entry| entry[0] == "ucx");
    if let Some(entry) = missing {
        let why = entry[1].as_str().unwrap();
        assert!(why.contains("apt-get install libucx0"), "{why}");
        skip_for("ucx", why);
    }
    missing.is_none()
}

#[test]
fn every_cache_is_measured_and_ours_is_never_stale() {
    if !has_source() {
        return;
    }
    let plots = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-plots");
    let out = bench(&["--quick", "--json", "--plots", plots.to_str().unwrap()]);
    let document = json(&out);
    assert_eq!(out.status.code(), Some(0), "{document:#}");
    let cells = list(&document, "cells");
    let ucx = has_ucx(&document);
    let mut sides = vec!["kvm", "uffd"];
    sides.extend(ucx.then_some("ucx"));
    for side in &sides {
        for what in ["hit", "miss", "unmap", "churn", "hit_under_glibc"] {
            let mut of = cells.iter().filter(|c| c["side"] == *side && c["what"] == what).peekable();
            assert!(of.peek().is_some(), "{side} has no {what}");
            for cell in of {
                assert_eq!(cell["failed"], Value::Null, "{cell}");
                assert!(cell["nanos"].as_f64().unwrap() > 0.0, "{cell}");
                assert_eq!(cell["stale"], 0, "{cell}");
                if what == "miss" {
                    assert_eq!(cell["missed"], cell["lookups"], "{cell}");
                }
            }
        }
    }
    let changes = list(&document, "changes");
    assert!(!changes.is_empty());
    let verdict = |change: &str, side: &str| {
        let row = changes.iter().find(|row| row["change"] == change).expect(change);
        row["verdicts"][side].clone()
    };
    for row in changes {
        assert_eq!(row["verdicts"]["kvm"], "coherent", "{row}");
    }
    if ucx {
        assert_eq!(verdict("munmap_mmap/libc", "ucx"), "coherent", "the peer works as it is meant to");
        for missed in ["munmap_mmap/raw", "truncate/raw", "madv_dontneed_locked/libc"] {
            assert_eq!(verdict(missed, "ucx"), "stale", "the oracle sees a stale page");
        }
    }
    for plot in ["hit-1-thread.svg", "changes.svg"] {
        let svg = std::fs::read_to_string(plots.join(plot)).expect(plot);
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{plot}");
        for name in &sides {
            assert!(svg.contains(name), "{plot} does not name {name}");
        }
    }
}

#[test]
fn a_table_names_the_goals_and_what_was_found() {
    if !has_source() {
        return;
    }
    let out = bench(&["--quick", "--part", "churn,hit"]);
    assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout);
    for words in ["0 stale hits of ours", "hit, 1000 registrations", "load ", "malloc, get, free"] {
        assert!(text.contains(words), "{words:?} is not in\n{text}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    for args in [&["--batches", "0"][..], &["--part", "nothing"], &["--plots", "/proc/nothing"]] {
        let out = bench(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        assert!(out.stdout.is_empty(), "{args:?}");
        assert!(!out.stderr.is_empty(), "{args:?}");
    }
}
