// SPDX-License-Identifier: MIT OR Apache-2.0
//! ksmd, run for as long as somebody waits for a merge and not a moment longer.
//!
//! Holding [`Ksm`] keeps every other holder of KSM's settings waiting: ksmd merges whatever is mergeable anywhere, so two
//! experiments at once would disturb each other. Lock order: the settings in the order of `disturb::ksm`.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use interleave::{MaySleep, time};

use crate::setting::Setting;

const DIR: &str = "/sys/kernel/mm/ksm";
/// A page is merged in the second scan that finds it unchanged; six are ample.
const SCANS: u64 = 6;

/// KSM's settings, ours while this lives; ksmd does not run.
#[derive(Debug)]
pub struct Ksm {
    /// Dropped first: ksmd stops before its pace is put back.
    run: Setting,
    _pace: [Setting; 3],
}

impl Ksm {
    /// Takes them. Sleeps until nobody else has them.
    ///
    /// # Errors
    /// If they cannot be read or written.
    pub fn take() -> io::Result<Ksm> {
        let set = |file: &str, value| Setting::set(format!("{DIR}/{file}"), value);
        let _pace = [set("sleep_millisecs", "1")?, set("pages_to_scan", "4096")?, set("smart_scan", "0")?];
        Ok(Ksm { run: set("run", "0")?, _pace })
    }

    /// Process id of ksmd, in the initial pid namespace; `None` if there is none to be seen.
    #[must_use]
    pub fn pid() -> Option<u32> {
        let is_ksmd = |dir: &fs::DirEntry| {
            fs::read_to_string(dir.path().join("comm")).is_ok_and(|comm| comm == "ksmd\n")
        };
        let ksmd = fs::read_dir("/proc").ok()?.flatten().find(is_ksmd)?;
        ksmd.file_name().to_str()?.parse().ok()
    }

    /// Runs ksmd until `merged`, or until it has had every chance, or for `limit`. What `merged` said last.
    ///
    /// # Errors
    /// If the settings cannot be written, or what `merged` says.
    pub fn run_until<E: From<io::Error>>(
        &self,
        limit: Duration,
        mut merged: impl FnMut() -> Result<bool, E>,
    ) -> Result<bool, E> {
        let (start, scans) = (Instant::now(), full_scans());
        self.run.write("1")?;
        let outcome = loop {
            match merged() {
                Ok(false) if start.elapsed() < limit && full_scans() < scans + SCANS => {
                    MaySleep::enter(|cx| time::sleep(cx, Duration::from_millis(1)));
                }
                outcome => break outcome,
            }
        };
        self.run.write("0")?;
        outcome
    }
}

fn full_scans() -> u64 {
    fs::read_to_string(format!("{DIR}/full_scans")).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}
