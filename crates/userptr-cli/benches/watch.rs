// SPDX-License-Identifier: MIT OR Apache-2.0
//! What being watched costs real programs: each runs with and without `userptr watch --follow`, in turn, short and long.
//! `cargo bench -p userptr-cli --bench watch -- [--short | --long] [NAME...]`. A program that is not installed is skipped.
//!
//! Two times are compared with the program's when it is alone: that of the program (from its exec to the end of its last
//! process, as the report has it; of a server that of its client) and that of the whole command, with the watcher's start,
//! end and report. The goal is about the program's. On a busy machine both are mostly the others' doing; the processor time of
//! all of it, program, clients and watcher, is not, and is the third. Given are medians of the ratios of neighbouring runs, and beside them
//! the middle half of the ratios of the program's times, which is how much noise there is.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Of short runs and of long ones.
const ROUNDS: (usize, usize) = (15, 7);
/// How much more a long run does.
const LONG: usize = 4;

/// Where the programs keep their files.
struct Place(PathBuf);

impl Place {
    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

struct Case {
    name: &'static str,
    needs: &'static [&'static str],
    prepare: fn(&Place),
    /// Runs it, with `watch` in front, if there is a file for what is heard; how much it does: 1 or [`LONG`].
    run: fn(&Place, Option<&Path>, usize) -> Duration,
    /// What is timed is its client.
    server: bool,
}

impl Case {
    const fn program(
        name: &'static str,
        prepare: fn(&Place),
        run: fn(&Place, Option<&Path>, usize) -> Duration,
    ) -> Case {
        Case { name, needs: &[], prepare, run, server: false }
    }
}

const CASES: &[Case] = &[
    Case { needs: &["sqlite3"], ..Case::program("sqlite3", nothing, sqlite) },
    Case { needs: &["git"], ..Case::program("git gc", git_clone, git_gc) },
    Case { needs: &["git"], ..Case::program("git repack -adf", git_clone, git_repack) },
    Case { needs: &["python3"], ..Case::program("python3 fork", nothing, python) },
    Case { needs: &["rustc"], ..Case::program("rustc", nothing, rustc) },
    Case {
        needs: &["redis-server", "redis-benchmark"],
        server: true,
        ..Case::program("redis BGSAVE", nothing, redis)
    },
    Case {
        needs: &["pgbench", "setpriv"],
        server: true,
        ..Case::program("PostgreSQL pgbench", initdb, postgres)
    },
];

fn nothing(_: &Place) {}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let only = |option: &str| args.iter().any(|arg| arg == option);
    let wanted: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let dir = std::env::temp_dir().join(format!("userptr-watch-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory for the programs' files");
    let place = Place(dir);
    println!(
        "{:<25} {:>8} {:>8} {:>7} {:>9} {:>8} {:>7} {:>7} {:>9} {:>10}  load",
        "", "alone", "program", "ratio", "half of it", "command", "ratio", "CPU", "changes", "per second"
    );
    for case in CASES {
        if !wanted.is_empty() && !wanted.iter().any(|name| case.name.contains(name.as_str())) {
            continue;
        }
        if let Some(program) = case.needs.iter().find(|program| !is_there(program)) {
            println!("skipped: {}: {program}: not installed", case.name);
            continue;
        }
        (case.prepare)(&place);
        for (length, scale) in [("short", 1), ("long", LONG)] {
            if only(&format!("--{length}")) || !(only("--short") || only("--long")) {
                measure(case, &place, length, scale);
            }
        }
    }
    let _ = std::fs::remove_dir_all(&place.0);
}

fn is_there(program: &str) -> bool {
    Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// What one pair of runs took, in seconds.
struct Round {
    alone: f64,
    program: f64,
    command: f64,
    /// Processor time watched by that alone.
    cpu: f64,
}

/// Seconds of processor time of all children that were waited for, and of theirs (proc_pid_stat(5)).
fn processor_time() -> f64 {
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program, which may hold anything, ends with the last parenthesis.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks as f64 / TICKS
}

/// What so many quarters of the values are below.
fn quartile(mut values: Vec<f64>, quarters: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) * quarters / 4]
}

fn measure(case: &Case, place: &Place, length: &str, scale: usize) {
    let json = place.0.join("watch.json");
    let run = |json: Option<&Path>| {
        // What the run before has left to the kernel, such as VMs to close, is not this one's.
        pause("0.2");
        let before = processor_time();
        let took = (case.run)(place, json, scale).as_secs_f64();
        (took, processor_time() - before)
    };
    // The first runs warm caches.
    run(None);
    run(Some(&json));
    let mut rounds = Vec::new();
    let mut report = serde_json::Value::Null;
    for round in 0..if scale == 1 { ROUNDS.0 } else { ROUNDS.1 } {
        // Whoever is second finds warmer caches.
        let ((alone, cpu), (command, cpu_watched)) = match round % 2 {
            0 => (run(None), run(Some(&json))),
            _ => {
                let command = run(Some(&json));
                (run(None), command)
            }
        };
        let text = std::fs::read_to_string(&json).unwrap_or_default();
        report = serde_json::from_str(&text).unwrap_or_default();
        let program = if case.server { command } else { report["seconds"].as_f64().unwrap_or(f64::NAN) };
        rounds.push(Round { alone, program, command, cpu: cpu_watched / cpu });
    }
    let part = |quarters, f: &dyn Fn(&Round) -> f64| quartile(rounds.iter().map(f).collect(), quarters);
    let of = |f: &dyn Fn(&Round) -> f64| part(2, f);
    let changes = report["changes"].as_u64().unwrap_or(0);
    let rate = changes as f64 / report["seconds"].as_f64().unwrap_or(1.0);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "{:<25} {:>7.2}s {:>7.2}s {:>6.2}x {:>4.2}-{:<4.2} {:>7.2}s {:>6.2}x {:>6.2}x {changes:>9} {rate:>10.0}  {}",
        format!("{}, {length}", case.name),
        of(&|r| r.alone),
        of(&|r| r.program),
        of(&|r| r.program / r.alone),
        part(1, &|r| r.program / r.alone),
        part(3, &|r| r.program / r.alone),
        of(&|r| r.command),
        of(&|r| r.command / r.alone),
        of(&|r| r.cpu),
        load.split(' ').next().unwrap_or("")
    );
    for cause in report["by_cause"].as_array().into_iter().flatten().take(4) {
        println!(
            "    {:>9} {:>9} pages  {}",
            cause["count"],
            cause["pages"],
            cause["cause"].as_str().unwrap_or("")
        );
    }
    for what in ["lost", "unattributed"] {
        if report[what].as_u64() != Some(0) {
            println!("    {what}: {}", report[what]);
        }
    }
}

/// `program args`, watched if there is a file for what is heard.
fn command(json: Option<&Path>, program: &str, args: &[&str]) -> Command {
    let mut line: Vec<OsString> = Vec::new();
    if let Some(json) = json {
        line.extend(
            [env!("CARGO_BIN_EXE_userptr"), "watch", "--follow", "--json", "--output"].map(OsString::from),
        );
        line.extend([json.into(), "--".into()]);
    }
    line.push(program.into());
    line.extend(args.iter().map(OsString::from));
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn timed(json: Option<&Path>, program: &str, args: &[&str]) -> Duration {
    let began = Instant::now();
    let status = command(json, program, args).status();
    assert!(status.is_ok_and(|s| s.success()), "{program} fails");
    began.elapsed()
}

fn sqlite(place: &Place, json: Option<&Path>, scale: usize) -> Duration {
    let file = place.path("db");
    let _ = std::fs::remove_file(&file);
    let rows = 150_000 * scale;
    let work = format!(
        "pragma synchronous=off; create table t(a integer primary key, b text);
        with recursive n(i) as (select 1 union all select i+1 from n where i<{rows})
        insert into t select i, hex(randomblob(40)) from n; create index x on t(b);
        select count(*) from t a join t b on a.b=b.b;"
    );
    timed(json, "sqlite3", &[&file, &work])
}

fn git_clone(place: &Place) {
    let from = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let _ = std::fs::remove_dir_all(place.path("repo"));
    let cloned = Command::new("git").args(["clone", "-q", "--bare", from, &place.path("repo")]).status();
    assert!(cloned.is_ok_and(|s| s.success()), "git clone fails");
}

/// The long one looks for deltas anew.
fn git_gc(place: &Place, json: Option<&Path>, scale: usize) -> Duration {
    let repo = place.path("repo");
    let aggressive = (scale > 1).then_some("--aggressive");
    let args: Vec<&str> = ["-C", &repo, "gc", "-q"].into_iter().chain(aggressive).collect();
    timed(json, "git", &args)
}

fn git_repack(place: &Place, json: Option<&Path>, scale: usize) -> Duration {
    let (repo, window) = (place.path("repo"), format!("--window={}", 10 * scale));
    timed(json, "git", &["-C", &repo, "repack", "-a", "-d", "-f", "-q", &window])
}

/// python3 itself: what is found by that name may be a script that looks for it.
fn interpreter() -> String {
    let found = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    found.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

fn python(_: &Place, json: Option<&Path>, scale: usize) -> Duration {
    let work = format!(
        "
import os
x = [bytearray(100000) for _ in range(400)]
for i in range({}):
    pid = os.fork()
    if pid == 0:
        sum(i * i for i in range(1000000)); os._exit(0)
    for b in x: b[0] = 1
    os.waitpid(pid, 0)
",
        20 * scale
    );
    timed(json, &interpreter(), &["-c", &work])
}

/// The long one optimises the standard library with it.
fn rustc(place: &Place, json: Option<&Path>, scale: usize) -> Duration {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/watch/subject.rs");
    let lto = if scale > 1 { "lto=fat" } else { "lto=off" };
    let out = place.path("subject");
    timed(json, "rustc", &["--edition", "2024", "-C", "opt-level=3", "-C", lto, "-o", &out, source])
}

/// A server for the time of one client.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-INT", &self.0.id().to_string()]).status();
        let _ = self.0.wait();
    }
}

/// True, so that it can be between two tries.
fn pause(seconds: &str) -> bool {
    Command::new("sleep").arg(seconds).status().is_ok()
}

fn when_ready(check: &mut Command) {
    check.stdout(Stdio::null()).stderr(Stdio::null());
    let ready = |_| check.status().is_ok_and(|s| s.success()) || !pause("0.1");
    assert!((0..300).any(ready), "the server does not come up");
}

fn redis(place: &Place, json: Option<&Path>, scale: usize) -> Duration {
    const PORT: &str = "46379";
    let dir = place.path("");
    // It answers while it still loads what an earlier run has saved.
    let _ = std::fs::remove_file(place.path("dump.rdb"));
    let server = ["--port", PORT, "--dir", &dir, "--save", "", "--bind", "127.0.0.1"];
    let _server = Server(command(json, "redis-server", &server).spawn().expect("redis-server"));
    when_ready(Command::new("redis-cli").args(["-p", PORT, "ping"]));
    let bench = |n: &str| {
        let args = ["-p", PORT, "-t", "set", "-n", n, "-r", "50000", "-d", "512", "-P", "8", "-c", "8", "-q"];
        timed(None, "redis-benchmark", &args)
    };
    bench("50000");
    let began = Instant::now();
    for _ in 0..2 * scale {
        timed(None, "redis-cli", &["-p", PORT, "bgsave"]);
        bench("60000");
    }
    began.elapsed()
}

/// Where Debian keeps the server's programs.
fn postgres_program(name: &str) -> String {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    versions
        .map(|v| v.path().join("bin").join(name).display().to_string())
        .max()
        .unwrap_or_else(|| name.to_owned())
}

/// It refuses to run as root.
const NOBODY: [&str; 5] = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];

fn initdb(place: &Place) {
    let data = place.path("pg");
    let _ = std::fs::create_dir(&data);
    let _ = std::os::unix::fs::chown(&data, Some(65534), Some(65534));
    let program = postgres_program("initdb");
    let args = [&NOBODY[..], &[&program, "-D", &data, "-U", "bench", "--no-sync"]].concat();
    timed(None, "setpriv", &args);
}

fn postgres(place: &Place, json: Option<&Path>, scale: usize) -> Duration {
    const PORT: &str = "46432";
    let (data, program) = (place.path("pg"), postgres_program("postgres"));
    let client = ["-h", "127.0.0.1", "-p", PORT, "-U", "bench"];
    let server = ["-D", &data, "-k", "", "-p", PORT, "-c", "fsync=off"];
    let args = [&NOBODY[..], &[&program], &server].concat();
    let _server = Server(command(json, "setpriv", &args).spawn().expect("postgres"));
    when_ready(Command::new("psql").args(client).args(["-c", "select 1", "postgres"]));
    timed(None, "pgbench", &[&client[..], &["-i", "-s", "2", "-q", "postgres"]].concat());
    timed(
        None,
        "pgbench",
        &[&client[..], &["-c", "4", "-t", &(1500 * scale).to_string(), "postgres"]].concat(),
    )
}
