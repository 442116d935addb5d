// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ways to change memory: each is done to a page that a cache has registered with an io_uring, and then the cache is
//! asked again. The device shows whether what it hands out is the program's memory. One process for each.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use hostmm::disturb::{After, Arena, Change, Event, catalogue};
use hostmm::peer::ucx::{Rcache, Registrar};
use hostmm::pin::{Pin, Pinner};
use hostmm::primary::{HostMm, Source};
use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::{Access, Range};
use serde::{Deserialize, Serialize};
use userptr::RegistrationCache;
use userptr::cache::Options;
use userptr::device::io_uring::IoUring;

use super::contestant::{Side, kvm_source, uffd_source};
use super::report::Row;
use crate::{Error, child, print_json};

static PINS: LockClass = LockClass::new("bench_pins");
const DEADLINE: Duration = Duration::from_secs(30);
const SLOTS: u32 = 16;

/// Families of events by how their names begin. The others move pages that a pin holds in place.
const FAMILIES: &[&str] = &[
    "munmap",
    "free_large",
    "brk",
    "map_fixed",
    "mremap",
    "madv_dontneed",
    "process_madvise",
    "madv_free_rewrite",
    "madv_remove",
    "madv_guard_install",
    "truncate",
    "punch_hole",
    "fork",
    "shmdt",
    "shm_remap",
    "remap_file_pages",
];

/// What a cache hands out afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// The program's memory, or an error where the program has none.
    Coherent,
    /// Pages that are not the program's.
    Stale,
}

/// The events, fewer if it has to be quick.
pub(super) fn events(quick: bool) -> Vec<&'static Event> {
    let quick_ones = ["munmap_mmap/raw", "munmap_mmap/libc", "truncate/raw", "madv_dontneed_locked/libc"];
    let chosen = |event: &&Event| {
        let family = FAMILIES.iter().any(|family| event.name.starts_with(family));
        if quick { quick_ones.contains(&event.name) } else { family }
    };
    catalogue().into_iter().filter(chosen).collect()
}

/// One event against `sides`.
pub(super) fn row(event: &Event, sides: &[Side]) -> Row {
    let arena = Arena::new(std::env::temp_dir());
    let skipped = event.needs.iter().find_map(|need| need.missing(&arena));
    let verdict = |side: &Side| {
        let words = ["bench-change", side.name(), event.name];
        let answer = child::ask::<Result<Verdict, String>>(&words, DEADLINE);
        (*side, answer.unwrap_or_else(|e| Err(e.to_string())))
    };
    let verdicts = if skipped.is_some() { Vec::new() } else { sides.iter().map(verdict).collect() };
    Row {
        change: event.name.into(),
        via: event.via.to_string(),
        kvm_hears: event.expect.kvm_delivers,
        uffd_hears: event.expect.uffd_delivers,
        verdicts,
        skipped,
    }
}

/// What the process of one event does.
pub(crate) fn answer(side: &str, event: &str) -> Result<ExitCode, Error> {
    let found = Side::named(side).ok_or_else(|| format!("there is no side {side}"));
    let event =
        catalogue().into_iter().find(|e| e.name == event).ok_or_else(|| Error::NoEvent(event.into()))?;
    let verdict = found.and_then(|side| match side {
        Side::Ucx => {
            let pinner = Pinner::new(SLOTS).map_err(|e| e.to_string())?;
            let registrar = Pins { pinner, pins: Mutex::new(&PINS, Vec::new()) };
            let cache = Rcache::create(registrar).map_err(|e| e.to_string())?;
            change(event, &|range| see_ucx(&cache, range))
        }
        Side::Kvm => kvm_source().and_then(|source| over(event, source)),
        Side::Uffd => uffd_source().and_then(|source| over(event, source)),
    });
    print_json(&verdict)?;
    Ok(ExitCode::SUCCESS)
}

fn over<S: Source + 'static>(event: &Event, source: S) -> Result<Verdict, String> {
    let mm = Arc::new(HostMm::new(source, 1).map_err(|e| e.to_string())?);
    let device = IoUring::new(SLOTS).map_err(|e| e.to_string())?;
    let cache = RegistrationCache::new(mm, device, Options::default()).map_err(|e| e.to_string())?;
    change(event, &|range| {
        let lease = cache.get(range.start() as usize, range.len() as usize, Access::Write);
        let lease = lease.map_err(|e| e.to_string())?;
        let file = rustix::fs::memfd_create("seen", rustix::fs::MemfdFlags::CLOEXEC);
        let file = File::from(file.map_err(|e| e.to_string())?);
        cache.device().write_at(&file, 0, &lease).map_err(|e| e.to_string())?;
        let mut word = [0; 8];
        file.read_exact_at(&mut word, 0).map_err(|e| e.to_string())?;
        Ok(u64::from_ne_bytes(word))
    })
}

/// `see`: what the device sees through what the cache hands out for a range.
fn change(event: &Event, see: &dyn Fn(Range) -> Result<u64, String>) -> Result<Verdict, String> {
    let mut arena = Arena::new(std::env::temp_dir());
    let mut scene = event.setup(&mut arena).map_err(|e| e.to_string())?;
    let watched = scene.watched();
    let before = see(watched)?;
    if before != scene.before() {
        return Err("the device does not see the memory at first".into());
    }
    match scene.disturb(&mut || ()) {
        Ok(Change::Happened) => {}
        Ok(Change::Refused) => return Err("the kernel refuses it for a pinned page".into()),
        Err(e) => return Err(format!("does not work in this process: {e}")),
    }
    Ok(match (see(watched), scene.after()) {
        (Err(_), After::Faults) => Verdict::Coherent,
        (Ok(seen), After::Stamp(stamp)) if seen == stamp => Verdict::Coherent,
        (Ok(_), _) => Verdict::Stale,
        (Err(why), After::Stamp(_)) => return Err(why),
    })
}

/// Pins for UCX, by number.
struct Pins {
    pinner: Pinner,
    pins: Mutex<Vec<Option<Pin>>>,
}

impl Registrar for Pins {
    fn register(&self, addr: usize, len: usize) -> Option<u64> {
        let pin = self.pinner.pin(Range::enclosing(addr as u64, len as u64).ok()?).ok()?;
        MaySleep::enter(|cx| {
            let mut pins = self.pins.lock(cx);
            pins.push(Some(pin));
            Some(pins.len() as u64 - 1)
        })
    }

    fn deregister(&self, token: u64) {
        let pin = MaySleep::enter(|cx| self.pins.lock(cx).get_mut(token as usize).and_then(Option::take));
        drop(pin);
    }
}

fn see_ucx(cache: &Rcache<Pins>, range: Range) -> Result<u64, String> {
    let held = cache.get(range.start() as usize, range.len() as usize).map_err(|e| e.to_string())?;
    let mut word = [0; 8];
    MaySleep::enter(|cx| match cache.registrar().pins.lock(cx).get(held.token() as usize) {
        Some(Some(pin)) => {
            let offset = range.start() - pin.range().start();
            pin.read_through(offset, &mut word).map_err(|e| e.to_string())
        }
        _ => Err("what UCX hands out is not registered any more".to_owned()),
    })?;
    Ok(u64::from_ne_bytes(word))
}
