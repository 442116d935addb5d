// SPDX-License-Identifier: MIT OR Apache-2.0
//! A cache in a process of its own: UCX patches the process that it is in, and an allocator is chosen by preloading it.
//!
//! The process reads turns from standard input and answers each, a line of JSON for a line of JSON.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Duration;

use hostmm::peer::ucx::Rcache;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::contestant::{Contestant, Dummy, Ours, Side, kvm_source, uffd_source};
use super::work::{Bench, Measured, Turn};
use crate::Error;

/// A turn that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// What the process says first, and then to each turn.
type Answer<T> = Result<T, String>;

/// The process of one side, which dies with this.
pub(super) struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// Starts `side`, with `preload` as its allocator.
    pub(super) fn start(side: Side, preload: Option<&str>) -> Result<Process, String> {
        let mut command = Command::new("/proc/self/exe");
        command.args(["bench-side", side.name()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        // What UCX logs is not for the table.
        command.stderr(Stdio::null()).env("UCX_LOG_LEVEL", "fatal").env("UCX_HANDLE_ERRORS", "none");
        if let Some(library) = preload {
            command.env("LD_PRELOAD", library);
        }
        let mut child = command.spawn().map_err(|e| format!("its process does not start: {e}"))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("its process has no pipes".into());
        };
        let mut process = Process { child, input, output: BufReader::new(output) };
        process.answer::<()>()?;
        Ok(process)
    }

    /// One turn, from beginning to end.
    pub(super) fn ask(&mut self, turn: &Turn) -> Result<Measured, String> {
        self.tell(turn)?;
        self.answer()
    }

    /// Begins a turn; [`Process::answer`] ends it.
    pub(super) fn tell(&mut self, turn: &Turn) -> Result<(), String> {
        let mut line = serde_json::to_string(turn).map_err(|e| e.to_string())?;
        line.push('\n');
        self.input.write_all(line.as_bytes()).map_err(|e| format!("its process is gone: {e}"))
    }

    pub(super) fn answer<T: serde::de::DeserializeOwned>(&mut self) -> Result<T, String> {
        // One line for one turn: nothing is left in the buffer.
        let time = Timespec { tv_sec: DEADLINE.as_secs().cast_signed(), tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(self.output.get_ref(), PollFlags::IN)], Some(&time));
        if !matches!(ready, Ok(1)) {
            let _ = self.child.kill();
            return Err(format!("hang: killed after {} s", DEADLINE.as_secs()));
        }
        let mut line = String::new();
        match self.output.read_line(&mut line) {
            Ok(n) if n > 0 => {
                serde_json::from_str::<Answer<T>>(&line).map_err(|e| format!("its answer: {e}"))?
            }
            _ => match self.child.wait() {
                Ok(status) => Err(format!("its process died: {status}")),
                Err(e) => Err(format!("its process died: {e}")),
            },
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the process of `side` does.
pub(crate) fn serve(side: &str) -> Result<ExitCode, Error> {
    // Whoever asked is gone, and so is the measurement.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    match Side::named(side) {
        Some(Side::Ucx) => speak(Rcache::create(Dummy).map_err(|e| e.to_string())),
        Some(Side::Kvm) => speak(kvm_source().and_then(Ours::new)),
        Some(Side::Uffd) => speak(uffd_source().and_then(Ours::new)),
        None => speak::<Rcache<Dummy>>(Err(format!("there is no side {side}"))),
    }
}

fn speak<C: Contestant>(contestant: Result<C, String>) -> Result<ExitCode, Error> {
    let mut bench = match contestant {
        Ok(contestant) => {
            say(&Ok(()))?;
            Bench::new(contestant)
        }
        Err(why) => {
            say::<()>(&Err(why))?;
            return Ok(ExitCode::from(2));
        }
    };
    for line in io::stdin().lock().lines() {
        let turn: Turn = serde_json::from_str(&line?)?;
        say(&bench.run(&turn))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn say<T: serde::Serialize>(answer: &Answer<T>) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, answer)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}
