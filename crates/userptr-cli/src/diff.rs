// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr diff`: the software mm beside this kernel.
//!
//! The operations run in child processes, some scripts to each: their memory is what is experimented on, and one that
//! hangs must not hang the command.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use mmu_check::diff::subject::{Subject, SubjectError};
use mmu_check::diff::{Compared, DiffError, compare, paths, script};
use serde::{Deserialize, Serialize};
use softmm::KernelProfile;

use crate::args::{DiffArgs, DiffBatchArgs};
use crate::child::{self, ChildError};
use crate::{Error, print_json};

/// What softmm is told to be.
const PROFILE: KernelProfile = KernelProfile::V6_18;
/// Operations of a random script: long enough for states to get odd, short enough to shrink fast.
const SCRIPT: u64 = 80;
/// Random scripts of one child.
const BATCH: u64 = 25;
/// For one child, which takes a second, and half a minute if it has differences to shrink.
const DEADLINE: Duration = Duration::from_secs(120);
/// No more is learnt from the next difference: the command stops here.
const ENOUGH: usize = 8;
/// Of all operations, what the kernel may choose either way and softmm is told must stay below this share.
const TOLD_SHARE: f64 = 0.01;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiffRunError {
    #[error("{what}: {source}")]
    Child { what: String, source: ChildError },
    #[error(transparent)]
    Subject(#[from] SubjectError),
    #[error(transparent)]
    Diff(#[from] DiffError),
}

/// What a child found, and the sum of it.
#[derive(Default, Serialize, Deserialize)]
struct Counts {
    operations: usize,
    /// Announced ranges that were equal.
    ranges: usize,
    /// Accesses that faulted on both sides.
    faults: usize,
    /// Operations in which softmm was told what the kernel had chosen.
    told: usize,
    /// Differences that did not show again.
    passing: usize,
    differences: Vec<Difference>,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Difference {
    /// Name of the script, or its seed.
    from: String,
    /// What differs after its last operation.
    what: String,
    script: Vec<String>,
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    profile: &'static str,
    seed: u64,
    holds: bool,
    told_share: f64,
    #[serde(flatten)]
    counts: Counts,
    seconds: f64,
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.operations += other.operations;
        self.ranges += other.ranges;
        self.faults += other.faults;
        self.told += other.told;
        self.passing += other.passing;
        for difference in other.differences {
            // Many scripts shrink to the same.
            if !self.differences.iter().any(|known| known.script == difference.script) {
                self.differences.push(difference);
            }
        }
    }

    fn of(from: String, compared: Compared) -> Counts {
        let difference = compared.difference.map(|d| Difference {
            from,
            what: d.what,
            script: d.script.iter().map(ToString::to_string).collect(),
        });
        Counts {
            operations: compared.operations,
            ranges: compared.ranges,
            faults: compared.faults,
            told: compared.told,
            passing: compared.passing,
            differences: difference.into_iter().collect(),
        }
    }

    fn told_share(&self) -> f64 {
        self.told as f64 / self.operations.max(1) as f64
    }
}

/// What one child prints.
pub(crate) fn answer(args: &DiffBatchArgs) -> Result<ExitCode, Error> {
    let mut subject = Subject::open().map_err(DiffRunError::from)?;
    let by_hand = paths::all().into_iter().map(|path| (path.name.to_owned(), path.script));
    let at_random = (args.seed..args.seed.saturating_add(args.scripts))
        .map(|seed| (format!("seed {seed}"), script::random(seed, SCRIPT as usize)));
    let scripts: Vec<_> = if args.scripts == 0 { by_hand.collect() } else { at_random.collect() };
    let mut counts = Counts::default();
    for (from, script) in scripts {
        let compared = compare(&mut subject, PROFILE, &script).map_err(DiffRunError::from)?;
        counts.add(Counts::of(from, compared));
    }
    print_json(&counts)?;
    Ok(ExitCode::SUCCESS)
}

/// The whole comparison.
pub(crate) fn run(args: &DiffArgs) -> Result<ExitCode, Error> {
    let start = Instant::now();
    let scripts = args.ops.div_ceil(SCRIPT);
    let progress = progress(scripts);
    let mut counts = ask(args.seed, 0)?;
    let mut done = 0;
    while done < scripts && counts.differences.len() < ENOUGH {
        let batch = BATCH.min(scripts - done);
        // Runs of neighbouring seeds share no script.
        let first = args.seed.wrapping_mul(1 << 32).wrapping_add(done);
        counts.add(ask(first, batch)?);
        done += batch;
        progress.set_position(done);
        progress.set_message(format!("{} differences", counts.differences.len()));
    }
    progress.finish_and_clear();
    let told_share = counts.told_share();
    let report = Report {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        profile: PROFILE.name,
        seed: args.seed,
        holds: counts.differences.is_empty() && told_share < TOLD_SHARE,
        told_share,
        counts,
        seconds: start.elapsed().as_secs_f64(),
    };
    if args.json {
        print_json(&report)?;
    } else {
        print(&report)?;
    }
    Ok(ExitCode::from(u8::from(!report.holds)))
}

fn ask(seed: u64, scripts: u64) -> Result<Counts, DiffRunError> {
    child::ask(&["diff-batch", &seed.to_string(), &scripts.to_string()], DEADLINE).map_err(|source| {
        let what = match scripts {
            0 => "the scripts by hand".to_owned(),
            _ => format!("scripts from seed {seed} on"),
        };
        DiffRunError::Child { what, source }
    })
}

fn print(report: &Report) -> Result<(), Error> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let Counts { operations, ranges, faults, told, passing, differences } = &report.counts;
    writeln!(out, "softmm {} beside Linux {}, seed {}", report.profile, report.kernel, report.seed)?;
    writeln!(out, "equal: {operations} operations, {ranges} announced ranges, {faults} faults")?;
    writeln!(out, "chosen by the kernel and replayed: {told} ({:.3} %)", report.told_share * 100.0)?;
    if *passing > 0 {
        writeln!(out, "differences that did not show again: {passing}")?;
    }
    for difference in differences {
        writeln!(out, "\nDIFFERENCE ({}): {}", difference.from, difference.what)?;
        difference.script.iter().try_for_each(|op| writeln!(out, "    {op}"))?;
    }
    let verdict = if report.holds { "holds" } else { "does not hold" };
    writeln!(out, "{verdict} ({:.1} s)", report.seconds)?;
    Ok(())
}

fn progress(scripts: u64) -> ProgressBar {
    // Draws on standard error, and not at all if that is no terminal.
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} scripts {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(scripts).with_style(style)
}
