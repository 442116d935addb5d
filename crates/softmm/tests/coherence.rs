// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device that pins nothing, on real threads: it maps what the mm shows, by the read_begin / read_retry protocol, and
//! must never use a freed frame nor one that the CPU no longer maps. And the control: without the retry it does.

mod common;

use common::range;
use interleave::{LockClass, MaySleep, Mutex, MutexGuard, Sleep, scope};
use mmu_notifier::{
    Access, Invalidate, Invalidation, PageAddr, PrimaryMmu, Range, SeqMoved, SetSeq, Subscription, WouldBlock,
};
use softmm::{AccessError, Config, Foll, FrameId, Machine, Mm, MmSubscription, Placement, Prot};
use std::collections::BTreeMap;
use std::sync::Arc;

static DEVICE: LockClass = LockClass::new("test device");
const PAGES: u64 = 8;

fn window() -> Range {
    range(508, PAGES)
}

/// The device's page table, and the lock that its callback takes.
struct Device {
    entries: Mutex<BTreeMap<PageAddr, Entry>>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    frame: FrameId,
    writable: bool,
}

impl Invalidate for Device {
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let mut entries = match cx {
            Sleep::May(cx) => self.entries.lock(cx),
            Sleep::TryOnly(cx) => self.entries.try_lock(cx).ok_or(WouldBlock)?,
        };
        let moved = seq.set();
        entries.retain(|page, _| !inv.range.contains(Range::page(*page)));
        Ok(moved)
    }
}

impl Device {
    fn new() -> Arc<Device> {
        Arc::new(Device { entries: Mutex::new(&DEVICE, BTreeMap::new()) })
    }

    /// Gets the page for the device without keeping a reference (hmm_range_fault). Not under the device's lock.
    fn get(cx: &mut MaySleep<'_>, mm: &Mm, page: PageAddr, access: Access) -> Option<Entry> {
        mm.fault_in(cx, Range::page(page), access).ok()?;
        let identity = mm.page_identity(cx, page).ok()?;
        let frame = mm.machine().frames().id(identity.pfn?);
        let writable = access == Access::Write;
        (!writable || identity.writable?).then_some(Entry { frame, writable })
    }

    /// The whole protocol: afterwards the entry is installed, and stays true while the lock is held.
    fn map<'d>(
        &'d self,
        cx: &mut MaySleep<'_>,
        mm: &Mm,
        subscription: &MmSubscription,
        page: PageAddr,
        access: Access,
    ) -> Option<(MutexGuard<'d, BTreeMap<PageAddr, Entry>>, Entry)> {
        loop {
            let seq = subscription.read_begin(cx).ok()?;
            let entry = Device::get(cx, mm, page, access)?;
            let mut entries = self.entries.lock(cx);
            if !subscription.read_retry(seq) {
                entries.insert(page, entry);
                return Some((entries, entry));
            }
        }
    }
}

/// Invariants 1 to 3 of the checker for every entry, under the lock: no invalidation can have returned since.
fn check_entries(mm: &Mm, entries: &BTreeMap<PageAddr, Entry>) {
    let frames = mm.machine().frames();
    for (&page, entry) in entries {
        let pte = mm.peek_pte(page);
        assert!(pte.is_present(), "{page:?}: the device maps {entry:?}, the CPU nothing");
        assert_eq!(frames.id(pte.pfn()), entry.frame, "{page:?}: coherence");
        assert!(pte.is_writable() || !entry.writable, "{page:?}: the device may write, the CPU may not");
        frames.read(entry.frame, 0).expect("memory safety");
        if entry.writable {
            frames.write(entry.frame, 1, 1).expect("memory safety");
        }
    }
}

/// A generator of its own per thread: xorshift.
fn random(state: &mut u64, below: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % below
}

fn nth_page(n: u64) -> PageAddr {
    window().iter_pages().nth(n as usize).unwrap()
}

#[test]
fn a_device_that_retries_never_sees_a_freed_frame() {
    const ROUNDS: u64 = 4_000;
    MaySleep::enter(|cx| {
        let machine = Machine::new(Config { frames: 512, gather_batch: 3, ..Config::default() });
        let user = machine.new_mm().unwrap();
        let mm: &Arc<Mm> = &user;
        let device = Device::new();
        let subscription = mm.subscribe(cx, window(), device.clone()).unwrap();
        mm.mmap(cx, Placement::Fixed(window()), Prot::ReadWrite).unwrap();
        let installed = scope(cx, |s, cx| {
            s.spawn("mapper", |cx| {
                let mut seed = 1;
                for _ in 0..ROUNDS {
                    let at = random(&mut seed, PAGES);
                    let piece = range(508 + at, 1 + random(&mut seed, PAGES - at));
                    if random(&mut seed, 2) == 0 {
                        mm.munmap(cx, piece);
                    }
                    mm.mmap(cx, Placement::Fixed(piece), Prot::ReadWrite).unwrap();
                }
            });
            s.spawn("writer", |cx| {
                let mut seed = 2;
                for i in 0..ROUNDS * 4 {
                    let addr = nth_page(random(&mut seed, PAGES)).get();
                    let stored = machine.cpus()[0].store(cx, mm, addr, i);
                    assert!(
                        !matches!(stored, Err(AccessError::Freed(_))),
                        "freed before the flush: {stored:?}"
                    );
                }
            });
            s.spawn("forker", |cx| {
                let mut seed = 3;
                for i in 0..ROUNDS / 4 {
                    let child = mm.fork(cx).unwrap();
                    let addr = nth_page(random(&mut seed, PAGES)).get();
                    let _ = machine.cpus()[1].store(cx, &child, addr, i);
                    child.mmput(cx);
                }
            });
            s.spawn("pinner", |cx| {
                let mut seed = 4;
                for i in 0..ROUNDS {
                    let page = Range::page(nth_page(random(&mut seed, PAGES)));
                    let foll = if i % 2 == 0 { Foll::PIN.write() } else { Foll::PIN };
                    let cpu = &machine.cpus()[1];
                    let Ok(pages) = mm.get_user_pages_fast(cx, cpu, page, foll) else { continue };
                    for frame in pages.frames() {
                        machine.frames().read(frame, 2).expect("a pin keeps the frame");
                    }
                }
            });
            let device = s.spawn("device", |cx| {
                let (mut seed, mut installed) = (5, 0_u64);
                for _ in 0..ROUNDS * 4 {
                    let page = nth_page(random(&mut seed, PAGES));
                    let access = if random(&mut seed, 2) == 0 { Access::Write } else { Access::Read };
                    if let Some((entries, _)) = device.map(cx, mm, &subscription, page, access) {
                        check_entries(mm, &entries);
                        installed += 1;
                    }
                }
                installed
            });
            device.join(cx).expect("the device thread found a stale entry")
        });
        assert!(installed > 0, "the device never got a page: the test shows nothing");
        assert!(device.entries.lock(cx).len() <= PAGES as usize);
        user.mmput(cx);
        assert_eq!(device.entries.lock(cx).len(), 0, "exit drops every entry");
        assert!(subscription.read_begin(cx).is_err());
        assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{reports:#?}");
    });
}

/// The munmap falls between getting the page and installing it. `retry`: does the device ask?
fn munmap_in_the_gap(cx: &mut MaySleep<'_>, retry: bool) -> Result<u64, softmm::FrameFreed> {
    let machine = Machine::new(Config::default());
    let user = machine.new_mm().unwrap();
    let mm: &Arc<Mm> = &user;
    let page = nth_page(0);
    mm.mmap(cx, Placement::Fixed(window()), Prot::ReadWrite).unwrap();
    machine.cpus()[0].store(cx, mm, page.get(), 42).unwrap();
    let device = Device::new();
    let subscription = mm.subscribe(cx, window(), device.clone()).unwrap();

    let seq = subscription.read_begin(cx).unwrap();
    let stale = Device::get(cx, mm, page, Access::Read).unwrap();
    mm.munmap(cx, window());
    mm.mmap(cx, Placement::Fixed(window()), Prot::ReadWrite).unwrap();
    let mut entries = device.entries.lock(cx);
    let entry = if retry && subscription.read_retry(seq) {
        drop(entries);
        let (guard, entry) = device.map(cx, mm, &subscription, page, Access::Read).unwrap();
        entries = guard;
        entry
    } else {
        entries.insert(page, stale);
        stale
    };
    let read = machine.frames().read(entry.frame, 0);
    drop(entries);
    subscription.unsubscribe(cx).unwrap();
    user.mmput(cx);
    read
}

#[test]
fn without_the_retry_the_device_reads_a_freed_frame() {
    MaySleep::enter(|cx| {
        assert_eq!(munmap_in_the_gap(cx, true), Ok(0), "with it, the new, empty mapping");
        assert!(munmap_in_the_gap(cx, false).is_err(), "the control must fail");
    });
}
