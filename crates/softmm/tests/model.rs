// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random operations on two or three address spaces, under every kernel profile, against a model that is a map from page to
//! contents.
//!
//! After every operation: contents and faults are the model's; every translation that was lost was lost inside an S..E
//! that covers it, or with a P or C; no frame was freed before its E; mapcounts, reference counts and exclusivity are exact. At the end
//! everything is given back and no frame and no page-table page is missing.

mod common;

use common::{Recorder, range};
use interleave::MaySleep;
use mmu_notifier::{PageAddr, Range};
use proptest::prelude::*;
use softmm::frame::GUP_PIN_COUNTING_BIAS;
use softmm::{
    AccessError, ChangeError, Config, FaultError, Foll, FollRef, FrameId, KernelProfile, Machine, Merge, Mm,
    MmUser, MmapError, Placement, Prot, Reclaim, UserPages, ZERO_PAGE,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The window straddles a page-table page (512 pages a leaf).
const FIRST: u64 = 506;
const PAGES: u64 = 12;
const WORDS: usize = 2;
type Contents = [u64; WORDS];

#[derive(Debug, Clone)]
enum Op {
    Mmap { mm: usize, at: u64, len: u64, prot: u8, replace: bool },
    Munmap { mm: usize, at: u64, len: u64 },
    Store { mm: usize, cpu: usize, page: u64, word: usize, value: u64 },
    Load { mm: usize, cpu: usize, page: u64, word: usize },
    Fork { mm: usize },
    Exit { mm: usize },
    Pin { mm: usize, at: u64, len: u64, write: bool, get: bool, longterm: bool, fast: bool, force: bool },
    Unpin { pin: usize },
    DeviceWrite { pin: usize, page: usize, value: u64 },
    Mprotect { mm: usize, at: u64, len: u64, prot: u8 },
    Dontneed { mm: usize, at: u64, len: u64 },
    Reclaim { mm: usize, page: u64, ignore_references: bool },
    Merge { mms: [usize; 2], pages: [u64; 2] },
    Unmerge { mm: usize, at: u64, len: u64 },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let span = || (0..PAGES).prop_flat_map(|at| (Just(at), 1..=PAGES - at));
    let mm = 0..3_usize;
    // Half of all accesses go to the two pages at the edge of a page-table page, so that they meet.
    let page = || prop_oneof![0..PAGES, 5..7_u64];
    let op = prop_oneof![
        1 => (mm.clone(), span(), 0..5_u8, any::<bool>())
            .prop_map(|(mm, (at, len), prot, replace)| Op::Mmap { mm, at, len, prot, replace }),
        1 => (mm.clone(), span()).prop_map(|(mm, (at, len))| Op::Munmap { mm, at, len }),
        6 => (mm.clone(), 0..2_usize, page(), 0..WORDS, 1..1000_u64)
            .prop_map(|(mm, cpu, page, word, value)| Op::Store { mm, cpu, page, word, value }),
        4 => (mm.clone(), 0..2_usize, page(), 0..WORDS)
            .prop_map(|(mm, cpu, page, word)| Op::Load { mm, cpu, page, word }),
        2 => mm.clone().prop_map(|mm| Op::Fork { mm }),
        1 => mm.clone().prop_map(|mm| Op::Exit { mm }),
        3 => (mm.clone(), page(), 1..4_u64, any::<[bool; 5]>()).prop_map(
            |(mm, at, len, [write, get, longterm, fast, force])| Op::Pin {
                mm, at, len: len.min(PAGES - at), write, get, longterm, fast, force
            }
        ),
        2 => (mm.clone(), span(), 0..5_u8)
            .prop_map(|(mm, (at, len), prot)| Op::Mprotect { mm, at, len, prot }),
        1 => (mm.clone(), span()).prop_map(|(mm, (at, len))| Op::Dontneed { mm, at, len }),
        4 => (mm.clone(), page(), any::<bool>())
            .prop_map(|(mm, page, ignore_references)| Op::Reclaim { mm, page, ignore_references }),
        2 => ([mm.clone(), mm.clone()], [page(), page()])
            .prop_map(|(mms, pages)| Op::Merge { mms, pages }),
        1 => (mm.clone(), span()).prop_map(|(mm, (at, len))| Op::Unmerge { mm, at, len }),
        2 => any::<usize>().prop_map(|pin| Op::Unpin { pin }),
        3 => (any::<usize>(), any::<usize>(), 1..1000_u64)
            .prop_map(|(pin, page, value)| Op::DeviceWrite { pin, page, value }),
    ];
    prop::collection::vec(op, 1..160)
}

/// An address space as user space knows it.
#[derive(Debug, Clone, Default)]
struct Model {
    prot: BTreeMap<u64, Prot>,
    contents: BTreeMap<u64, Contents>,
}

impl Model {
    fn may(&self, page: u64, write: bool) -> Result<(), FaultError> {
        let addr = page_addr(page);
        let prot = self.prot.get(&page).ok_or(FaultError::Unmapped(addr))?;
        let may = if write { prot.writable() } else { prot.readable() };
        if may { Ok(()) } else { Err(FaultError::Access(addr)) }
    }

    fn contents(&self, page: u64) -> Contents {
        self.contents.get(&page).copied().unwrap_or_default()
    }
}

struct Process {
    name: u64,
    user: MmUser,
    model: Model,
    recorder: Arc<Recorder>,
}

/// A page that a device holds.
struct Held {
    frame: FrameId,
    /// The place whose contents it must show: a FOLL_PIN shows the mapping's until that is unmapped. `None` for
    /// FOLL_GET, for the zero page and before 5.19, which promise nothing but that the frame stays.
    follows: Option<(u64, u64)>,
    pinned: bool,
    references: u32,
}

struct Pin {
    pages: UserPages,
    held: Vec<Held>,
}

struct World {
    machine: Arc<Machine>,
    processes: Vec<Process>,
    pins: Vec<Pin>,
    /// What pinned frames hold that no mapping leads to any more.
    orphans: BTreeMap<FrameId, Contents>,
    names: u64,
}

fn page_addr(page: u64) -> PageAddr {
    PageAddr::new((FIRST + page) << 12).unwrap()
}

fn window(at: u64, len: u64) -> Range {
    range(FIRST + at, len)
}

impl World {
    fn new(cx: &mut MaySleep<'_>, profile: KernelProfile) -> World {
        // Few slots, so that the swap area fills up.
        let config = Config { words_per_page: WORDS, swap_slots: 8, profile, ..Config::default() };
        let machine = Machine::new(config);
        let mut world =
            World { machine, processes: Vec::new(), pins: Vec::new(), orphans: BTreeMap::new(), names: 0 };
        let user = world.machine.new_mm().unwrap();
        world.add(cx, user, Model::default());
        world
    }

    fn add(&mut self, cx: &mut MaySleep<'_>, user: MmUser, model: Model) {
        let recorder = Recorder::new(&user, window(0, PAGES));
        common::register(cx, &user, recorder.clone());
        self.names += 1;
        self.processes.push(Process { name: self.names, user, model, recorder });
    }

    /// The mapping at these pages is about to go: pinned frames keep what they hold.
    fn orphan(&mut self, process: usize, pages: impl Iterator<Item = u64>) {
        let Process { name, model, .. } = &mut self.processes[process];
        for page in pages {
            for held in self.pins.iter_mut().flat_map(|pin| &mut pin.held) {
                if held.follows == Some((*name, page)) {
                    held.follows = None;
                    self.orphans.insert(held.frame, model.contents(page));
                }
            }
            model.prot.remove(&page);
            model.contents.remove(&page);
        }
    }

    fn apply(&mut self, cx: &mut MaySleep<'_>, op: &Op) {
        match *op {
            Op::Mmap { mm, at, len, prot, replace } => {
                let Some(i) = self.pick(mm) else { return };
                let prot = [Prot::None, Prot::Read, Prot::ReadWrite][(prot as usize).min(2)];
                let mm = self.processes[i].user.clone();
                let range = window(at, len);
                if replace {
                    self.orphan(i, at..at + len);
                    assert_eq!(mm.mmap(cx, Placement::Fixed(range), prot), Ok(range));
                } else {
                    let taken = (at..at + len).any(|p| self.processes[i].model.prot.contains_key(&p));
                    let expected = if taken { Err(MmapError::Exists(range)) } else { Ok(range) };
                    assert_eq!(mm.mmap(cx, Placement::FixedNoReplace(range), prot), expected);
                    if taken {
                        return;
                    }
                }
                self.processes[i].model.prot.extend((at..at + len).map(|p| (p, prot)));
            }
            Op::Munmap { mm, at, len } => {
                let Some(i) = self.pick(mm) else { return };
                self.orphan(i, at..at + len);
                self.processes[i].user.munmap(cx, window(at, len));
            }
            Op::Store { mm, cpu, page, word, value } => {
                let Some(i) = self.pick(mm) else { return };
                let Process { user, model, .. } = &mut self.processes[i];
                let addr = page_addr(page).get() + word as u64 * 8;
                let got = self.machine.cpus()[cpu].store(cx, user, addr, value);
                assert_eq!(got, model.may(page, true).map_err(AccessError::Fault));
                if got.is_ok() {
                    model.contents.entry(page).or_default()[word] = value;
                }
            }
            Op::Load { mm, cpu, page, word } => {
                let Some(i) = self.pick(mm) else { return };
                let Process { user, model, .. } = &self.processes[i];
                let addr = page_addr(page).get() + word as u64 * 8;
                let got = self.machine.cpus()[cpu].load(cx, user, addr);
                let may = model.may(page, false).map_err(AccessError::Fault);
                assert_eq!(got, may.map(|()| model.contents(page)[word]));
            }
            Op::Fork { mm } => {
                let Some(i) = self.pick(mm) else { return };
                if self.processes.len() < 3 {
                    let child = self.processes[i].user.fork(cx).unwrap();
                    self.add(cx, child, self.processes[i].model.clone());
                }
            }
            Op::Exit { mm } => {
                let Some(i) = self.pick(mm) else { return };
                if self.processes.len() > 1 {
                    self.exit(cx, i);
                }
            }
            Op::Pin { mm, at, len, write, get, longterm, fast, force } => {
                let Some(i) = self.pick(mm) else { return };
                let hold = if get { FollRef::Get } else { FollRef::Pin };
                let foll = Foll { write, longterm, force, hold };
                self.pin(cx, i, at, len, foll, fast);
            }
            Op::Mprotect { mm, at, len, prot } => {
                let Some(i) = self.pick(mm) else { return };
                let prot = [Prot::None, Prot::Read, Prot::ReadWrite][(prot as usize).min(2)];
                let Process { user, model, .. } = &mut self.processes[i];
                let hole = (at..at + len).find(|page| !model.prot.contains_key(page));
                let expected = hole.map_or(Ok(()), |page| Err(ChangeError::Hole(page_addr(page))));
                assert_eq!(user.mprotect(cx, window(at, len), prot), expected);
                (at..hole.unwrap_or(at + len)).for_each(|page| {
                    model.prot.insert(page, prot);
                });
            }
            Op::Dontneed { mm, at, len } => {
                let Some(i) = self.pick(mm) else { return };
                let prot = self.processes[i].model.prot.clone();
                self.orphan(i, at..at + len);
                let Process { user, model, .. } = &mut self.processes[i];
                model.prot = prot;
                let hole = (at..at + len).find(|page| !model.prot.contains_key(page));
                let expected = hole.map_or(Ok(()), |page| Err(ChangeError::Hole(page_addr(page))));
                assert_eq!(user.madvise_dontneed(cx, window(at, len)), expected);
            }
            Op::Reclaim { mm, page, ignore_references } => {
                let Some(i) = self.pick(mm) else { return };
                let pte = self.processes[i].user.peek_pte(page_addr(page));
                if pte.is_mapped() {
                    let frame = self.machine.frames().id(pte.pfn());
                    self.machine.reclaim_page(cx, frame, ignore_references);
                }
            }
            Op::Merge { mms: [a, b], pages: [page, other] } => {
                let (Some(a), Some(b)) = (self.pick(a), self.pick(b)) else { return };
                let (a, b) = (&self.processes[a], &self.processes[b]);
                for (process, page) in [(a, page), (b, other)] {
                    let mapped = process.model.prot.contains_key(&page);
                    let done = process.user.madvise_mergeable(cx, window(page, 1), true);
                    assert_eq!(done.is_ok(), mapped);
                }
                let merge =
                    self.machine.ksm_merge(cx, (&a.user, page_addr(page)), (&b.user, page_addr(other)));
                let same = a.model.contents(page) == b.model.contents(other);
                assert!(same || merge != Merge::Merged, "merged what differs");
            }
            Op::Unmerge { mm, at, len } => {
                let Some(i) = self.pick(mm) else { return };
                let Process { user, model, .. } = &self.processes[i];
                let mapped = (at..at + len).all(|page| model.prot.contains_key(&page));
                assert_eq!(user.madvise_mergeable(cx, window(at, len), false).is_ok(), mapped);
                for page in window(at, len).iter_pages() {
                    let pte = user.peek_pte(page);
                    assert!(!pte.is_mapped() || !self.machine.frames().is_ksm(pte.pfn()));
                }
            }
            Op::Unpin { pin } if !self.pins.is_empty() => {
                let pin = pin % self.pins.len();
                self.pins.swap_remove(pin);
            }
            Op::DeviceWrite { pin, page, value } if !self.pins.is_empty() => {
                self.device_write(pin, page, value);
            }
            Op::Unpin { .. } | Op::DeviceWrite { .. } => {}
        }
    }

    fn pick(&self, mm: usize) -> Option<usize> {
        (!self.processes.is_empty()).then(|| mm % self.processes.len())
    }

    fn exit(&mut self, cx: &mut MaySleep<'_>, process: usize) {
        self.orphan(process, 0..PAGES);
        let Process { user, recorder, .. } = self.processes.remove(process);
        recorder.take(cx);
        user.mmput(cx);
        assert_eq!(
            recorder.take(cx),
            [common::Heard::X],
            "a list notifier hears release and nothing after it"
        );
    }

    fn pin(&mut self, cx: &mut MaySleep<'_>, i: usize, at: u64, len: u64, foll: Foll, fast: bool) {
        let Process { name, user, model, .. } = &self.processes[i];
        let got = if fast {
            user.get_user_pages_fast(cx, &self.machine.cpus()[1], window(at, len), foll)
        } else {
            user.get_user_pages(cx, window(at, len), foll)
        };
        let expected = (at..at + len).try_for_each(|page| match model.may(page, foll.write) {
            Err(FaultError::Access(_)) if foll.force => Ok(()),
            may => may,
        });
        let pages = match got {
            Ok(pages) => {
                assert_eq!(expected, Ok(()));
                pages
            }
            Err(error) => return assert_eq!(Err(error), expected),
        };
        let profile = self.machine.profile();
        let pinned = foll.hold == FollRef::Pin && profile.read_pin_unshares;
        let counts = foll.hold == FollRef::Pin && profile.foll_pin;
        let held = pages.frames().zip(at..).map(|(frame, page)| {
            let follows = pinned && frame.pfn != ZERO_PAGE;
            assert!(
                follows || !pinned || !(foll.longterm || foll.write),
                "longterm pins never hold the zero page"
            );
            let zero = frame.pfn == ZERO_PAGE && profile.zero_page_unpinned;
            let references = if !counts {
                1
            } else if zero {
                0
            } else {
                GUP_PIN_COUNTING_BIAS
            };
            Held { frame, follows: follows.then_some((*name, page)), pinned, references }
        });
        let held = held.collect();
        self.pins.push(Pin { pages, held });
    }

    fn device_write(&mut self, pin: usize, page: usize, value: u64) {
        let pin = pin % self.pins.len();
        let Pin { pages, held } = &self.pins[pin];
        let Held { frame, follows, pinned, .. } = &held[page % held.len()];
        if !pages.foll().write || !pinned {
            return;
        }
        self.machine.frames().write(*frame, 0, value).unwrap();
        match follows {
            Some((name, page)) => {
                let process = self.processes.iter_mut().find(|p| p.name == *name).expect("orphaned at exit");
                process.model.contents.entry(*page).or_default()[0] = value;
            }
            None => self.orphans.get_mut(frame).expect("was orphaned")[0] = value,
        }
    }

    fn check(&self, cx: &mut MaySleep<'_>) {
        let frames = self.machine.frames();
        let has_exclusive = self.machine.profile().read_pin_unshares;
        let mut mapped: BTreeMap<_, u32> = BTreeMap::new();
        for Process { user, recorder, .. } in &self.processes {
            recorder.check_quiet(cx);
            for page in 0..PAGES {
                let pte = user.peek_pte(page_addr(page));
                if pte.is_mapped() && !pte.is_special() {
                    *mapped.entry(pte.pfn()).or_default() += 1;
                    let exclusive = frames.exclusive(pte.pfn()) || !has_exclusive;
                    assert!(!pte.is_writable() || exclusive, "writable implies exclusive");
                }
            }
        }
        let mut references = mapped.clone();
        for frame in self.machine.swap_cache(cx) {
            *references.entry(frame.pfn).or_default() += 1;
        }
        for Pin { pages, held } in &self.pins {
            for held in held {
                *references.entry(held.frame.pfn).or_default() += held.references;
                assert!(frames.is_live(held.frame), "a reference keeps the frame");
                self.check_device(held, pages.foll());
            }
        }
        *references.entry(ZERO_PAGE).or_default() += 1;
        for (&pfn, &count) in &references {
            assert_eq!(frames.refcount(pfn), count, "references of {pfn:?}");
            let mappers = mapped.get(&pfn).copied().unwrap_or(0);
            assert_eq!(frames.mapcount(pfn), mappers, "mappers of {pfn:?}");
            assert!(!frames.exclusive(pfn) || mappers <= 1, "{pfn:?} is exclusive and mapped twice");
        }
        assert_eq!(frames.total_frames() + 1 - frames.free_frames(), references.len(), "a frame leaked");
    }

    fn check_device(&self, held: &Held, foll: Foll) {
        let expected = match held.follows {
            Some((name, page)) => {
                let process = self.processes.iter().find(|p| p.name == name).expect("orphaned at exit");
                process.model.contents(page)
            }
            None => match self.orphans.get(&held.frame) {
                Some(contents) if held.pinned => *contents,
                _ => return,
            },
        };
        for (word, value) in expected.into_iter().enumerate() {
            let got = self.machine.frames().read(held.frame, word);
            assert_eq!(got, Ok(value), "a pin ({foll:?}) shows what the CPU sees at {:?}", held.follows);
        }
    }

    fn finish(mut self, cx: &mut MaySleep<'_>) {
        while !self.processes.is_empty() {
            self.exit(cx, 0);
        }
        self.pins.clear();
        for frame in self.machine.swap_cache(cx) {
            assert_eq!(self.machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed);
        }
        assert_eq!(self.machine.swap().in_use(cx), 0);
        let frames = self.machine.frames();
        assert_eq!(frames.free_frames(), frames.total_frames());
        assert_eq!(self.machine.tables_in_use(), 0);
        for cpu in self.machine.cpus() {
            assert_eq!(cpu.cached(cx), 0, "a TLB entry outlived its mm");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn softmm_is_the_model(ops in ops(), profile in prop::sample::select(&KernelProfile::ALL[..])) {
        MaySleep::enter(|cx| {
            let mut world = World::new(cx, profile);
            for op in &ops {
                world.apply(cx, op);
                world.check(cx);
            }
            world.finish(cx);
        });
    }
}

/// The model test would be worth little if its checks could not fail: a frame that is not given back is seen.
#[test]
#[should_panic(expected = "a frame leaked")]
fn a_leak_is_noticed() {
    MaySleep::enter(|cx| {
        let mut world = World::new(cx, KernelProfile::V6_18);
        let mm: Arc<Mm> = world.processes[0].user.clone();
        world.apply(cx, &Op::Mmap { mm: 0, at: 0, len: 1, prot: 2, replace: false });
        let pages = mm.get_user_pages(cx, window(0, 1), Foll::GET.write()).unwrap();
        mm.munmap(cx, window(0, 1));
        std::mem::forget(pages);
        world.processes[0].model = Model::default();
        world.check(cx);
    });
}
