// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr diff`: the software mm beside this kernel.
//!
//! The operations run in child processes, some scripts to each: their memory is what is experimented on, and one that
//! hangs must not hang the command.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hostmm::capability::Capability;
use indicatif::{ProgressBar, ProgressStyle};
use mmu_check::diff::subject::{Subject, SubjectError, missing};
use mmu_check::diff::text::{self, ScriptError};
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
    #[error("{path}: {source}")]
    Script { path: String, source: ScriptError },
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
    /// Pages that the kernel was asked to swap out or merge, and could have, and did not.
    unprovoked: usize,
    /// Differences that did not show again.
    passing: usize,
    /// Scripts that were run again since announcements were lost.
    repeated: usize,
    /// Scripts by hand that did not run, and why.
    skipped: Vec<Skipped>,
    differences: Vec<Difference>,
}

#[derive(Serialize, Deserialize)]
struct Skipped {
    script: String,
    why: String,
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
        self.unprovoked += other.unprovoked;
        self.passing += other.passing;
        self.repeated += other.repeated;
        self.skipped.extend(other.skipped);
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
            unprovoked: compared.unprovoked,
            passing: compared.passing,
            repeated: 0,
            skipped: Vec::new(),
            differences: difference.into_iter().collect(),
        }
    }

    fn told_share(&self) -> f64 {
        self.told as f64 / self.operations.max(1) as f64
    }
}

/// What this machine has of what operations need; each asked for once.
fn may() -> impl Fn(Capability) -> bool {
    use Capability::{DiskFile, IoUring, Ksm, Uprobes, Zram};
    let there: Vec<_> =
        [DiskFile, IoUring, Ksm, Uprobes, Zram].into_iter().filter(|&c| missing(c).is_none()).collect();
    move |capability| there.contains(&capability)
}

fn read_script(path: &Path) -> Result<Vec<script::Op>, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })?;
    let named = |source| DiffRunError::Script { path: path.display().to_string(), source };
    Ok(text::parse(&text).map_err(named)?)
}

/// What one child prints.
pub(crate) fn answer(args: &DiffBatchArgs) -> Result<ExitCode, Error> {
    let mut counts = Counts::default();
    let mut scripts = Vec::new();
    match &args.script {
        Some(path) => scripts.push((path.display().to_string(), read_script(path)?)),
        None if args.scripts > 0 => {
            let (may, seeds) = (may(), args.seed..args.seed.saturating_add(args.scripts));
            let at_random = |seed| (format!("seed {seed}"), script::random(seed, SCRIPT as usize, &may));
            scripts.extend(seeds.map(at_random));
        }
        None => {
            for path in paths::all() {
                let lacks = path.needs().into_iter().find_map(|needs| Some((needs, missing(needs)?)));
                match lacks {
                    None => scripts.push((path.name.to_owned(), path.script)),
                    Some((needs, why)) => {
                        counts
                            .skipped
                            .push(Skipped { script: path.name.to_owned(), why: format!("{needs}: {why}") });
                    }
                }
            }
        }
    }
    let mut subject = Subject::open().map_err(DiffRunError::from)?;
    for (from, script) in scripts {
        let compared = compare(&mut subject, PROFILE, &script).map_err(DiffRunError::from)?;
        counts.add(Counts::of(from, compared));
    }
    counts.repeated = subject.repeated();
    print_json(&counts)?;
    Ok(ExitCode::SUCCESS)
}

/// The whole comparison.
pub(crate) fn run(args: &DiffArgs) -> Result<ExitCode, Error> {
    if args.list {
        return list(args.json);
    }
    let start = Instant::now();
    let counts = match &args.script {
        Some(path) => {
            // Here already: what is wrong with the file is no child's fault.
            read_script(path)?;
            ask(&path.display().to_string(), &["0", "0", "--script", &path.to_string_lossy()])?
        }
        None => by_hand_and_at_random(args)?,
    };
    let told_share = counts.told_share();
    let report = Report {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        profile: PROFILE.name,
        seed: args.seed,
        // A share of a few operations says nothing.
        holds: counts.differences.is_empty() && (args.script.is_some() || told_share < TOLD_SHARE),
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

fn by_hand_and_at_random(args: &DiffArgs) -> Result<Counts, DiffRunError> {
    let scripts = args.ops.div_ceil(SCRIPT);
    let progress = progress(scripts);
    let mut counts = ask("the scripts by hand", &["0", "0"])?;
    let mut done = 0;
    while done < scripts && counts.differences.len() < ENOUGH {
        let batch = BATCH.min(scripts - done);
        // Runs of neighbouring seeds share no script.
        let first = args.seed.wrapping_mul(1 << 32).wrapping_add(done);
        let what = format!("scripts from seed {first} on");
        counts.add(ask(&what, &[&first.to_string(), &batch.to_string()])?);
        done += batch;
        progress.set_position(done);
        progress.set_message(format!("{} differences", counts.differences.len()));
    }
    progress.finish_and_clear();
    Ok(counts)
}

/// A path of the checker and the scripts that take it, or why none can.
#[derive(Serialize)]
struct Listed {
    path: &'static str,
    kernel: &'static str,
    scripts: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    without: Option<&'static str>,
}

fn list(json: bool) -> Result<ExitCode, Error> {
    use std::io::Write;
    let all = paths::all();
    let listed = |path: &'static mmu_check::Path| Listed {
        path: path.name,
        kernel: path.kernel,
        scripts: all
            .iter()
            .filter(|script| script.covers.contains(&path.name))
            .map(|script| script.name)
            .collect(),
        without: paths::WITHOUT_SCRIPT.iter().find(|(name, _)| *name == path.name).map(|(_, why)| *why),
    };
    let listed: Vec<_> = mmu_check::PATHS.iter().map(listed).collect();
    if json {
        print_json(&listed)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = std::io::stdout().lock();
    for Listed { path, kernel, scripts, without } in listed {
        writeln!(out, "{path:14} {kernel}")?;
        for script in scripts {
            writeln!(out, "               {script}")?;
        }
        if let Some(why) = without {
            writeln!(out, "               no script: {why}")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(what: &str, args: &[&str]) -> Result<Counts, DiffRunError> {
    let args: Vec<_> = std::iter::once("diff-batch").chain(args.iter().copied()).collect();
    child::ask(&args, DEADLINE).map_err(|source| DiffRunError::Child { what: what.to_owned(), source })
}

fn print(report: &Report) -> Result<(), Error> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let Counts { operations, ranges, faults, told, unprovoked, passing, repeated, skipped, differences } =
        &report.counts;
    writeln!(out, "softmm {} beside Linux {}, seed {}", report.profile, report.kernel, report.seed)?;
    writeln!(out, "equal: {operations} operations, {ranges} announced ranges, {faults} faults")?;
    writeln!(out, "chosen by the kernel and replayed: {told} ({:.3} %)", report.told_share * 100.0)?;
    if *unprovoked > 0 {
        writeln!(
            out,
            "asked for and not done by the kernel (a page that somebody looks at is passed over): {unprovoked}"
        )?;
    }
    for Skipped { script, why } in skipped {
        writeln!(out, "skipped: {script}: {why}")?;
    }
    if *repeated > 0 {
        writeln!(out, "scripts run again since announcements were lost: {repeated}")?;
    }
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
