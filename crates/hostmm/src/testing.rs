// SPDX-License-Identifier: MIT OR Apache-2.0
//! What every live test needs: a child process with a deadline, and one form of words for a skipped test. Not part of
//! the API.
//!
//! A live test looks like this; the name is the path that `cargo test -- --list` prints:
//! ```no_run
//! # use std::time::Duration;
//! # use hostmm::{capability::Capability, setting::Setting, testing};
//! fn ksm_merges() { // #[test]
//!     if !testing::require(Capability::Ksm) { return; }
//!     testing::in_child("ksm_merges", Duration::from_secs(20), || {
//!         let _run = Setting::set("/sys/kernel/mm/ksm/run", "1").unwrap();
//!     });
//! }
//! ```

mod guarded;

use std::env;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use interleave::{time, yield_now};
use rustix::process::Signal;

use crate::capability::{self, Capability, State};
use crate::child::{self, End, Errors};

pub use guarded::Guarded;

/// Names, in the child's environment, the test whose body it has to run.
const CHILD: &str = "USERPTR_TEST_CHILD";
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
    let program = env::current_exe().map_err(|e| format!("current_exe: {e}"))?;
    let test = name.split('#').next().unwrap_or(name);
    let mut command = Command::new(program);
    command
        .args(["--exact", test, "--nocapture", "--include-ignored", "--test-threads=1"])
        .env(CHILD, name)
        .env("RUST_BACKTRACE", "0");
    let ended = child::run(&mut command, Errors::WithOutput, deadline).map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&ended.output).into_owned();
    for line in text.lines().filter(|l| l.starts_with("skipped: ")) {
        say(line);
    }
    match ended.end {
        End::Code(BODY_RETURNED) => {
            print!("{text}");
            Ok(())
        }
        End::Code(0) => {
            Err(format!("no such test in this binary, or its body was never reached. Output:\n{text}"))
        }
        End::Code(code) => Err(format!("the child failed with exit status {code}. Its output:\n{text}")),
        End::Signal(signal) => Err(format!("the child died of signal {signal}. Its output:\n{text}")),
        End::Deadline => Err(format!("hang: not done after {deadline:?}, killed. Its output:\n{text}")),
    }
}

/// Is this process a child of [`in_child`]?
#[must_use]
pub fn is_child() -> bool {
    env::var_os(CHILD).is_some()
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

/// [`skip_for`] what is left of the body that [`in_child`] runs, also from deep inside it.
///
/// # Panics
/// In a process that tests share: this is for a child of [`in_child`].
pub fn skip_rest(what: &str, why: &str) -> ! {
    assert!(is_child(), "not in a child of in_child");
    skip_for(what, why);
    std::process::exit(BODY_RETURNED);
}

/// Where a test puts its files: the directory for temporary files if it is on a disk ([`Capability::DiskFile`]), else
/// `build`, which may be.
#[must_use]
pub fn scratch(build: &str) -> PathBuf {
    if capability::probe(Capability::DiskFile).is_usable() { env::temp_dir() } else { build.into() }
}

/// Try `once` until it gives something, for as long as a test can wait: whether two threads meet is the scheduler's choice, and
/// on a busy machine they may pass each other many times. `None` if it never gave anything.
pub fn until<T>(mut once: impl FnMut() -> Option<T>) -> Option<T> {
    let start = time::now();
    loop {
        let got = once();
        if got.is_some() || start.elapsed() > PATIENCE {
            return got;
        }
        yield_now();
    }
}

/// How long [`until`] tries. A body that calls it needs a deadline that is longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A file name in the directory for temporary files, the same in a test and in its children of [`in_child`], and nobody
/// else's.
#[must_use]
pub fn own_file(name: &str) -> PathBuf {
    let test = if is_child() { std::os::unix::process::parent_id() } else { std::process::id() };
    env::temp_dir().join(format!("userptr-{name}-{test}"))
}

/// A line past libtest's capture, whole and from the left edge, whatever libtest is in the middle of.
fn say(line: &str) {
    let _ = io::stderr().write_all(format!("\n{line}\n").as_bytes());
}

/// The uid and gid of nobody.
pub const NOBODY: u32 = 65534;

/// Drop every privilege for good: uid and gid 65534, no other group, no capability.
///
/// # Panics
/// If the process may not, or in a process that tests share: this is for a child of [`in_child`].
pub fn become_nobody() {
    assert!(is_child(), "not in a child of in_child");
    crate::sys::user::become_user(NOBODY).expect("drop privileges");
}

#[cfg(test)]
mod tests {
    use interleave::MaySleep;

    use super::*;

    const SHORT: Duration = Duration::from_secs(20);

    fn failure(name: &str, deadline: Duration, body: impl FnOnce()) -> String {
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| in_child(name, deadline, body)));
        *panic.expect_err("in_child returned").downcast::<String>().expect("a message")
    }

    #[test]
    fn a_body_runs_in_another_process_and_returns() {
        let ran = own_file("body-test");
        in_child("testing::tests::a_body_runs_in_another_process_and_returns", SHORT, || {
            assert!(is_child());
            std::fs::write(&ran, std::process::id().to_string()).unwrap();
        });
        // Only the parent comes here.
        let pid = std::fs::read_to_string(&ran).unwrap();
        std::fs::remove_file(&ran).unwrap();
        assert_ne!(pid, std::process::id().to_string());
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
    fn a_hang_is_killed_and_called_one() {
        let name = "testing::tests::a_hang_is_killed_and_called_one";
        // How long a process takes to come to its first words is the machine's business.
        let said = [1, 20].into_iter().any(|seconds| {
            let why = failure(name, Duration::from_secs(seconds), || {
                println!("about to");
                loop {
                    MaySleep::enter(|cx| time::sleep(cx, SHORT));
                }
            });
            assert!(why.contains("hang"), "{why}");
            why.contains("about to")
        });
        assert!(said, "what it said is lost");
    }

    #[test]
    fn a_name_that_does_not_exist_is_no_success() {
        let why = failure("testing::tests::no_such_test", SHORT, || {});
        assert!(why.contains("no such test"), "{why}");
    }
}
