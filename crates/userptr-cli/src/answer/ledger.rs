// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr answer --ledger`: the claims of the exchange of 2014, decided, as Markdown; or whether a file still says what comes out.

use std::fmt::Write;
use std::process::ExitCode;

use drivers::{Callback, DRIVERS, Holds};
use interleave::MaySleep;
use mmu_check::answer::cost::{operation, times};
use mmu_check::answer::minimal::minimal;
use mmu_check::answer::worth::worth;
use mmu_check::answer::{Effort, Progress, Row, Turn, in_parallel};
use mmu_check::ledger::claims::{DESIGNS, NOTIFIED, claims};
use mmu_check::ledger::markdown::{self, MEASURED, MEASURED_END, computed};
use mmu_check::ledger::trace::heard;
use mmu_check::ledger::{Claim, Explored, Table};
use mmu_check::path::{PATHS, Path, named};
use mmu_notifier::Access;
use softmm::KernelProfile;

use super::trace::ask;
use super::{Bar, effort};
use crate::Error;
use crate::args::AnswerArgs;

/// Preemptions while callbacks are switched off one by one.
const MINIMAL_BOUND: u32 = 1;
/// How often an operation is timed.
const ROUNDS: usize = 101;

const INTRODUCTION: &str = "<!-- SPDX-License-Identifier: MIT OR Apache-2.0 -->
# The exchange of 2014, computed

In June 2014 the authors of i915's userptr driver asked each other whether it should care about `change_pte`, whether
the pair `invalidate_range_start`/`invalidate_range_end` around the callers of `set_pte_at_notify` might go, and what a driver
must hook at all. Nobody computed the answers. Here they are: each claim as statements about cells, a cell being one driver
beside one path of the mm under one kernel profile, every order of their steps tried up to a bound on preemptions.

`userptr answer --ledger` makes this document; `userptr answer --ledger --check docs/thread.md` says whether it is current. Verdicts
and conditions are derived from the cells. What stands between the lines *measured* is of one machine. The model is
sequentially consistent: no verdict speaks of weak memory.

Kernels: `v3_16` is the kernel of the exchange; `unwrapped_a` is 3.16 without the pair and with nothing in its place; in
`unwrapped_b` who has no change_pte hears invalidate_page after the page table lock is dropped, in `unwrapped_c` under it;
`v6_18` has no change_pte any more. Paths ending in a store of the CPU are named in `crates/mmu-check/src/path`, drivers in
`crates/drivers`.
";

pub(super) fn run(args: &AnswerArgs) -> Result<ExitCode, Error> {
    let effort = effort(args, BOUND_OF_CLAIMS, None);
    let Some(file) = &args.check else {
        print!("{}", document(effort, true));
        return Ok(ExitCode::SUCCESS);
    };
    let there = std::fs::read_to_string(file).map_err(|source| Error::File { path: file.clone(), source })?;
    let (there, now) = (computed(&there), computed(&document(effort, false)));
    if there == now {
        return Ok(ExitCode::SUCCESS);
    }
    let first = there.lines().zip(now.lines()).position(|(a, b)| a != b);
    let line = first.unwrap_or(there.lines().count().min(now.lines().count()));
    let at = |text: &str| text.lines().nth(line).unwrap_or("(the end)").to_owned();
    println!("{} is not current:\n  it says   {}\n  now it is {}", file.display(), at(&there), at(&now));
    Ok(ExitCode::FAILURE)
}

/// Preemptions for every statement at least: each says itself how many it needs.
const BOUND_OF_CLAIMS: u32 = 0;

fn document(effort: Effort, measure: bool) -> String {
    let claims = claims();
    let bar = Bar::new();
    let mut out = String::from(INTRODUCTION);
    MaySleep::enter(|cx| {
        let explored = Explored::new(cx, &claims, effort, &|progress| bar.show(progress));
        for claim in &claims {
            let decided: Vec<_> =
                claim.statements.iter().map(|statement| explored.decide(cx, statement)).collect();
            out.push_str(&markdown::heading(claim, &decided));
            for decided in &decided {
                out.push_str(&markdown::statement(decided));
            }
            match claim.table {
                Some(Table::Worth) => out.push_str(&worths(cx, effort, &bar)),
                Some(Table::Minimal) => out.push_str(&minimals(cx, effort, &bar)),
                Some(Table::Cost) => {
                    out.push_str(&costs(cx));
                    if measure {
                        out.push_str(&timed(cx));
                    }
                }
                None => {}
            }
            out.push_str(&traces(cx, claim, measure));
        }
        out.push_str(&fired(cx));
    });
    out
}

fn notified() -> Vec<&'static Path> {
    NOTIFIED.iter().filter_map(|name| named(name)).collect()
}

fn worths(cx: &mut MaySleep<'_>, effort: Effort, bar: &Bar) -> String {
    let profiles = [KernelProfile::V3_16, KernelProfile::UNWRAPPED_A];
    let mut rows = Vec::new();
    for kind in DRIVERS.iter().filter(|kind| kind.callbacks.contains(Callback::ChangePte)) {
        // Who pins has to fear what a read finds; the others are asked for the harder case.
        let access = if kind.holds == Holds::Pages && kind.reads { Access::Read } else { Access::Write };
        let row = Row { kind, access };
        let worth = |cx: &mut _, profile| {
            worth(cx, row, Callback::ChangePte, profile, &notified(), effort, &|p| bar.show(p))
        };
        rows.push((row.name(), profiles.map(|profile| worth(cx, profile)).to_vec()));
    }
    let names = profiles.map(|profile| profile.name);
    let others: Vec<_> =
        DRIVERS.iter().filter(|kind| !kind.callbacks.contains(Callback::ChangePte)).collect();
    let mut out = markdown::worth(effort.bound, &names, &rows);
    let others: Vec<_> = others.iter().map(|kind| kind.name).collect();
    let _ = writeln!(out, "\nNot implemented: {}.", others.join(", "));
    out
}

fn minimals(cx: &mut MaySleep<'_>, effort: Effort, bar: &Bar) -> String {
    let names = ["i915-3.16-mended", "i915-5.13", "kvm-3.16", "amd-iommu-v2-3.16"];
    let rows = DRIVERS
        .iter()
        .filter(|kind| names.contains(&kind.name))
        .map(|&kind| Row { kind, access: Access::Write })
        .chain(DESIGNS.into_iter().skip(1).take(3));
    let mut wanted = Vec::new();
    for row in rows {
        for profile in [KernelProfile::V3_16, KernelProfile::UNWRAPPED_A] {
            wanted.push((row, profile, None));
        }
    }
    let names = ["cow-file", "ksm-replace", "swap-out", "dontneed", "exit"];
    let paths: Vec<_> = names.into_iter().filter_map(named).collect();
    let bound = MINIMAL_BOUND.max(effort.bound);
    in_parallel(cx, effort.threads, &mut wanted, |(row, profile, found), done, of| {
        *found = Some(minimal(*row, *profile, &paths, bound));
        bar.show(Progress { turn: Turn::Bound(bound), done: done + 1, of });
    });
    let rows: Vec<_> = wanted
        .into_iter()
        .filter_map(|(row, profile, found)| Some((row.name(), profile.name, found?)))
        .collect();
    markdown::minimal(bound, &rows)
}

const COSTED: [KernelProfile; 4] = [
    KernelProfile::V3_16,
    KernelProfile::UNWRAPPED_A,
    KernelProfile::UNWRAPPED_B,
    KernelProfile::UNWRAPPED_C,
];

fn costed() -> Vec<Row> {
    let names = ["i915-3.16-mended", "i915-5.13", "kvm-3.16"];
    let drivers = DRIVERS.iter().filter(|kind| names.contains(&kind.name));
    drivers.map(|&kind| Row { kind, access: Access::Write }).chain(DESIGNS).collect()
}

fn costs(cx: &mut MaySleep<'_>) -> String {
    let mut out = String::from(
        "\nWhat one operation costs, and the device's next use after it: callbacks / pages unbound / pages got again / faults. \
         Exact, one thread.\n\n",
    );
    let heads = ["driver", "path"].into_iter().chain(COSTED.map(|profile| profile.name));
    markdown::table(&mut out, heads.map(str::to_owned).collect::<Vec<_>>().into_iter());
    for row in costed() {
        for path in notified() {
            let cells = COSTED.map(|profile| {
                operation(cx, &row.cell(path, profile)).map_or_else(
                    || "-".into(),
                    |o| format!("{} / {} / {} / {}", o.all_callbacks(), o.unbinds, o.repins, o.faults),
                )
            });
            if cells.iter().any(|cell| cell != "-") {
                let names = [row.name(), path.name.to_owned()];
                markdown::row(&mut out, names.into_iter().chain(cells));
            }
        }
    }
    out
}

fn timed(cx: &mut MaySleep<'_>) -> String {
    let mut out = format!(
        "\n{MEASURED}\nTimes, medians of {ROUNDS} on this machine, in nanoseconds: the operation without the driver, with \
         it, of this in callbacks, and the device's next use.\n\n"
    );
    let heads = ["driver", "path", "kernel", "alone", "watched", "in callbacks", "next use"];
    markdown::table(&mut out, heads.into_iter().map(str::to_owned));
    for row in costed() {
        for path in ["cow-file", "cow", "ksm-replace", "uprobe-insert"].into_iter().filter_map(named) {
            for profile in [KernelProfile::V3_16, KernelProfile::UNWRAPPED_A] {
                let Some(times) = times(cx, &row.cell(path, profile), ROUNDS) else { continue };
                let times = [times.alone, times.watched, times.callbacks, times.next_use];
                let names = [row.name(), path.name.to_owned(), profile.name.to_owned()];
                let times = times.map(|time| time.as_nanos().to_string());
                markdown::row(&mut out, names.into_iter().chain(times));
            }
        }
    }
    let _ = writeln!(out, "{MEASURED_END}");
    out
}

/// What this kernel announces, beside what softmm does for the same path.
fn traces(cx: &mut MaySleep<'_>, claim: &Claim, measure: bool) -> String {
    let mut out = String::new();
    if claim.live.is_empty() || !measure {
        return out;
    }
    let kernel = rustix::system::uname();
    let _ = write!(
        out,
        "\n{MEASURED}\nThe running kernel ({}), beside softmm's `v6_18`. Only starts are told by the kernel; (+0 2) is two \
         pages from the page on.\n\n",
        kernel.release().to_string_lossy()
    );
    let heads =
        ["event (`userptr live --only`)", "in the kernel", "the kernel fires", "path", "softmm fires"];
    markdown::table(&mut out, heads.into_iter().map(str::to_owned));
    for (event, name) in claim.live {
        let (path, fires) = match ask(event) {
            Ok(trace) => (trace.kernel_path.clone(), trace.text()),
            Err(e) => (String::new(), format!("not run: {e}")),
        };
        let soft = named(name).map(|path| letters(cx, path, KernelProfile::V6_18)).unwrap_or_default();
        markdown::row(&mut out, [(*event).to_owned(), path, fires, (*name).to_owned(), soft].into_iter());
    }
    let _ = writeln!(out, "{MEASURED_END}");
    out
}

fn letters(cx: &mut MaySleep<'_>, path: &'static Path, profile: KernelProfile) -> String {
    let heard = heard(cx, path, profile);
    if heard.is_empty() {
        return "nothing".into();
    }
    heard.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// What each path fires under each profile.
fn fired(cx: &mut MaySleep<'_>) -> String {
    let mut out = String::from(
        "\n## What each path fires\n\nS and E: invalidate_range_start and end; C: change_pte; P: invalidate_page; R: invalidate_range, later \
         arch_invalidate_secondary_tlbs; Y: clear_flush_young; X: release. Each path once, alone, with all of what it does after \
         its preparation; P also to who has no change_pte. A range that is not the page alone is told: (+0 2) is two pages \
         from the page on.\n\n",
    );
    let heads = std::iter::once("path").chain(KernelProfile::ALL.map(|profile| profile.name));
    markdown::table(&mut out, heads.map(str::to_owned).collect::<Vec<_>>().into_iter());
    for path in PATHS {
        let cells: Vec<_> =
            KernelProfile::ALL.into_iter().map(|profile| letters(cx, path, profile)).collect();
        markdown::row(&mut out, std::iter::once(path.name.to_owned()).chain(cells));
    }
    out
}
