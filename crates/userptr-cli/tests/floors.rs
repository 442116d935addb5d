// SPDX-License-Identifier: MIT OR Apache-2.0
//! The floors of docs/architecture.md: a crate imports only crates on the floors below it.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

/// Crate and floor. A crate that is not here has no place in the house yet.
const FLOORS: &[(&str, u32)] = &[
    ("interleave", 0),
    ("mmu-notifier", 1),
    ("softmm", 2),
    ("hostmm", 2),
    ("drivers", 3),
    ("userptr", 3),
    ("mmu-check", 4),
    ("userptr-cli", 5),
];

/// Every way in which `deps` breaks the floors, in words.
fn violations(deps: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let floor = |name: &str| FLOORS.iter().find(|(n, _)| *n == name).map(|(_, f)| *f);
    let mut out = Vec::new();
    for (name, imports) in deps {
        let Some(mine) = floor(name) else {
            out.push(format!("{name} stands on no floor"));
            continue;
        };
        for import in imports.iter().filter(|i| deps.contains_key(*i)) {
            match floor(import) {
                Some(theirs) if theirs < mine => {}
                Some(theirs) => out.push(format!("{name} (floor {mine}) imports {import} (floor {theirs})")),
                None => out.push(format!("{name} imports {import}, which stands on no floor")),
            }
        }
    }
    out
}

fn workspace() -> BTreeMap<String, Vec<String>> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let meta: Value = serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON");
    let name = |v: &Value| v["name"].as_str().expect("a name").to_owned();
    let list = |v: &Value| v.as_array().cloned().unwrap_or_default();
    // Development dependencies may look down only as well, but never make a floor: cargo allows cycles there.
    list(&meta["packages"])
        .iter()
        .map(|p| (name(p), list(&p["dependencies"]).iter().map(name).collect()))
        .collect()
}

#[test]
fn every_import_goes_down() {
    let deps = workspace();
    assert!(deps.len() >= 5, "the workspace was read: {deps:?}");
    assert_eq!(violations(&deps), Vec::<String>::new());
}

#[test]
fn an_import_that_goes_up_or_sideways_or_nowhere_is_seen() {
    let mut deps = workspace();
    deps.get_mut("mmu-notifier").unwrap().push("hostmm".into());
    deps.get_mut("softmm").unwrap().push("hostmm".into());
    deps.insert("common".into(), vec![]);
    assert_eq!(violations(&deps).len(), 3);
}
