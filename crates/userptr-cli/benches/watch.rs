// SPDX-License-Identifier: MIT OR Apache-2.0
//! What being watched costs real programs: each runs with and without `userptr watch --follow`, in turn, and medians are
//! compared. A program that is not installed is skipped. `cargo bench -p userptr-cli --bench watch -- [NAME...]`.
//!
//! A command's time is all of it, the watcher's start and report included; a server's is its client's alone.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;

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
    /// Runs it, with `watch` in front, if any; how long it took.
    run: fn(&Place, Option<&Path>) -> Duration,
}

const CASES: &[Case] = &[
    Case { name: "sqlite3", needs: &["sqlite3"], prepare: nothing, run: sqlite },
    Case { name: "git repack", needs: &["git"], prepare: git_clone, run: git },
    Case { name: "python3 fork", needs: &["python3"], prepare: nothing, run: python },
    Case { name: "rustc", needs: &["rustc"], prepare: nothing, run: rustc },
    Case { name: "redis BGSAVE", needs: &["redis-server", "redis-benchmark"], prepare: nothing, run: redis },
    Case { name: "PostgreSQL pgbench", needs: &["pgbench", "setpriv"], prepare: initdb, run: postgres },
];

fn nothing(_: &Place) {}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let dir = std::env::temp_dir().join(format!("userptr-watch-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory for the programs' files");
    let place = Place(dir);
    println!(
        "{:<20} {:>9} {:>9} {:>7} {:>12} {:>10}",
        "", "alone", "watched", "ratio", "invalidations", "per second"
    );
    for case in CASES {
        if !wanted.is_empty() && !wanted.iter().any(|name| case.name.contains(name.as_str())) {
            continue;
        }
        match case.needs.iter().find(|program| !is_there(program)) {
            Some(program) => println!("skipped: {}: {program}: not installed", case.name),
            None => measure(case, &place),
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

fn measure(case: &Case, place: &Place) {
    (case.prepare)(place);
    let json = place.0.join("watch.json");
    // The first run warms caches.
    (case.run)(place, None);
    let (mut alone, mut watched) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        alone.push((case.run)(place, None));
        watched.push((case.run)(place, Some(&json)));
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        times[times.len() / 2].as_secs_f64()
    };
    let (alone, watched) = (median(&mut alone), median(&mut watched));
    let text = std::fs::read_to_string(&json).unwrap_or_default();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let (changes, seconds) =
        (report["changes"].as_u64().unwrap_or(0), report["seconds"].as_f64().unwrap_or(1.0));
    let rate = changes as f64 / seconds;
    println!(
        "{:<20} {alone:>8.2}s {watched:>8.2}s {:>6.2}x {changes:>12} {rate:>10.0}",
        case.name,
        watched / alone
    );
    for cause in report["by_cause"].as_array().into_iter().flatten().take(6) {
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

fn sqlite(place: &Place, json: Option<&Path>) -> Duration {
    let file = place.path("db");
    let _ = std::fs::remove_file(&file);
    let work = "pragma synchronous=off; create table t(a integer primary key, b text);
        with recursive n(i) as (select 1 union all select i+1 from n where i<150000)
        insert into t select i, hex(randomblob(40)) from n; create index x on t(b); select count(*) from t a join t b on a.b=b.b;";
    timed(json, "sqlite3", &[&file, work])
}

fn git_clone(place: &Place) {
    let from = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let cloned = Command::new("git").args(["clone", "-q", "--bare", from, &place.path("repo")]).status();
    assert!(cloned.is_ok_and(|s| s.success()), "git clone fails");
}

fn git(place: &Place, json: Option<&Path>) -> Duration {
    timed(json, "git", &["-C", &place.path("repo"), "repack", "-a", "-d", "-f", "-q"])
}

fn python(_: &Place, json: Option<&Path>) -> Duration {
    let work = "
import os
x = [bytearray(100000) for _ in range(400)]
for i in range(20):
    pid = os.fork()
    if pid == 0:
        sum(i * i for i in range(1000000)); os._exit(0)
    for b in x: b[0] = 1
    os.waitpid(pid, 0)
";
    timed(json, "python3", &["-c", work])
}

fn rustc(place: &Place, json: Option<&Path>) -> Duration {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/watch/subject.rs");
    timed(json, "rustc", &["--edition", "2024", "-O", "-o", &place.path("subject"), source])
}

/// A server for the time of one client.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-INT", &self.0.id().to_string()]).status();
        let _ = self.0.wait();
    }
}

fn when_ready(check: &mut Command) {
    check.stdout(Stdio::null()).stderr(Stdio::null());
    let ready =
        |_| check.status().is_ok_and(|s| s.success()) || Command::new("sleep").arg("0.1").status().is_err();
    assert!((0..300).any(ready), "the server does not come up");
}

fn redis(place: &Place, json: Option<&Path>) -> Duration {
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
    for _ in 0..2 {
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

fn postgres(place: &Place, json: Option<&Path>) -> Duration {
    const PORT: &str = "46432";
    let (data, program) = (place.path("pg"), postgres_program("postgres"));
    let client = ["-h", "127.0.0.1", "-p", PORT, "-U", "bench"];
    let server = ["-D", &data, "-k", "", "-p", PORT, "-c", "fsync=off"];
    let args = [&NOBODY[..], &[&program], &server].concat();
    let _server = Server(command(json, "setpriv", &args).spawn().expect("postgres"));
    when_ready(Command::new("psql").args(client).args(["-c", "select 1", "postgres"]));
    timed(None, "pgbench", &[&client[..], &["-i", "-s", "2", "-q", "postgres"]].concat());
    timed(None, "pgbench", &[&client[..], &["-c", "4", "-t", "1500", "postgres"]].concat())
}
