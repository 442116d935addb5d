// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use std::path::PathBuf;

use crate::watch::WorkingSet;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// MMU notifiers for user space: tells a program when Linux changes the memory that it shares with a device.
#[derive(Parser)]
#[command(name = "userptr", version, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

const AFTER_HELP: &str = "Without a command: `userptr live`.
Exit codes: 0 what the command checks holds, 1 it does not hold, 2 the command could not run.

Examples:
  userptr                         change this process's memory in every way Linux has, print who noticed
  userptr doctor                  what this machine offers, what is missing and how to get it
  userptr live --race --rounds 1000000
  userptr bench                   our registration cache beside UCX's";

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Explore every driver beside every path of the mm and print what breaks
    #[command(
        after_help = "A cell is driver/access/path/profile. Exit codes: 0 answered, 1 --check found a difference, \
2 could not run.

Examples:
  userptr answer
  userptr answer --driver i915 --profile v3_16,unwrapped_a
  userptr answer --explain i915-3.16-mended/write/fork/unwrapped_a
  userptr answer --change-pte --driver kvm --profile v3_16,unwrapped_a
  userptr answer --ledger > docs/thread.md"
    )]
    Answer(AnswerArgs),
    /// Measure our registration cache beside UCX's on this machine, and which changes of memory each misses
    #[command(
        after_help = "UCX 1.13 is loaded at run time if it is there (apt-get install libucx0); without it the command goes on alone.
Exit codes: 0 no stale hit of ours, 1 one where the source must hear (with --check also a goal of speed missed), 2 could not run.

Examples:
  userptr bench
  userptr bench --part hit,churn --plots plots
  userptr bench --quick --json | jq '.goals'"
    )]
    Bench(BenchArgs),
    /// One cache of `bench`, in a process of its own
    #[command(hide = true)]
    BenchSide(BenchSideArgs),
    /// One change of memory of `bench`, in a process of its own
    #[command(hide = true)]
    BenchChange(BenchChangeArgs),
    /// Look for a known bug in the kernel that had it, and in the one in which it was mended
    #[command(
        after_help = "Exit codes: 0 found where it is and silent where it was mended, 1 not so, 2 could not run.

Examples:
  userptr check --bug 19
  userptr check --all"
    )]
    Check(CheckArgs),
    /// Print what this machine offers to a notifier source, what is missing, and how to get it
    #[command(after_help = "Exit codes: 0 a complete source is usable, 1 only a partial one is, 2 none is.

Examples:
  userptr doctor
  userptr doctor --json | jq '.capabilities[] | select(.state != \"there\")'
  userptr doctor --has ksm && echo 'KSM can be tested here'")]
    Doctor(DoctorArgs),
    /// Change memory of this process in every way Linux has and print which device went stale and who was told
    #[command(
        after_help = "Exit codes: 0 the control is stale on exactly the rows declared and both sources are \
coherent on every event they must hear, 1 not so, 2 could not run.

Examples:
  userptr live
  userptr live --only mremap --json
  userptr live --source uffd         on a machine without /dev/kvm
  userptr live --race --rounds 1000000 --threads 1,2,4,8"
    )]
    Live(LiveArgs),
    /// Compare the software mm with this kernel: the same operations on both, by hand and at random
    #[command(
        after_help = "Exit codes: 0 they agree and the kernel's own choices were under 1 % of the operations, 1 not so, \
2 could not run.

Examples:
  userptr diff
  userptr diff --list
  userptr diff --seed 7 --ops 1000000 --json
  userptr diff --script FILE         a difference again, as `diff` prints it, or a script of your own"
    )]
    Diff(DiffArgs),
    /// Run a program, or look at one that runs, and print what changes its memory, how often and from where
    #[command(
        after_help = "The report goes to standard error: standard output is the program's. Exit code: the program's (128 + N \
if signal N killed it; 0 for --pid); 2 if it cannot be watched.

Examples:
  userptr watch -- python3 -c 'print(1)'
  userptr watch --follow --report out.html -- make -j2
  userptr watch --cost --working-set heap -- redis-server
  userptr watch -p 1234              until Ctrl-C or its end"
    )]
    Watch(WatchArgs),
    /// Switch off each lock, retry check, flush, wait, sequence bump and callback of the safe drivers, the cache and the
    /// objects: is it noticed?
    #[command(
        after_help = "Exit codes: 0 at least 95 % were noticed and each survivor is explained, 1 not so, 2 could not run.

Examples:
  userptr mutate
  userptr mutate rdma --all          what noticed each, too"
    )]
    Mutate(MutateArgs),
    /// Some scripts of `diff`, in a process of its own
    #[command(hide = true)]
    DiffBatch(DiffBatchArgs),
    /// One row of `live`, in a process of its own
    #[command(hide = true)]
    LiveRow(RowArgs),
    /// What this kernel's notifier says of one event, in a process of its own
    #[command(hide = true)]
    AnswerTrace(TraceArgs),
    /// One race of `live --race`, in a process of its own
    #[command(hide = true)]
    LiveRace(RaceRowArgs),
}

#[derive(Args)]
#[command(group(clap::ArgGroup::new("what").args(["explain", "callbacks", "change_pte", "cost", "ledger"])))]
pub(crate) struct AnswerArgs {
    /// Print one JSON document
    #[arg(long, conflicts_with_all = ["explain", "ledger"])]
    pub(crate) json: bool,
    /// Only drivers whose name contains TEXT
    #[arg(long, value_name = "TEXT", conflicts_with = "ledger")]
    pub(crate) driver: Option<String>,
    /// Only paths whose name contains TEXT
    #[arg(long, value_name = "TEXT", conflicts_with = "ledger")]
    pub(crate) path: Option<String>,
    /// Kernel profiles
    #[arg(long, value_delimiter = ',', default_value = "v3_16,unwrapped_a,v6_18", conflicts_with = "ledger")]
    pub(crate) profile: Vec<String>,
    /// Preemptions at most: 2, but 1 for --callbacks, --change-pte and --ledger
    #[arg(long)]
    pub(crate) bound: Option<u32>,
    /// Time for the table, or for one cell
    #[arg(long, default_value_t = 50)]
    pub(crate) seconds: u64,
    /// Drivers in kernels in which they never were, too
    #[arg(long)]
    pub(crate) anachronisms: bool,
    /// OS threads that explore
    #[arg(long, default_value_t = 2)]
    pub(crate) threads: usize,
    /// One cell: the lanes of what breaks it
    #[arg(long, value_name = "CELL")]
    pub(crate) explain: Option<String>,
    /// With --explain: run this schedule again instead of searching
    #[arg(long, value_name = "SCHEDULE", requires = "explain")]
    pub(crate) replay: Option<String>,
    /// With --explain: callbacks that are switched off
    #[arg(long, value_name = "CALLBACK", value_delimiter = ',', requires = "explain")]
    pub(crate) without: Vec<String>,
    /// The callbacks that each driver cannot do without, in each profile, found by switching them off one by one
    #[arg(long)]
    pub(crate) callbacks: bool,
    /// What change_pte is good for to each driver, in each profile: explored with it and without it
    #[arg(long)]
    pub(crate) change_pte: bool,
    /// What each driver costs: callbacks, unbinds, re-pins and faults for each operation, and the time that it takes
    #[arg(long)]
    pub(crate) cost: bool,
    /// With --cost: how often each operation is timed
    #[arg(long, default_value_t = 101, requires = "cost")]
    pub(crate) rounds: usize,
    /// The claims of the exchange of 2014, each decided, as Markdown
    #[arg(long)]
    pub(crate) ledger: bool,
    /// With --ledger: print nothing; is what FILE holds, measurements apart, what comes out now?
    #[arg(long, value_name = "FILE", requires = "ledger")]
    pub(crate) check: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct CheckArgs {
    /// A number of the catalogue, or a scenario of the question of 2014 (S1, S2, S5 to S8, S10, S11, S16, flag, sleep)
    #[arg(long, value_name = "N", required_unless_present = "all")]
    pub(crate) bug: Option<String>,
    /// Every bug that softmm can express
    #[arg(long, conflicts_with = "bug")]
    pub(crate) all: bool,
}

#[derive(Args)]
pub(crate) struct MutateArgs {
    /// Only drivers whose name contains TEXT
    #[arg(value_name = "TEXT")]
    pub(crate) driver: Option<String>,
    /// Print those that were noticed as well, and by what
    #[arg(long, conflicts_with = "json")]
    pub(crate) all: bool,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    /// Preemptions at most
    #[arg(long, default_value_t = 1)]
    pub(crate) bound: u32,
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    /// Print nothing; exit 0 if the named capability is there, 1 if it is missing or partial, 2 if there is no such name
    #[arg(long, value_name = "NAME", conflicts_with = "json")]
    pub(crate) has: Option<String>,
}

#[derive(Args, Default)]
pub(crate) struct LiveArgs {
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    /// Only the events whose name contains TEXT
    #[arg(long, value_name = "TEXT", conflicts_with = "race")]
    pub(crate) only: Option<String>,
    /// The sources to hold to what they must hear
    #[arg(long, value_enum, default_value_t)]
    pub(crate) source: Sources,
    /// List the events and what is declared of them; change nothing
    #[arg(long, conflicts_with = "race")]
    pub(crate) list: bool,
    /// Instead of the table: threads race to reuse an address while its old page is being unmapped
    #[arg(long)]
    pub(crate) race: bool,
    /// Rounds of each race
    #[arg(long, default_value_t = 20_000, requires = "race", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rounds: u64,
    /// Seconds for each contestant of a race at most; rounds that there is no time for are left out
    #[arg(long, default_value_t = 300, requires = "race", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,
    /// Threads of the malloc, get, free churn
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8", requires = "race", value_parser = threads)]
    pub(crate) threads: Vec<usize>,
    /// Write the JSON document to FILE as well
    #[arg(long, value_name = "FILE")]
    pub(crate) save: Option<PathBuf>,
}

/// Which sources a machine is expected to have.
#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sources {
    /// Both: without one of them the command cannot run
    #[default]
    Both,
    /// userfaultfd alone
    Uffd,
    /// KVM's notifier alone
    Kvm,
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=1024) => Ok(n),
        _ => Err("give 1 to 1024 threads".into()),
    }
}

#[derive(Args)]
pub(crate) struct DiffArgs {
    /// The random scripts that are run
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// About how many operations at random, after those by hand
    #[arg(long, default_value_t = 20_000)]
    pub(crate) ops: u64,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    /// List every path and the scripts that take it, or why none can; run nothing
    #[arg(long, conflicts_with_all = ["seed", "ops", "script"])]
    pub(crate) list: bool,
    /// Run the operations that FILE lists, one a line, and nothing else
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seed", "ops"])]
    pub(crate) script: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct WatchArgs {
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    /// Watch the processes that it makes, too
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Write a page with a map of the changes, self-contained, to FILE
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    /// Write the table or the JSON document to FILE instead of standard error
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Say what each cause would cost a device that has memory of the program mapped
    #[arg(long)]
    pub(crate) cost: bool,
    /// What the device has mapped: heap, all, or START-END (hexadecimal addresses)
    #[arg(long, value_name = "SET", default_value = "heap", requires = "cost")]
    pub(crate) working_set: WorkingSet,
    /// A process that runs, instead of a program
    #[arg(long, short, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Option<i32>,
    /// The program and its arguments
    #[arg(last = true, value_name = "PROGRAM ARGS", required_unless_present = "pid", conflicts_with = "pid")]
    pub(crate) program: Vec<std::ffi::OsString>,
}

#[derive(Args)]
pub(crate) struct DiffBatchArgs {
    /// Seed of the first script
    pub(crate) seed: u64,
    /// How many scripts; 0 for those by hand
    pub(crate) scripts: u64,
    /// The operations in FILE instead
    #[arg(long)]
    pub(crate) script: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct TraceArgs {
    /// Name of the event
    pub(crate) event: String,
}

#[derive(Args)]
pub(crate) struct RowArgs {
    /// Name of the event
    pub(crate) event: String,
    /// `none`, `uffd` or `kvm`
    pub(crate) source: String,
    /// `pinned` or `unpinned`
    pub(crate) device: String,
}

#[derive(Args)]
pub(crate) struct RaceRowArgs {
    /// Name of the race
    pub(crate) race: String,
    /// `none`, `uffd` or `kvm`
    pub(crate) source: String,
    /// Rounds
    pub(crate) rounds: u64,
    /// Seconds
    pub(crate) seconds: u64,
    /// Threads
    pub(crate) threads: usize,
    /// Go on until an answer is stale
    #[arg(long)]
    pub(crate) until_stale: bool,
}

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    /// Write SVG plots into DIR, which is made if it is not there
    #[arg(long, value_name = "DIR")]
    pub(crate) plots: Option<PathBuf>,
    /// A little of everything, to see that it works: the numbers mean nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Let the goals of speed decide the exit code too
    #[arg(long)]
    pub(crate) check: bool,
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_value = "hit,miss,unmap,churn,pressure,changes")]
    pub(crate) part: Vec<BenchPart>,
    /// Batches of each measurement; the median counts
    #[arg(long, default_value_t = 9, value_parser = batches)]
    pub(crate) batches: usize,
}

/// What `bench` measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchPart {
    /// Lookups of what is registered
    Hit,
    /// Lookups that register
    Miss,
    /// munmap of memory, registered and not
    Unmap,
    /// Threads that malloc, look up, and free: every hit is stale
    Churn,
    /// Hits while an allocator churns, and while another VM unmaps
    Pressure,
    /// The ways to change memory, and who is stale afterwards
    Changes,
}

fn batches(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=1000) => Ok(n),
        _ => Err("give 1 to 1000 batches".into()),
    }
}

#[derive(Args)]
pub(crate) struct BenchSideArgs {
    /// `ucx`, `kvm` or `uffd`
    pub(crate) side: String,
}

#[derive(Args)]
pub(crate) struct BenchChangeArgs {
    /// `ucx`, `kvm` or `uffd`
    pub(crate) side: String,
    /// Name of the event
    pub(crate) event: String,
}
