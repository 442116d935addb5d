// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counts are those that the kernel's rules give, of what a program does to its own memory.

use crate::run::{able, added, subject, watch};
use serde_json::Value;

#[test]
fn counts_are_exact_for_static_and_dynamic_programs() {
    if !able() {
        return;
    }
    for linkage in ["static", "dynamic"] {
        let added = |way, n, cause| added(&[], linkage, way, n, cause);
        assert_eq!(added("munmap", 37, "munmap"), (37, 37), "{linkage}");
        assert_eq!(added("dontneed", 21, "madvise(MADV_DONTNEED)"), (21, 21), "{linkage}");
        assert_eq!(added("mprotect", 13, "mprotect"), (13, 13), "{linkage}");
        // What is moved away, then the old place once more as it is unmapped, and what was at the new place before.
        assert_eq!(added("mremap", 5, "mremap"), (15, 15), "{linkage}");
        assert_eq!(added("threads", 10, "madvise(MADV_FREE)"), (40, 40), "{linkage}");
        assert_eq!(added("close_range", 9, "munmap"), (9, 9), "{linkage}");
        assert_eq!(added("exec", 11, "munmap"), (11, 11), "{linkage}");
    }
}

#[test]
fn children_are_followed_when_asked_and_only_then() {
    if !able() {
        return;
    }
    assert_eq!(added(&["--follow"], "static", "fork", 17, "munmap"), (17, 17));
    assert_eq!(added(&[], "static", "fork", 17, "munmap"), (0, 0));
    let (_, json) = watch(&["--follow"], &subject("dynamic"), &["fork", "3"]);
    assert_eq!(json["processes"].as_array().map(Vec::len), Some(2));
    // Fork announces the vDSO because we have written to it: that is not the program's.
    let ranges = json["by_range"].as_array().unwrap();
    assert!(ranges.iter().any(|r| r["range"] == "[stack]"), "{ranges:?}");
    assert!(ranges.iter().all(|r| r["range"] != "[vdso]"), "{ranges:?}");
    assert_eq!(json["unwatched"], Value::Array(Vec::new()));
}

#[test]
fn copies_on_write_are_page_faults_one_for_each_page() {
    if !able() {
        return;
    }
    let (_, json) = watch(&[], &subject("static"), &["cow", "23"]);
    let ranges = json["by_range"].as_array().unwrap();
    let ours: Vec<_> = ranges.iter().filter(|r| r["range"] == "/memfd:watched").collect();
    // fork announces the mapping, all of it, once.
    assert_eq!(ours.len(), 1, "{ranges:?}");
    assert_eq!((&ours[0]["count"], &ours[0]["pages"]), (&Value::from(24), &Value::from(64 + 23)));
}

#[test]
fn the_caller_is_named_where_only_unwind_tables_lead_to_it() {
    if !able() {
        return;
    }
    // In a static program the C library is the program's own code, and the innermost place is the answer.
    let (output, json) = watch(&[], &subject("dynamic"), &["frameless", "12"]);
    assert!(output.status.success(), "{output:?}");
    let sites = json["by_site"].as_array().unwrap();
    let ours: Vec<_> = sites.iter().filter(|s| s["cause"] == "munmap" && s["count"] == 12).collect();
    assert_eq!(ours.len(), 1, "{sites:?}");
    assert!(ours[0]["site"].as_str().unwrap().starts_with("watch_frameless+"), "{sites:?}");
}
