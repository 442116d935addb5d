// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr watch` on programs with a known number of changes, and what such a program notices of it: nothing.
//!
//! Counts are compared with those of a run that does its work zero times, so what the loader and the standard library do
//! falls out.

use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

const USERPTR: &str = env!("CARGO_BIN_EXE_userptr");

/// The subject, built static and dynamic.
fn subject(linkage: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    BUILT.get_or_init(|| {
        for (name, option) in
            [("static", "target-feature=+crt-static"), ("dynamic", "target-feature=-crt-static")]
        {
            let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
            let built = Command::new(rustc)
                .args(["--edition", "2024", "-O", "-C", option, "-o"])
                .arg(dir.join(format!("subject-{name}")))
                .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/watch/subject.rs"))
                .status();
            assert!(built.is_ok_and(|s| s.success()), "the {name} subject cannot be built");
        }
    });
    dir.join(format!("subject-{linkage}"))
}

/// Are the capabilities there? Says so if not.
fn able(test: &str) -> bool {
    ["dev_kvm", "kvm_tracepoint", "bpf", "ptrace", "pidfd_getfd"].into_iter().all(|name| {
        let has = Command::new(USERPTR).args(["doctor", "--has", name]).status();
        let there = has.is_ok_and(|s| s.success());
        if !there {
            println!("skipped: {test}: {name}: not on this machine");
        }
        there
    })
}

/// Runs with a deadline: a traced program that hangs must not hang the tests.
fn run(command: &mut Command) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    let (done, waited) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if waited.recv_timeout(Duration::from_secs(120)).is_err() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    });
    let output = child.wait_with_output().unwrap();
    let _ = done.send(());
    guard.join().unwrap();
    output
}

fn watch(options: &[&str], program: &Path, args: &[&str]) -> (Output, Value) {
    let file = tempfile(program, args);
    let mut command = Command::new(USERPTR);
    command.args(["watch", "--json", "--output"]).arg(&file).args(options).arg("--").arg(program).args(args);
    let output = run(&mut command);
    let text = std::fs::read_to_string(&file).unwrap_or_default();
    let json = serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text:?} {}", String::from_utf8_lossy(&output.stderr)));
    let _ = std::fs::remove_file(file);
    (output, json)
}

fn tempfile(program: &Path, args: &[&str]) -> PathBuf {
    let name = format!("{}-{}", program.file_name().unwrap().display(), args.join("-").replace('/', "_"));
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{:?}.json", std::thread::current().id()))
}

/// Count and pages of one cause.
fn amount(json: &Value, cause: &str) -> (i64, i64) {
    let causes = json["by_cause"].as_array().expect("by_cause");
    let of = |c: &Value| (c["count"].as_i64().unwrap(), c["pages"].as_i64().unwrap());
    causes.iter().find(|c| c["cause"] == cause).map_or((0, 0), of)
}

/// What n times more work adds.
fn added(options: &[&str], linkage: &str, way: &str, n: i64, cause: &str) -> (i64, i64) {
    let program = subject(linkage);
    let of = |n: i64| {
        let (output, json) = watch(options, &program, &[way, &n.to_string()]);
        assert!(output.status.success(), "{way}: {output:?}");
        assert_eq!((&json["lost"], &json["missed"]), (&Value::from(0), &Value::from(0)));
        amount(&json, cause)
    };
    let (none, some) = (of(0), of(n));
    (some.0 - none.0, some.1 - none.1)
}

#[test]
fn counts_are_exact_for_static_and_dynamic_programs() {
    if !able("counts_are_exact_for_static_and_dynamic_programs") {
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
    if !able("children_are_followed_when_asked_and_only_then") {
        return;
    }
    assert_eq!(added(&["--follow"], "static", "fork", 17, "munmap"), (17, 17));
    assert_eq!(added(&[], "static", "fork", 17, "munmap"), (0, 0));
    let (_, json) = watch(&["--follow"], &subject("dynamic"), &["fork", "3"]);
    assert_eq!(json["processes"].as_array().map(Vec::len), Some(2));
    assert_eq!(json["unwatched"], Value::Array(Vec::new()));
}

#[test]
fn copies_on_write_are_page_faults_one_for_each_page() {
    if !able("copies_on_write_are_page_faults_one_for_each_page") {
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
fn what_a_program_sees_of_itself_is_as_without_us() {
    if !able("what_a_program_sees_of_itself_is_as_without_us") {
        return;
    }
    for linkage in ["static", "dynamic"] {
        let program = subject(linkage);
        let alone = run(Command::new(&program).arg("state"));
        let (watched, _) = watch(&["--follow"], &program, &["state"]);
        assert!(alone.status.success() && !alone.stdout.is_empty());
        assert_eq!(String::from_utf8_lossy(&alone.stdout), String::from_utf8_lossy(&watched.stdout));
        assert_eq!(alone.stderr, watched.stderr);
    }
}

#[test]
fn the_exit_code_is_the_programs() {
    if !able("the_exit_code_is_the_programs") {
        return;
    }
    let program = subject("static");
    assert_eq!(watch(&[], &program, &["exit", "7"]).0.status.code(), Some(7));
    let (output, json) = watch(&[], &program, &["signal", "15"]);
    assert_eq!(output.status.code(), Some(128 + 15));
    assert_eq!(json["ended"], "signal 15");
}

#[test]
fn a_running_program_is_watched_and_let_go() {
    if !able("a_running_program_is_watched_and_let_go") {
        return;
    }
    let mut program = Command::new(subject("dynamic"))
        .args(["wait", "19"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut to, mut from) = (program.stdin.take().unwrap(), BufReader::new(program.stdout.take().unwrap()));
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    let file = tempfile(Path::new("attached"), &[]);
    let mut watcher = Command::new(USERPTR)
        .args(["watch", "--json", "--pid", &program.id().to_string(), "--output"])
        .arg(&file)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let traced = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap_or_default();
        status.lines().any(|l| l.starts_with("TracerPid:") && !l.ends_with("\t0"))
    };
    let patient = |what: &dyn Fn() -> bool| (0..2000).any(|_| what() || pause());
    assert!(patient(&traced), "never attached");
    // Attached is not yet heard: the VM comes within the first stop, before which the program cannot go on.
    std::thread::sleep(Duration::from_millis(300));
    to.write_all(b"go\n").unwrap();
    from.read_line(&mut line).unwrap();
    let interrupted = Command::new("kill").args(["-INT", &watcher.id().to_string()]).status().unwrap();
    assert!(interrupted.success() && watcher.wait().unwrap().success());
    assert!(!traced(), "still attached");
    to.write_all(b"end\n").unwrap();
    assert!(program.wait().unwrap().success());
    let json: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let _ = std::fs::remove_file(file);
    assert_eq!(amount(&json, "munmap").0, 19);
}

fn pause() -> bool {
    std::thread::sleep(Duration::from_millis(5));
    false
}

#[test]
fn a_tracer_that_is_killed_leaves_a_program_that_goes_on() {
    if !able("a_tracer_that_is_killed_leaves_a_program_that_goes_on") {
        return;
    }
    let mut watcher = Command::new(USERPTR)
        .args(["watch", "--"])
        .arg(subject("dynamic"))
        .args(["wait", "3"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut to, mut from) = (watcher.stdin.take().unwrap(), BufReader::new(watcher.stdout.take().unwrap()));
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    watcher.kill().unwrap();
    watcher.wait().unwrap();
    to.write_all(b"go\n").unwrap();
    line.clear();
    from.read_line(&mut line).unwrap();
    assert_eq!(line, "done\n");
}

#[test]
fn bad_input_gets_a_clear_error() {
    let fails = |args: &[&str]| {
        let output = run(Command::new(USERPTR).arg("watch").args(args));
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(fails(&[]).contains("required"));
    assert!(fails(&["--pid", "0"]).contains("0"));
    assert!(fails(&["--output", "/nonexistent/x", "--", "true"]).contains("/nonexistent/x"));
    if !able("bad_input_gets_a_clear_error") {
        return;
    }
    assert!(fails(&["--", "/nonexistent/program"]).contains("/nonexistent/program: No such file"));
    assert!(fails(&["--", "/etc/passwd"]).contains("/etc/passwd: Permission denied"));
    assert!(fails(&["--pid", "999999999"]).contains("no such process"));
    // Our own tracer, on a process that it traces.
    let mut first = Command::new(USERPTR)
        .args(["watch", "--", "sleep", "60"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let child = format!("/proc/{0}/task/{0}/children", first.id());
    let sleeper =
        || std::fs::read_to_string(&child).ok().and_then(|s| s.split_whitespace().next().map(str::to_owned));
    let mut pid = None;
    for _ in 0..2000 {
        pid = sleeper()
            .filter(|p| std::fs::read_to_string(format!("/proc/{p}/comm")).is_ok_and(|c| c == "sleep\n"));
        if pid.is_some() || pause() {
            break;
        }
    }
    let pid = pid.expect("the program runs");
    let error = fails(&["--pid", &pid]);
    assert!(error.contains("traces it already"), "{error}");
    let _ = Command::new("kill").args(["-9", &pid]).status();
    assert_eq!(first.wait().unwrap().code(), Some(128 + 9));
}
