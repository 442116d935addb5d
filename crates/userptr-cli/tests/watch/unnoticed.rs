// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a program notices of being watched, and who sends it signals, or starts and ends it: nothing.

use crate::run::{Session, able, patient, pause, run, status, subject, watch};
use hostmm::testing::skip_for;
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn what_a_program_sees_of_itself_is_as_without_us() {
    if !able() {
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

/// The watcher makes the program's thread stop by that signal.
#[test]
fn a_sigtrap_of_the_programs_own_stays_its_own() {
    if !able() {
        return;
    }
    for (ignored, is_ignored) in [("", false), ("trap '' TRAP; ", true)] {
        let script = format!("{ignored}exec {} trap", subject("static").display());
        let alone = run(Command::new("sh").args(["-c", &script]));
        let (watched, _) = watch(&["--follow"], std::path::Path::new("/bin/sh"), &["-c", &script]);
        let text = String::from_utf8_lossy(&alone.stdout);
        assert_eq!(text, format!("pending true blocked true ignored {is_ignored}\n"), "{alone:?}");
        assert_eq!(text, String::from_utf8_lossy(&watched.stdout));
    }
}

#[test]
fn the_exit_code_is_the_programs() {
    if !able() {
        return;
    }
    let program = subject("static");
    assert_eq!(watch(&[], &program, &["exit", "7"]).0.status.code(), Some(7));
    let (output, json) = watch(&[], &program, &["signal", "15"]);
    assert_eq!(output.status.code(), Some(128 + 15));
    assert_eq!(json["ended"], "signal 15");
}

#[test]
fn a_signal_sent_to_us_is_the_programs() {
    if !able() {
        return;
    }
    for signal in ["INT", "TERM"] {
        let mut session = Session::start(&[], &subject("static"), &["interrupts"]);
        assert_eq!(session.line(), "ready\n");
        session.signal(signal);
        assert_eq!(session.line(), "1 interrupts\n");
        let (status, json) = session.end();
        assert_eq!((status.code(), &json["ended"]), (Some(42), &"exit 42".into()));
    }
}

#[test]
fn ctrl_c_reaches_the_program_once_and_the_report_is_written() {
    if !able() {
        return;
    }
    if !Command::new("script").arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success()) {
        skip_for("script", "not installed");
        return;
    }
    use std::io::{BufRead, BufReader, Write};
    // Not every shell gives its place to its only command by itself, and one that stays dies of the signal too.
    let command = format!("exec {} watch -- {} interrupts", crate::run::USERPTR, subject("static").display());
    // A terminal of its own: what is written to it is typed.
    let mut terminal = Command::new("timeout")
        .args(["60", "script", "-qec", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut keys, screen) =
        (terminal.stdin.take().unwrap(), BufReader::new(terminal.stdout.take().unwrap()));
    let mut lines = screen.lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("ready")));
    keys.write_all(b"\x03").unwrap();
    let rest: Vec<String> = lines.collect();
    assert!(rest.iter().any(|line| line.contains("1 interrupts")), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("(exit 42)")), "{rest:?}");
    assert_eq!(terminal.wait().unwrap().code(), Some(42));
}

#[test]
fn daemons_are_waited_for_when_they_are_followed() {
    if !able() {
        return;
    }
    let [file, hold] =
        ["daemon-was-here", "daemon-waits"].map(|name| Path::new(env!("CARGO_TARGET_TMPDIR")).join(name));
    for (options, count) in [(&["--follow"][..], 12), (&[][..], 0)] {
        let _ = std::fs::remove_file(&file);
        // Whom nobody waits for is held until that has been seen.
        if count == 0 {
            std::fs::write(&hold, "").unwrap();
        }
        let args = ["daemon", "12", file.to_str().unwrap(), hold.to_str().unwrap()];
        let (output, json) = watch(options, &subject("static"), &args);
        assert!(output.status.success());
        assert_eq!(file.exists(), count != 0, "waited for it, or not");
        let _ = std::fs::remove_file(&hold);
        let programs = json["processes"].as_array().unwrap();
        assert_eq!(crate::run::amount(&json, "munmap").0, count + 1, "the loader's one, {json}");
        assert_eq!(programs.len(), if count == 0 { 1 } else { 3 });
        assert!(patient(&mut || file.exists()), "the daemon lives on without us");
    }
}

/// What could be left of a program whose tracer was killed: a process that is stopped or has a tracer.
fn is_stuck(pid: u32) -> bool {
    status(pid, "State").is_some_and(|s| s.starts_with(['t', 'T']))
        || status(pid, "TracerPid").is_some_and(|tracer| tracer != "0")
}

#[test]
fn a_tracer_killed_at_any_moment_leaves_nothing_stopped() {
    if !able() {
        return;
    }
    for round in 0..12 {
        let mut session = Session::start(&["--follow"], &subject("static"), &["forks"]);
        assert_eq!(session.line(), "ready\n");
        let program = session.program();
        std::thread::sleep(std::time::Duration::from_micros(1700 * round));
        session.signal("KILL");
        assert!(patient(&mut || status(session.watcher(), "State").is_none_or(|s| s.starts_with('Z'))));
        // It goes on with its forks, or was killed with us because one of its threads was borrowed.
        let children = || std::fs::read_to_string(format!("/proc/{program}/task/{program}/children"));
        for _ in 0..20 {
            let family = children().unwrap_or_default();
            let family = family.split_whitespace().filter_map(|pid| pid.parse().ok());
            for pid in family.chain([program]) {
                assert!(patient(&mut || !is_stuck(pid)), "round {round}: process {pid} is left stopped");
            }
            pause();
        }
        let _ = Command::new("kill").args(["-9", &program.to_string()]).stderr(Stdio::null()).status();
        session.end();
    }
}

#[test]
fn a_program_killed_at_any_moment_is_told_as_killed() {
    if !able() {
        return;
    }
    for round in 0..12 {
        let mut session = Session::start(&["--follow"], &subject("static"), &["forks"]);
        assert_eq!(session.line(), "ready\n");
        let program = session.program();
        std::thread::sleep(std::time::Duration::from_micros(1100 * round));
        assert!(Command::new("kill").args(["-9", &program.to_string()]).status().unwrap().success());
        let (status, json) = session.end();
        assert_eq!((status.code(), &json["ended"]), (Some(128 + 9), &"signal 9".into()), "round {round}");
    }
}
