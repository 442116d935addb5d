// SPDX-License-Identifier: MIT OR Apache-2.0
//! What cannot be watched: a clear error, exit code 2, and nothing left stopped.

use crate::run::{USERPTR, able, patient, run};
use hostmm::testing::skip_for;
use std::process::{Command, Stdio};

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
    if !able() {
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
    patient(&mut || {
        pid = sleeper()
            .filter(|p| std::fs::read_to_string(format!("/proc/{p}/comm")).is_ok_and(|c| c == "sleep\n"));
        pid.is_some()
    });
    let pid = pid.expect("the program runs");
    let error = fails(&["--pid", &pid]);
    assert!(error.contains("traces it already"), "{error}");
    let _ = Command::new("kill").args(["-9", &pid]).status();
    assert_eq!(first.wait().unwrap().code(), Some(128 + 9));
}

/// setpriv(1) in front of a command, as nobody. `None`: not here.
fn as_nobody(capabilities: &str) -> Option<Command> {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    if !capabilities.is_empty() {
        command.arg(format!("--inh-caps={capabilities}")).arg(format!("--ambient-caps={capabilities}"));
    }
    let works = Command::new("setpriv").args(["--reuid", "65534", "true"]).status();
    let reaches = command.args([USERPTR, "--version"]).stdout(Stdio::null()).status();
    let mut again = Command::new("setpriv");
    again.args(command.get_args().take_while(|arg| *arg != USERPTR));
    (works.is_ok_and(|s| s.success()) && reaches.is_ok_and(|s| s.success())).then_some(again)
}

#[test]
fn whoever_lacks_a_capability_is_told_so() {
    let Some(mut nobody) = as_nobody("") else {
        skip_for("setpriv", "not possible here");
        return;
    };
    let output = run(nobody.args([USERPTR, "watch", "--", "true"]));
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("userptr doctor"), "{error}");
}

#[test]
fn a_foreign_users_process_is_refused() {
    if !able() {
        return;
    }
    // All that watching needs, but not what tracing others' processes needs.
    let Some(mut nobody) = as_nobody("+bpf,+perfmon,+sys_admin,+dac_override") else {
        skip_for("setpriv", "not possible here");
        return;
    };
    let pid = std::process::id().to_string();
    let output = run(nobody.args([USERPTR, "watch", "--pid", &pid]));
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("another user"), "{error}");
}
