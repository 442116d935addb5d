// SPDX-License-Identifier: MIT OR Apache-2.0
//! Building the subject, watching it, reading what was counted. Everything has a deadline: a traced program that hangs
//! must not hang the tests.

use hostmm::testing::skip_for;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// Nothing here takes longer.
const DEADLINE: Duration = Duration::from_secs(300);

pub(crate) const USERPTR: &str = env!("CARGO_BIN_EXE_userptr");

/// The subject, built static and dynamic.
pub(crate) fn subject(linkage: &str) -> PathBuf {
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
pub(crate) fn able() -> bool {
    ["dev_kvm", "kvm_tracepoint", "bpf", "ptrace", "pidfd_getfd"].into_iter().all(|name| {
        let has = Command::new(USERPTR).args(["doctor", "--has", name]).status();
        let there = has.is_ok_and(|s| s.success());
        if !there {
            skip_for(name, "not on this machine");
        }
        there
    })
}

/// Runs with a deadline: a traced program that hangs must not hang the tests.
pub(crate) fn run(command: &mut Command) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    let (done, waited) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if waited.recv_timeout(DEADLINE).is_err() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    });
    let output = child.wait_with_output().unwrap();
    let _ = done.send(());
    guard.join().unwrap();
    output
}

pub(crate) fn watch(options: &[&str], program: &Path, args: &[&str]) -> (Output, Value) {
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

pub(crate) fn tempfile(program: &Path, args: &[&str]) -> PathBuf {
    let name = format!("{}-{}", program.file_name().unwrap().display(), args.join("-").replace('/', "_"));
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{:?}.json", std::thread::current().id()))
}

/// Count and pages of one cause.
pub(crate) fn amount(json: &Value, cause: &str) -> (i64, i64) {
    let causes = json["by_cause"].as_array().expect("by_cause");
    let of = |c: &Value| (c["count"].as_i64().unwrap(), c["pages"].as_i64().unwrap());
    causes.iter().find(|c| c["cause"] == cause).map_or((0, 0), of)
}

/// What n times more work adds: what the loader and the standard library do falls out.
pub(crate) fn added(options: &[&str], linkage: &str, way: &str, n: i64, cause: &str) -> (i64, i64) {
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

/// A program that is watched while a test talks to it: both end with this.
pub(crate) struct Session {
    watcher: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    file: PathBuf,
    guard: Option<(std::sync::mpsc::Sender<()>, std::thread::JoinHandle<()>)>,
}

impl Session {
    /// Watches `program args` until it ends.
    pub(crate) fn start(options: &[&str], program: &Path, args: &[&str]) -> Session {
        let file = tempfile(program, args);
        let mut command = Command::new(USERPTR);
        command
            .args(["watch", "--json", "--output"])
            .arg(&file)
            .args(options)
            .arg("--")
            .arg(program)
            .args(args);
        // A group of its own, to be killed whole.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        let mut watcher = command.spawn().unwrap();
        let group = format!("-{}", watcher.id());
        let (done, waited) = std::sync::mpsc::channel::<()>();
        let guard = std::thread::spawn(move || {
            if waited.recv_timeout(DEADLINE).is_err() {
                let _ = Command::new("kill").args(["-9", "--", &group]).status();
            }
        });
        let (to, from) = (watcher.stdin.take(), BufReader::new(watcher.stdout.take().unwrap()));
        Session { watcher, to, from, file, guard: Some((done, guard)) }
    }

    pub(crate) fn watcher(&self) -> u32 {
        self.watcher.id()
    }

    /// The program's next line; empty at its end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        line
    }

    pub(crate) fn say(&mut self, line: &str) {
        self.to.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
    }

    /// Sends the watcher a signal, by name.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.watcher().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// The process that the watcher started.
    pub(crate) fn program(&self) -> u32 {
        let path = format!("/proc/{0}/task/{0}/children", self.watcher());
        let first = || std::fs::read_to_string(&path).ok()?.split_whitespace().next()?.parse().ok();
        let mut found = None;
        patient(&mut || {
            found = first();
            found.is_some()
        });
        found.expect("the program was never started")
    }

    /// Waits for the end of both.
    pub(crate) fn end(mut self) -> (ExitStatus, Value) {
        drop(self.to.take());
        let status = self.watcher.wait().unwrap();
        if let Some((done, guard)) = self.guard.take() {
            let _ = done.send(());
            guard.join().unwrap();
        }
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        let _ = std::fs::remove_file(&self.file);
        (status, serde_json::from_str(&text).unwrap_or_default())
    }
}

/// Waits until `what`, at most a minute.
pub(crate) fn patient(what: &mut dyn FnMut() -> bool) -> bool {
    (0..12_000).any(|_| what() || pause())
}

pub(crate) fn pause() -> bool {
    std::thread::sleep(Duration::from_millis(5));
    false
}

/// A line of `/proc/PID/status`; `None` when there is no such process.
pub(crate) fn status(pid: u32, field: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}
