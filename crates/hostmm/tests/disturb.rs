// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every event of the catalogue really happens, its declared outcome for both kinds of device is what this kernel
//! does, and the machine is as it was afterwards.
//!
//! The devices here are the control: nobody tells them anything. One is an io_uring fixed buffer, read through
//! WRITE_FIXED; the other remembers the page frame number.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use hostmm::disturb::{
    After, Arena, Change, DisturbError, Event, Observer, Outcome, Scene, Sighting, Via, catalogue,
};
use hostmm::pin::{Pin, PinError, Pinner};
use hostmm::testing::{in_child, scratch, skip, skip_rest};
use mmu_notifier::PAGE_SIZE;

const DEADLINE: Duration = Duration::from_secs(90);

fn arena() -> Arena {
    Arena::new(scratch(env!("CARGO_TARGET_TMPDIR")))
}

fn pfn(addr: u64) -> Option<u64> {
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entry, addr / PAGE_SIZE * 8).unwrap();
    let entry = u64::from_ne_bytes(entry);
    (entry >> 63 == 1).then_some(entry & ((1 << 55) - 1))
}

/// The number at the start of the pinned page, as the device sees it.
fn read_through(pin: &Pin) -> u64 {
    let mut word = [0; 8];
    pin.read_through(0, &mut word).unwrap();
    u64::from_ne_bytes(word)
}

/// Is `addr` in a writable mapping?
fn mapped_writable(addr: u64) -> bool {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let of = |hex| u64::from_str_radix(hex, 16).unwrap();
        of(start) <= addr && addr < of(end) && rest.starts_with("rw")
    })
}

/// May the program write at `addr` without the kernel's doing something first?
fn writable_as_is(addr: u64) -> bool {
    mapped_writable(addr) && {
        let before = minor_faults();
        // SAFETY: mapped, writable, the scene's; the value does not change.
        unsafe { std::ptr::write_volatile(addr as *mut u64, std::ptr::read_volatile(addr as *const u64)) };
        minor_faults() == before
    }
}

fn minor_faults() -> i64 {
    // SAFETY: an all-zero rusage is valid, and the kernel fills it in.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage.ru_minflt
    }
}

fn sight(scene: &Scene) -> Sighting {
    Observer::new(scene.watched(), scene.before()).look()
}

/// Disturb; then the scene must look as it declared.
fn disturb(event: &Event, scene: &mut Scene) -> Change {
    let mut returned = 0;
    let change = scene.disturb(&mut || returned += 1).unwrap_or_else(|e| not_today(event, &e));
    let expected = match (change, scene.after()) {
        (Change::Refused, _) => Sighting::Stamp(scene.before()),
        (Change::Happened, After::Stamp(stamp)) => Sighting::Stamp(stamp),
        (Change::Happened, After::Faults) => Sighting::Fault,
    };
    assert_eq!(sight(scene), expected, "{}: what the CPU sees after {change:?}", event.name);
    assert!(returned == 1 || (returned == 0 && change == Change::Refused), "{}: {returned}", event.name);
    change
}

/// A kernel thread that has better things to do is no failure of ours; anything else is.
fn not_today(event: &Event, error: &DisturbError) -> ! {
    if event.via == Via::KernelThread && matches!(error, DisturbError::Timeout { .. }) {
        skip_rest("kernel_thread", &error.to_string());
    }
    panic!("{}: {error}", event.name)
}

/// Does the machine offer what the event needs? Says `skipped:` where not.
fn has_all(event: &Event, arena: &Arena) -> bool {
    let missing = event.needs.iter().find_map(|need| Some((need.capability(), need.missing(arena)?)));
    if let Some((capability, why)) = &missing {
        skip(*capability, why);
    }
    missing.is_none()
}

fn fresh(event: &Event, arena: &mut Arena) -> Scene {
    let scene = event.setup(arena).unwrap_or_else(|e| not_today(event, &e));
    assert_eq!(sight(&scene), Sighting::Stamp(scene.before()), "{}: filled", event.name);
    assert!(pfn(scene.watched().start()).is_some(), "{}: present", event.name);
    scene
}

fn measure_pinned(event: &Event, arena: &mut Arena) -> Outcome {
    let mut scene = fresh(event, arena);
    let addr = scene.watched().start();
    let was = pfn(addr);
    let pinner = Pinner::new(1).unwrap();
    let device = match pinner.pin(scene.watched()) {
        Ok(device) => device,
        Err(e @ (PinError::MemlockLimit { .. } | PinError::Unmapped { .. })) => panic!("{}: {e}", event.name),
        Err(e) => {
            println!("{:30} {e}", event.name);
            return Outcome::NotMappable;
        }
    };
    assert_eq!(read_through(&device), scene.before());
    let moved_by_pin = pfn(addr) != was;
    let change = disturb(event, &mut scene);
    let (device, cpu) = (Sighting::Stamp(read_through(&device)), sight(&scene));
    if change == Change::Refused || moved_by_pin {
        assert_eq!(device, cpu, "{}: prevented, and yet stale", event.name);
        return Outcome::Prevented;
    }
    judge(device == cpu, true, addr)
}

fn measure_unpinned(event: &Event, arena: &mut Arena) -> Outcome {
    let mut scene = fresh(event, arena);
    let addr = scene.watched().start();
    let (cached, writable) = (pfn(addr), mapped_writable(addr));
    let change = disturb(event, &mut scene);
    assert_eq!(change, Change::Happened, "{}: without a pin it must happen", event.name);
    judge(sight(&scene) != Sighting::Fault && pfn(addr) == cached, writable, addr)
}

fn judge(same: bool, was_writable: bool, addr: u64) -> Outcome {
    match same {
        false => Outcome::Stale,
        true if was_writable && !writable_as_is(addr) => Outcome::WriteStale,
        true => Outcome::Coherent,
    }
}

/// What a scene must put back.
fn machine() -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let ksm = ["run", "sleep_millisecs", "pages_to_scan", "smart_scan"];
    let mut all: Vec<String> = ksm.iter().map(|f| read(&format!("/sys/kernel/mm/ksm/{f}"))).collect();
    all.push(
        read("/proc/sysvipc/shm")
            .lines()
            .filter(|l| l.contains(&format!(" {} ", std::process::id())))
            .collect(),
    );
    all
}

fn vmas() -> usize {
    fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

#[test]
fn names_are_unique_and_tell_the_door() {
    let names: BTreeSet<_> = catalogue().iter().map(|e| e.name).collect();
    assert_eq!(names.len(), catalogue().len());
    for event in catalogue() {
        match event.via {
            Via::Libc => assert!(!event.name.ends_with("/raw"), "{}", event.name),
            Via::RawSyscall => assert!(event.name.ends_with("/raw"), "{}", event.name),
            Via::OtherProcess => assert!(event.name.ends_with("/other_process"), "{}", event.name),
            Via::Fault | Via::KernelThread => assert!(!event.name.contains('/'), "{}", event.name),
        }
        assert!(!event.expect.why.is_empty() && !event.kernel_path.is_empty(), "{}", event.name);
    }
}

/// The control: stale on exactly the rows declared.
#[test]
fn every_event_does_what_is_declared() {
    let mut wrong = Vec::new();
    for event in catalogue() {
        let body = || {
            let mut arena = arena();
            if !has_all(event, &arena) {
                return;
            }
            if event.via == Via::OtherProcess && event.expect.unpinned == Outcome::NotMappable {
                // exit: the memory is the child's; the scene checks that the child is gone.
                let mut scene = fresh(event, &mut arena);
                disturb(event, &mut scene);
                return;
            }
            // Let the allocator and the standard library map what they need first.
            disturb(event, &mut fresh(event, &mut arena));
            let (before, maps) = (machine(), vmas());
            let unpinned = measure_unpinned(event, &mut arena);
            let pinned = measure_pinned(event, &mut arena);
            println!("{:30} pinned {pinned:?}, unpinned {unpinned:?}", event.name);
            assert_eq!(before, machine(), "{}: a setting was not put back", event.name);
            assert!(vmas().abs_diff(maps) <= 3, "{}: {maps} mappings before, {} after", event.name, vmas());
            assert_eq!((pinned, unpinned), (event.expect.pinned, event.expect.unpinned), "{}", event.name);
        };
        let name = format!("every_event_does_what_is_declared#{}", event.name);
        let caught =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| in_child(&name, DEADLINE, body)));
        if let Err(panic) = caught {
            wrong.push(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| event.name.to_owned()));
        }
    }
    assert!(wrong.is_empty(), "{} events:\n{}", wrong.len(), wrong.join("\n"));
}
