// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs of every kind: how they share an mm, get a new one, or make it hard to put a notifier on it.

use crate::run::{Session, USERPTR, able, added, amount, patient, run, status, subject, watch};
use hostmm::testing::skip_for;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn a_process_in_the_mm_of_another_is_counted_once() {
    if !able() {
        return;
    }
    for options in [&["--follow"][..], &[]] {
        for way in ["clone_vm", "clone_vm_parent"] {
            assert_eq!(added(options, "dynamic", way, 14, "munmap"), (14, 14), "{way} {options:?}");
        }
        let (_, json) = watch(options, &subject("static"), &["clone_vm", "3"]);
        assert_eq!(json["processes"].as_array().map(Vec::len), Some(1));
    }
}

#[test]
fn chains_of_vfork_and_exec_are_followed_to_their_end() {
    if !able() {
        return;
    }
    for linkage in ["static", "dynamic"] {
        let (output, json) = watch(&["--follow"], &subject(linkage), &["vfork", "4"]);
        assert!(output.status.success());
        assert_eq!(amount(&json, "madvise(MADV_FREE)"), (7, 7));
        assert_eq!(json["processes"].as_array().map(Vec::len), Some(5));
    }
    let (_, json) = watch(&[], &subject("static"), &["vfork", "4"]);
    assert_eq!(amount(&json, "madvise(MADV_FREE)"), (0, 0));
    assert_eq!(json["processes"].as_array().map(Vec::len), Some(1));
}

#[test]
fn exec_by_another_thread_than_the_first_is_an_exec() {
    if !able() {
        return;
    }
    for linkage in ["static", "dynamic"] {
        assert_eq!(added(&[], linkage, "thread_exec", 10, "madvise(MADV_FREE)"), (10, 10));
    }
}

#[test]
fn a_filter_that_kills_does_not_kill_for_our_calls() {
    if !able() {
        return;
    }
    assert_eq!(added(&["--follow"], "static", "seccomp", 9, "munmap"), (9, 9));
}

#[test]
fn a_full_table_of_descriptors_is_no_obstacle_and_stays_full() {
    if !able() {
        return;
    }
    let script = format!("ulimit -S -n 50; exec {} full_table 9", subject("static").display());
    let alone = run(Command::new("sh").args(["-c", &script]));
    let (watched, json) = watch(&["--follow"], Path::new("/bin/sh"), &["-c", &script]);
    assert!(alone.status.success() && watched.status.success(), "{watched:?}");
    assert_eq!(alone.stdout, watched.stdout);
    assert_eq!(json["unwatched"], Value::Array(Vec::new()));
    let child = json["processes"].as_array().unwrap().last().unwrap();
    assert!(child["changes"].as_i64() >= Some(9), "{json}");
}

#[test]
fn our_own_soft_limit_of_descriptors_is_none() {
    if !able() {
        return;
    }
    let file = crate::run::tempfile(Path::new("limit"), &[]);
    let work = "i=0; while [ $i -lt 60 ]; do sleep 2 & i=$((i + 1)); done; wait; ulimit -S -n";
    let script =
        format!("ulimit -S -n 50; exec {USERPTR} watch --follow --json --output \"$0\" -- sh -c '{work}'");
    let output = run(Command::new("sh").args(["-c", &script]).arg(&file));
    assert_eq!(output.stdout, b"50\n", "the program has the limit that we were given: {output:?}");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let _ = std::fs::remove_file(file);
    // Each of them by fork, then by exec.
    assert_eq!(json["processes"].as_array().map(Vec::len), Some(121));
    assert_eq!(json["unwatched"], Value::Array(Vec::new()));
}

#[test]
fn an_unprivileged_program_is_watched_like_any_other() {
    if !able() {
        return;
    }
    let program = subject("static");
    let nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups", program.to_str().unwrap()];
    let alone = Command::new("setpriv").args(nobody).args(["munmap", "1"]).stderr(Stdio::null()).status();
    if !alone.is_ok_and(|s| s.success()) {
        skip_for("setpriv", "not possible here");
        return;
    }
    let of = |n: &str| {
        let (output, json) =
            watch(&[], Path::new("/usr/bin/setpriv"), &[&nobody[..], &["munmap", n]].concat());
        assert!(output.status.success(), "{output:?}");
        amount(&json, "munmap").0
    };
    assert_eq!(of("15") - of("0"), 15);
}

/// A 32-bit program that does nothing but exit(3).
fn elf32() -> Vec<u8> {
    let code = [0xb8, 1, 0, 0, 0, 0xbb, 3, 0, 0, 0, 0xcd, 0x80];
    let (base, header, size) = (0x0804_8000_u32, 84_u32, 84 + 12_u32);
    let half = |value: u16| value.to_le_bytes();
    let word = |value: u32| value.to_le_bytes();
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // An executable for i386, version, entry, program headers, no sections, flags.
    [2, 3].iter().for_each(|v| file.extend(half(*v)));
    [1, base + header, 52, 0, 0].iter().for_each(|v| file.extend(word(*v)));
    // Sizes of this header and of its one program header.
    [52, 32, 1, 0, 0, 0].iter().for_each(|v| file.extend(half(*v)));
    // PT_LOAD of all of it, readable and executable.
    [1, 0, base, base, size, size, 5, 0x1000].iter().for_each(|v| file.extend(word(*v)));
    file.extend(code);
    file
}

#[test]
fn a_32_bit_program_runs_unwatched_and_that_is_said() {
    if !able() {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("exit3-i386");
    std::fs::write(&path, elf32()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    if Command::new(&path).status().ok().and_then(|s| s.code()) != Some(3) {
        skip_for("ia32", "this kernel cannot run it");
        return;
    }
    let script = format!("{}; echo $?", path.display());
    let (output, json) = watch(&["--follow"], Path::new("/bin/sh"), &["-c", &script]);
    assert_eq!(output.stdout, b"3\n");
    let unwatched = json["unwatched"].as_array().unwrap();
    assert_eq!(unwatched.len(), 1, "{json}");
    assert!(unwatched[0]["why"].as_str().unwrap().contains("32-bit"), "{json}");
    // Alone there is nothing to watch.
    let output = run(Command::new(USERPTR).args(["watch", "--"]).arg(&path));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && error.contains("32-bit"), "{error}");
}

/// Has the process a VM of its own?
fn holds_a_vm(pid: u32) -> bool {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    files
        .filter_map(|file| std::fs::read_link(file.ok()?.path()).ok())
        .any(|to| to.ends_with("anon_inode:kvm-vm"))
}

/// Watches a program that already runs while it works, and lets it go by an interrupt; what it said of its work.
fn attached(way: &str, n: i64) -> String {
    let mut program = Command::new(subject("dynamic"))
        .args([way, &n.to_string()])
        .env("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut to, mut from) = (program.stdin.take().unwrap(), BufReader::new(program.stdout.take().unwrap()));
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    let pid = program.id();
    let file = crate::run::tempfile(Path::new("attached"), &[way]);
    let mut watcher = Command::new(USERPTR)
        .args(["watch", "--json", "--pid", &pid.to_string(), "--output"])
        .arg(&file)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let tracers = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let tids: Vec<u32> = tasks.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
        tids.into_iter().filter(|tid| status(*tid, "TracerPid").is_some_and(|tracer| tracer != "0")).count()
    };
    assert!(patient(&mut || tracers() > 0), "never attached");
    // Attached is not yet heard, and the program must not work before: what is done there counts from before the VM.
    assert!(patient(&mut || holds_a_vm(watcher.id())), "never heard");
    to.write_all(b"go\n").unwrap();
    line.clear();
    from.read_line(&mut line).unwrap();
    let interrupted = Command::new("kill").args(["-INT", &watcher.id().to_string()]).status().unwrap();
    assert!(interrupted.success() && watcher.wait().unwrap().success());
    assert_eq!(tracers(), 0, "still attached");
    to.write_all(b"end\n").unwrap();
    assert!(program.wait().unwrap().success());
    let json: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let _ = std::fs::remove_file(file);
    assert_eq!(amount(&json, "munmap").0, n);
    line
}

#[test]
fn a_running_program_is_watched_and_let_go() {
    if able() {
        assert_eq!(attached("wait", 19), "done\n");
    }
}

#[test]
fn so_is_one_whose_first_thread_is_gone() {
    if able() {
        assert_eq!(attached("no_leader", 8), "done\n");
    }
}

#[test]
fn a_restartable_sequence_that_is_interrupted_is_aborted() {
    if able() {
        assert_eq!(attached("rseq", 6), "armed\n");
    }
}

#[test]
fn a_tracer_that_is_killed_leaves_a_program_that_goes_on() {
    if !able() {
        return;
    }
    let mut session = Session::start(&[], &subject("dynamic"), &["wait", "3"]);
    assert_eq!(session.line(), "ready\n");
    session.signal("KILL");
    session.say("go\n");
    assert_eq!(session.line(), "done\n");
    session.end();
}
