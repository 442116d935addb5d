// SPDX-License-Identifier: MIT OR Apache-2.0
//! What every live test needs: a child process with a deadline, one form of words for a skipped test, and settings
//! of the machine that are put back whatever happens. Not part of the API.
//!
//! A live test looks like this; the name is the path that `cargo test -- --list` prints:
//! ```no_run
//! # use std::time::Duration;
//! # use hostmm::{capability::Capability, testing};
//! fn ksm_merges() { // #[test]
//!     if !testing::require(Capability::Ksm) { return; }
//!     testing::in_child("ksm_merges", Duration::from_secs(20), || {
//!         let _run = testing::Setting::set("/sys/kernel/mm/ksm/run", "1").unwrap();
//!     });
//! }
//! ```
//! A page fault on a userfaultfd without a reader, or an mm operation whose event nobody reads, sleeps for ever: a
//! test that cannot be killed from outside would hang the whole run.

mod swap;

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, MemfdFlags, flock, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::capability::{self, Capability, State};
pub use swap::Swap;

/// Names, in the child's environment, the test whose body it has to run.
const CHILD: &str = "USERPTR_TEST_CHILD";
/// Path, in the child's environment, of the log of settings that the parent restores.
const RESTORE_LOG: &str = "USERPTR_TEST_RESTORE";
/// Exit status of a child whose body returned. Not 0: a libtest that found no test of that name also exits 0.
const BODY_RETURNED: i32 = 64;

/// Run `body` in a child process and panic if it panics, dies, or is not done by `deadline`.
///
/// The child is this test binary, re-executed for the test `name` alone (`module::tests::function`, the module path
/// without the crate's name), so `body` starts in a process with one thread, no matter what else the test run is
/// doing. To have several children in one test, write `name#1`, `name#2`, ... `Err` from the body fails the test.
///
/// # Panics
/// With the child's output, if the body did not return; with the word `hang` if it had to be killed. Everything that
/// the child left in its process group is killed in every case.
pub fn in_child<T: Outcome>(name: &str, deadline: Duration, body: impl FnOnce() -> T) {
    match env::var(CHILD) {
        Ok(mine) if mine == name => {
            // A test run that is killed from outside takes its children along.
            let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
            // libtest has begun a line with the test's name; `skipped:` has to start one.
            println!();
            body().check();
            let _ = io::stdout().flush();
            std::process::exit(BODY_RETURNED);
        }
        Ok(_) => return,
        Err(_) => {}
    }
    if let Err(why) = run(name, deadline) {
        panic!("{name}: {why}");
    }
}

/// What a test body may return.
pub trait Outcome {
    /// Panic if it is a failure.
    fn check(self);
}

impl Outcome for () {
    fn check(self) {}
}

impl<E: std::fmt::Debug> Outcome for Result<(), E> {
    fn check(self) {
        self.expect("the test body failed");
    }
}

fn run(name: &str, deadline: Duration) -> Result<(), String> {
    let io = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    // Files, not pipes: a grandchild that outlives the child cannot keep the reader waiting for end of file.
    let memfd = |what| memfd_create(what, MemfdFlags::CLOEXEC).map(File::from).map_err(io::Error::from);
    let mut output = memfd("test output").map_err(io("memfd_create"))?;
    let mut log = memfd("settings to restore").map_err(io("memfd_create"))?;
    let test = name.split('#').next().unwrap_or(name);
    let mut child = Command::new(env::current_exe().map_err(io("current_exe"))?)
        .args(["--exact", test, "--nocapture", "--include-ignored", "--test-threads=1"])
        .env(CHILD, name)
        .env(RESTORE_LOG, format!("/proc/{}/fd/{}", std::process::id(), log.as_raw_fd()))
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(output.try_clone().map_err(io("dup"))?)
        .stderr(output.try_clone().map_err(io("dup"))?)
        .process_group(0)
        .spawn()
        .map_err(io("spawn"))?;
    let pid = Pid::from_child(&child);
    let exited = wait_until_exit(pid, deadline);
    // The child is not reaped yet, so its process group cannot be anybody else's.
    let _ = kill_process_group(pid, Signal::KILL);
    let status = child.wait().map_err(io("wait"))?;
    let restored = restore(&mut log);
    let text = forward_skips(&mut output);
    if let Err(e) = restored {
        return Err(format!("could not restore a setting of the machine: {e}\n{text}"));
    }
    if !exited.map_err(io("wait for the child"))? {
        return Err(format!("hang: not done after {deadline:?}, killed. Its output:\n{text}"));
    }
    judge(status, &text)
}

fn judge(status: ExitStatus, text: &str) -> Result<(), String> {
    match (status.code(), status.signal()) {
        (Some(BODY_RETURNED), _) => {
            print!("{text}");
            Ok(())
        }
        (Some(0), _) => {
            Err(format!("no such test in this binary, or its body was never reached. Output:\n{text}"))
        }
        (Some(code), _) => Err(format!("the child failed with exit status {code}. Its output:\n{text}")),
        (None, signal) => {
            Err(format!("the child died of signal {}. Its output:\n{text}", signal.unwrap_or(0)))
        }
    }
}

/// Whether the process exited in time.
fn wait_until_exit(pid: Pid, deadline: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let start = std::time::Instant::now();
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The child's output; its `skipped:` lines go on to our standard error, past libtest's capture.
fn forward_skips(output: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = output.rewind().and_then(|()| output.read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes).into_owned();
    for line in text.lines().filter(|l| l.starts_with("skipped: ")) {
        say(line);
    }
    text
}

/// Does this machine offer `capability` to this process? If not, say so in the one form that CI counts:
/// `skipped: <test>: <capability>: <why>`, written past libtest's capture to standard error.
///
/// [`State::Partial`] counts as there: a test that needs the missing part asks for it itself, with [`skip`].
#[must_use]
pub fn require(capability: Capability) -> bool {
    match capability::probe(capability) {
        State::There(_) | State::Partial(_) => true,
        State::Missing(why) => {
            skip(capability, &why);
            false
        }
    }
}

/// Say that the running test is skipped for want of `capability`.
pub fn skip(capability: Capability, why: &str) {
    skip_for(capability.name(), why);
}

/// Say that the running test is skipped for want of something that is no [`Capability`], or may be had and is busy.
///
/// `what` is one word without a colon. CI asks `userptr doctor --has` about it: a skip passes where that knows no
/// such name, or says that the machine has none.
pub fn skip_for(what: &str, why: &str) {
    let test = env::var(CHILD).ok().or_else(|| std::thread::current().name().map(str::to_owned));
    let why = why.replace('\n', " ");
    say(&format!("skipped: {}: {what}: {why}", test.as_deref().unwrap_or("?")));
}

/// A line past libtest's capture, whole and from the left edge, whatever libtest is in the middle of.
fn say(line: &str) {
    let _ = io::stderr().write_all(format!("\n{line}\n").as_bytes());
}

/// A setting of the machine (a sysfs, procfs or cgroup file) with another value while this lives.
///
/// Whoever else wants to change the same file waits. The old value is written back on drop and on panic; if the
/// process dies inside [`in_child`], its parent does it.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
    old: String,
    /// Holds the flock.
    _lock: File,
}

impl Setting {
    /// Write `value` to the file `path` until the guard drops.
    ///
    /// A file that shows its choices with the present one in brackets (`always [madvise] never`) is understood.
    ///
    /// # Errors
    /// If the file cannot be read, locked or written.
    pub fn set(path: impl AsRef<Path>, value: &str) -> io::Result<Setting> {
        let path = path.as_ref().to_owned();
        let lock = File::open(&path)?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let old = chosen(fs::read_to_string(&path)?.trim()).to_owned();
        note("set", &path, &old)?;
        let setting = Setting { path, old, _lock: lock };
        setting.write(value)?;
        Ok(setting)
    }

    /// Change the value again, under the same guard.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, value: &str) -> io::Result<()> {
        write_setting(&self.path, value)
    }

    /// What drop will write back.
    #[must_use]
    pub fn old(&self) -> &str {
        &self.old
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if self.write(&self.old).is_ok() {
            let _ = note("done", &self.path, &self.old);
        }
    }
}

/// The choice in brackets, or the whole.
fn chosen(text: &str) -> &str {
    text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(text, |(choice, _)| choice)
}

fn write_setting(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// Tell the parent of [`in_child`], before the setting changes and after it is back.
fn note(what: &str, path: &Path, old: &str) -> io::Result<()> {
    let Ok(log) = env::var(RESTORE_LOG) else { return Ok(()) };
    let line = format!("{what}\t{}\t{old}\n", path.display());
    OpenOptions::new().append(true).open(log)?.write_all(line.as_bytes())
}

/// Put back what a dead child left changed, the last change first.
fn restore(log: &mut File) -> io::Result<()> {
    let mut text = String::new();
    log.rewind()?;
    log.read_to_string(&mut text)?;
    let mut open: Vec<(&str, &str, &str)> = Vec::new();
    for line in text.lines() {
        let mut words = line.splitn(3, '\t');
        let (Some(what), Some(path), Some(old)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        match what {
            "set" | "swap" => open.push((what, path, old)),
            _ => {
                if let Some(at) = open.iter().rposition(|(_, p, _)| *p == path) {
                    open.remove(at);
                }
            }
        }
    }
    for (what, path, old) in open.into_iter().rev() {
        if what == "swap" {
            swap::undo()?;
            continue;
        }
        let lock = File::open(path)?;
        flock(lock.as_fd(), FlockOperation::LockExclusive)?;
        write_setting(Path::new(path), old)?;
    }
    Ok(())
}

/// The uid and gid of nobody.
pub const NOBODY: u32 = 65534;

/// Drop every privilege for good: uid and gid 65534, no other group, no capability.
///
/// # Panics
/// If the process may not, or in a process that tests share: this is for a child of [`in_child`].
pub fn become_nobody() {
    assert!(env::var(CHILD).is_ok(), "not in a child of in_child");
    crate::sys::user::become_user(NOBODY).expect("drop privileges");
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(20);

    fn failure(name: &str, deadline: Duration, body: impl FnOnce()) -> String {
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| in_child(name, deadline, body)));
        *panic.expect_err("in_child returned").downcast::<String>().expect("a message")
    }

    #[test]
    fn a_body_runs_in_another_process_and_returns() {
        let me = std::process::id();
        in_child("testing::tests::a_body_runs_in_another_process_and_returns", SHORT, || {
            assert!(env::var(CHILD).is_ok() && std::process::id() != 0);
        });
        assert_eq!(me, std::process::id());
    }

    #[test]
    fn a_panic_in_the_child_fails_the_test_with_its_words() {
        let why =
            failure("testing::tests::a_panic_in_the_child_fails_the_test_with_its_words", SHORT, || {
                panic!("the device is stale");
            });
        assert!(why.contains("the device is stale") && why.contains("exit status 101"), "{why}");
    }

    #[test]
    fn a_hang_is_killed_with_its_children() {
        let name = "testing::tests::a_hang_is_killed_with_its_children";
        let why = failure(name, Duration::from_millis(500), || {
            let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
            println!("sleeper {}", sleeper.id());
            let _ = sleeper.wait();
        });
        assert!(why.contains("hang"), "{why}");
        let sleeper =
            why.lines().find_map(|l| l.strip_prefix("sleeper ")).expect("the child's output is shown");
        // A killed process takes a moment to die.
        let lives = || fs::read_to_string(format!("/proc/{sleeper}/stat")).is_ok_and(|s| !s.contains(") Z"));
        let pause = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        assert!((0..1000).any(|_| !lives() || poll(&mut [], Some(&pause)).is_err()), "the grandchild lives");
    }

    #[test]
    fn a_name_that_does_not_exist_is_no_success() {
        let why = failure("testing::tests::no_such_test", SHORT, || {});
        assert!(why.contains("no such test"), "{why}");
    }

    #[test]
    fn a_setting_comes_back_on_drop_on_panic_and_after_a_kill() {
        let name = "testing::tests::a_setting_comes_back_on_drop_on_panic_and_after_a_kill";
        let path = env::temp_dir().join("userptr-setting-test");
        for case in ["#drop", "#panic", "#kill"] {
            if env::var(CHILD).is_err() {
                fs::write(&path, "1").unwrap();
            }
            let child = std::panic::catch_unwind(|| {
                in_child(&format!("{name}{case}"), SHORT, || {
                    let setting = Setting::set(&path, "0").unwrap();
                    assert_eq!((setting.old(), fs::read_to_string(&path).unwrap().as_str()), ("1", "0"));
                    match case {
                        "#drop" => {}
                        "#panic" => panic!("on purpose"),
                        _ => rustix::process::kill_process(rustix::process::getpid(), Signal::KILL).unwrap(),
                    }
                });
            });
            assert_eq!(child.is_ok(), case == "#drop");
            assert_eq!(fs::read_to_string(&path).unwrap(), "1", "after {case}");
        }
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn the_choice_in_brackets_is_the_value() {
        assert_eq!(chosen("always [madvise] never"), "madvise");
        assert_eq!(chosen("100"), "100");
    }
}
