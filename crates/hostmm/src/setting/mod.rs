// SPDX-License-Identifier: MIT OR Apache-2.0
//! Settings of the machine that are changed for a while and put back, whatever happens.
//!
//! Some ways to change memory belong to the machine: ksmd has to run, something has to be swapped to. A guard puts its
//! setting back on drop and on panic. A process that is killed drops nothing, so a guard also tells whoever started
//! the process with [`child::run`](crate::child::run), before it changes anything: the parent puts it back then.
//!
//! Invariant: what the log says is changed is a superset of what is changed.
//!
//! Lock order: a guard holds an flock on its file; whoever wants several takes them in the order in which
//! `disturb::ksm` does. The parent takes them only when its child is dead.

mod log;
mod swap;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

pub(crate) use log::{LOG, restore};
pub use swap::SwapSpace;

/// A setting of the machine (a sysfs, procfs or cgroup file) with another value while this lives.
///
/// Whoever else wants to change the same file with a guard waits.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
    old: String,
    /// Holds the flock.
    _lock: File,
}

impl Setting {
    /// Write `value` to the file `path` until the guard drops. May sleep until another guard of that file is gone.
    ///
    /// A file that shows its choices with the present one in brackets (`always [madvise] never`) is understood.
    ///
    /// # Errors
    /// If the file cannot be read, locked or written, or if its name or its value do not fit in a line of text.
    pub fn set(path: impl AsRef<Path>, value: &str) -> io::Result<Setting> {
        let path = path.as_ref().to_owned();
        let lock = File::open(&path)?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let old = chosen(fs::read_to_string(&path)?.trim()).to_owned();
        log::opened(log::SETTING, &path.to_string_lossy(), &old)?;
        let setting = Setting { path, old, _lock: lock };
        setting.write(value)?;
        Ok(setting)
    }

    /// Change the value again, under the same guard.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, value: &str) -> io::Result<()> {
        write(&self.path, value)
    }

    /// What drop will write back.
    #[must_use]
    pub fn old(&self) -> &str {
        &self.old
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        match self.write(&self.old) {
            Ok(()) => log::closed(&self.path.to_string_lossy()),
            // A parent that reads the log tries again.
            Err(e) => {
                tracing::error!("{} was {} and could not be put back: {e}", self.path.display(), self.old)
            }
        }
    }
}

/// The choice in brackets, or the whole.
fn chosen(text: &str) -> &str {
    text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(text, |(choice, _)| choice)
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    use super::*;
    use crate::capability::Capability;
    use crate::testing::{in_child, is_child, own_file, require};

    const SHORT: Duration = Duration::from_secs(20);

    #[test]
    fn a_setting_comes_back_on_drop_on_panic_and_after_a_kill() {
        let name = "setting::tests::a_setting_comes_back_on_drop_on_panic_and_after_a_kill";
        let path = own_file("setting-test");
        for case in ["#drop", "#panic", "#kill"] {
            if !is_child() {
                fs::write(&path, "1").unwrap();
            }
            let child = std::panic::catch_unwind(|| {
                in_child(&format!("{name}{case}"), SHORT, || {
                    let setting = Setting::set(&path, "0").unwrap();
                    assert_eq!((setting.old(), fs::read_to_string(&path).unwrap().as_str()), ("1", "0"));
                    match case {
                        "#drop" => {}
                        "#panic" => panic!("on purpose"),
                        _ => kill_process(getpid(), Signal::KILL).unwrap(),
                    }
                });
            });
            if is_child() {
                // Of another case: there is nothing to judge here.
                continue;
            }
            assert_eq!(child.is_ok(), case == "#drop");
            assert_eq!(fs::read_to_string(&path).unwrap(), "1", "after {case}");
        }
        if !is_child() {
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn swap_space_comes_and_goes_also_when_its_owner_is_killed() {
        let name = "setting::tests::swap_space_comes_and_goes_also_when_its_owner_is_killed";
        let swaps = || fs::read_to_string("/proc/swaps").unwrap();
        if !require(Capability::Zram) {
            return;
        }
        for case in ["#drop", "#kill"] {
            let node = own_file("swap-test");
            let child = std::panic::catch_unwind(|| {
                in_child(&format!("{name}{case}"), Duration::from_secs(60), || {
                    let swap = SwapSpace::add().unwrap();
                    assert!(swaps().contains(&swap.node()));
                    fs::write(&node, swap.node()).unwrap();
                    if case == "#kill" {
                        kill_process(getpid(), Signal::KILL).unwrap();
                    }
                });
            });
            if is_child() {
                continue;
            }
            assert_eq!(child.is_ok(), case == "#drop");
            let device = fs::read_to_string(&node).unwrap();
            fs::remove_file(&node).unwrap();
            // Another test's device may have the number by now, but not in the same breath.
            assert!(!swaps().contains(&format!("{device} ")), "after {case}: {}", swaps());
        }
    }

    #[test]
    fn the_choice_in_brackets_is_the_value() {
        assert_eq!(chosen("always [madvise] never"), "madvise");
        assert_eq!(chosen("100"), "100");
    }
}
