// SPDX-License-Identifier: MIT OR Apache-2.0
//! What others do to a program's memory: kernel threads, and processes that share its files.

use crate::run::{Session, able, amount, patient, subject};
use hostmm::setting::Setting;
use hostmm::testing::skip_for;
use std::path::Path;

#[test]
fn a_file_truncated_by_another_process_is_told_twice_for_each_mapping() {
    if !able() {
        return;
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("truncated");
    std::fs::write(&path, [7; 8 * 4096]).unwrap();
    let mut session = Session::start(&[], &subject("dynamic"), &["map_file", "3", path.to_str().unwrap()]);
    assert_eq!(session.line(), "ready\n");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    session.say("end\n");
    let (status, json) = session.end();
    assert!(status.success());
    let causes = json["by_cause"].as_array().unwrap();
    let ours: Vec<_> = causes
        .iter()
        .filter(|c| c["cause"].as_str().is_some_and(|c| c.starts_with("ftruncate by process ")))
        .collect();
    assert_eq!(ours.len(), 1, "{causes:?}");
    // Three mappings, twice each, eight pages.
    assert_eq!((&ours[0]["count"], &ours[0]["pages"]), (&6.into(), &48.into()));
}

#[test]
fn pages_that_ksm_merges_are_told_as_ksmds() {
    if !able() {
        return;
    }
    // `doctor` knows whether KSM is there.
    let has = std::process::Command::new(crate::run::USERPTR).args(["doctor", "--has", "ksm"]).status();
    if !has.is_ok_and(|s| s.success()) {
        skip_for("ksm", "not on this machine");
        return;
    }
    let set = |file: &str, value: &str| Setting::set(format!("/sys/kernel/mm/ksm/{file}"), value);
    let pairs = 6;
    let mut session = Session::start(&[], &subject("static"), &["ksm", &pairs.to_string()]);
    assert_eq!(session.line(), "ready\n");
    let merging = format!("/proc/{}/ksm_merging_pages", session.program());
    let merged = {
        let _settings = [("sleep_millisecs", "5"), ("pages_to_scan", "1000"), ("run", "1")]
            .map(|(f, v)| set(f, v).unwrap());
        patient(&mut || std::fs::read_to_string(&merging).is_ok_and(|n| n.trim() == (2 * pairs).to_string()))
    };
    session.say("end\n");
    let (status, json) = session.end();
    assert!(status.success());
    if !merged {
        skip_for("ksmd", "does not come to these pages in time");
        return;
    }
    assert_eq!(amount(&json, "kernel: ksmd"), (3 * pairs, 3 * pairs));
}
