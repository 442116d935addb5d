// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random operations on files and on two or three address spaces that map them, under every kernel profile, against a model that knows what each page
//! of a file and each private copy holds.
//!
//! After every operation: contents, SIGBUS and SIGSEGV are the model's; a regular file's clean pages are on the disk as they
//! are in the cache, and no pte lets anybody write a page that is clean; every translation that was lost was lost
//! inside an S..E that covers it; reference counts and mapcounts are exact, page cache included. At the end nothing is missing.

mod common;

use common::{Recorder, range};
use interleave::MaySleep;
use mmu_notifier::{PageAddr, Range};
use proptest::prelude::*;
use softmm::frame::GUP_PIN_COUNTING_BIAS;
use softmm::uprobes::BREAKPOINT;
use softmm::{
    AccessError, Config, FaultError, File, FileError, FileKind, Foll, FollRef, KernelProfile, Machine,
    MapKind, MmUser, Placement, Prot, Reclaim, UprobeError, UserPages, ZERO_PAGE,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The window straddles a page-table page (512 pages a leaf).
const FIRST: u64 = 507;
const PAGES: u64 = 10;
const FILE_PAGES: u64 = 6;
const WORDS: usize = 2;
type Contents = [u64; WORDS];

#[derive(Debug, Clone)]
enum Op {
    MapFile { mm: usize, file: usize, at: u64, len: u64, pgoff: u64, write: bool, shared: bool },
    MapAnon { mm: usize, at: u64, len: u64 },
    Munmap { mm: usize, at: u64, len: u64 },
    Store { mm: usize, cpu: usize, page: u64, word: usize, value: u64 },
    Load { mm: usize, cpu: usize, page: u64, word: usize },
    Fork { mm: usize },
    Exit { mm: usize },
    Write { file: usize, page: u64, word: usize, value: u64 },
    Read { file: usize, page: u64, word: usize },
    Truncate { file: usize, pages: u64 },
    Punch { file: usize, at: u64, len: u64 },
    Fsync { file: usize },
    Reclaim { file: usize, page: u64 },
    Age { file: usize, page: u64 },
    Mprotect { mm: usize, at: u64, len: u64, write: bool },
    Dontneed { mm: usize, at: u64, len: u64 },
    SwapOut { mm: usize, page: u64 },
    Probe { file: usize, page: u64, word: usize },
    Unprobe { probe: usize },
    Pin { mm: usize, page: u64, write: bool, get: bool, longterm: bool, fast: bool },
    Unpin { pin: usize },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let span = || (0..PAGES).prop_flat_map(|at| (Just(at), 1..=PAGES - at));
    let (mm, file, index) = (0..3_usize, 0..3_usize, 0..FILE_PAGES);
    // Half of all accesses go to the pages at the edge of a page-table page, so that they meet.
    let page = || prop_oneof![0..PAGES, 4..6_u64];
    let op = prop_oneof![
        4 => (mm.clone(), file.clone(), span(), index.clone(), any::<[bool; 2]>()).prop_map(
            |(mm, file, (at, len), pgoff, [write, shared])| Op::MapFile { mm, file, at, len, pgoff, write, shared }
        ),
        1 => (mm.clone(), span()).prop_map(|(mm, (at, len))| Op::MapAnon { mm, at, len }),
        1 => (mm.clone(), span()).prop_map(|(mm, (at, len))| Op::Munmap { mm, at, len }),
        8 => (mm.clone(), 0..2_usize, page(), 0..WORDS, 1..1000_u64)
            .prop_map(|(mm, cpu, page, word, value)| Op::Store { mm, cpu, page, word, value }),
        6 => (mm.clone(), 0..2_usize, page(), 0..WORDS)
            .prop_map(|(mm, cpu, page, word)| Op::Load { mm, cpu, page, word }),
        2 => mm.clone().prop_map(|mm| Op::Fork { mm }),
        1 => mm.clone().prop_map(|mm| Op::Exit { mm }),
        3 => (file.clone(), index.clone(), 0..WORDS, 1..1000_u64)
            .prop_map(|(file, page, word, value)| Op::Write { file, page, word, value }),
        2 => (file.clone(), index.clone(), 0..WORDS).prop_map(|(file, page, word)| Op::Read { file, page, word }),
        2 => (file.clone(), 0..FILE_PAGES).prop_map(|(file, pages)| Op::Truncate { file, pages }),
        1 => (file.clone(), index.clone(), 1..4_u64).prop_map(|(file, at, len)| Op::Punch { file, at, len }),
        2 => file.clone().prop_map(|file| Op::Fsync { file }),
        2 => (file.clone(), index.clone()).prop_map(|(file, page)| Op::Reclaim { file, page }),
        1 => (file.clone(), index.clone()).prop_map(|(file, page)| Op::Age { file, page }),
        1 => (mm.clone(), span(), any::<bool>())
            .prop_map(|(mm, (at, len), write)| Op::Mprotect { mm, at, len, write }),
        1 => (mm.clone(), span()).prop_map(|(mm, (at, len))| Op::Dontneed { mm, at, len }),
        2 => (mm.clone(), page()).prop_map(|(mm, page)| Op::SwapOut { mm, page }),
        2 => (file, index, 0..WORDS).prop_map(|(file, page, word)| Op::Probe { file, page, word }),
        1 => any::<usize>().prop_map(|probe| Op::Unprobe { probe }),
        3 => (mm, page(), any::<[bool; 4]>()).prop_map(
            |(mm, page, [write, get, longterm, fast])| Op::Pin { mm, page, write, get, longterm, fast }
        ),
        2 => any::<usize>().prop_map(|pin| Op::Unpin { pin }),
    ];
    prop::collection::vec(op, 1..160)
}

/// What one page of an address space shows.
#[derive(Debug, Clone, Copy)]
struct Mapped {
    prot: Prot,
    /// File and page of it; `None` is anonymous memory.
    file: Option<(usize, u64)>,
    shared: bool,
    /// The process's own copy.
    copy: Option<Contents>,
}

type Model = BTreeMap<u64, Mapped>;

/// A file as user space knows it.
#[derive(Debug, Clone, Default)]
struct FileModel {
    pages: u64,
    contents: BTreeMap<u64, Contents>,
}

struct Process {
    user: MmUser,
    model: Model,
    recorder: Arc<Recorder>,
}

struct World {
    machine: Arc<Machine>,
    files: Vec<(Arc<File>, FileModel)>,
    processes: Vec<Process>,
    pins: Vec<UserPages>,
    /// File, page, word, and what was there.
    probes: Vec<(usize, u64, usize, u64)>,
}

fn page_addr(page: u64) -> PageAddr {
    PageAddr::new((FIRST + page) << 12).unwrap()
}

fn window(at: u64, len: u64) -> Range {
    range(FIRST + at, len)
}

impl World {
    fn new(cx: &mut MaySleep<'_>, profile: KernelProfile) -> World {
        let config =
            Config { words_per_page: WORDS, gather_batch: 5, swap_slots: 8, profile, ..Config::default() };
        let machine = Machine::new(config);
        let files = [FileKind::Regular, FileKind::Shmem, FileKind::Xip]
            .map(|kind| (machine.new_file(kind, 4), FileModel { pages: 4, contents: BTreeMap::new() }));
        let user = machine.new_mm().unwrap();
        let mut world = World {
            machine,
            files: files.into(),
            processes: Vec::new(),
            pins: Vec::new(),
            probes: Vec::new(),
        };
        world.add(cx, user, Model::new());
        world
    }

    fn add(&mut self, cx: &mut MaySleep<'_>, user: MmUser, model: Model) {
        let recorder = Recorder::of_files(&user, window(0, PAGES));
        common::register(cx, &user, recorder.clone());
        self.processes.push(Process { user, model, recorder });
    }

    /// What an access to the page gives: the fault, or the contents.
    fn expected(&self, process: usize, page: u64, write: bool) -> Result<Contents, FaultError> {
        let addr = page_addr(page);
        let mapped = self.processes[process].model.get(&page).ok_or(FaultError::Unmapped(addr))?;
        if write && !mapped.prot.writable() {
            return Err(FaultError::Access(addr));
        }
        let Some((file, index)) = mapped.file else { return Ok(mapped.copy.unwrap_or_default()) };
        let model = &self.files[file].1;
        match mapped.copy {
            Some(copy) => Ok(copy),
            None if index >= model.pages => Err(FaultError::PastEnd(addr)),
            None => Ok(model.contents.get(&index).copied().unwrap_or_default()),
        }
    }

    fn apply(&mut self, cx: &mut MaySleep<'_>, op: &Op) {
        match *op {
            Op::MapFile { mm, file, at, len, pgoff, write, shared } => {
                let Some(i) = self.pick(mm) else { return };
                let prot = if write { Prot::ReadWrite } else { Prot::Read };
                let kind = if shared { MapKind::Shared } else { MapKind::Private };
                let Process { user, model, .. } = &mut self.processes[i];
                let there = Placement::Fixed(window(at, len));
                user.mmap_file(cx, there, prot, &self.files[file].0, pgoff, kind).unwrap();
                for page in at..at + len {
                    let file = Some((file, pgoff + page - at));
                    model.insert(page, Mapped { prot, file, shared, copy: None });
                }
                for (of, index, word, _) in self.probes.clone() {
                    for page in (at..at + len).filter(|page| (of, index) == (file, pgoff + page - at)) {
                        self.probed(i, page, word);
                    }
                }
            }
            Op::MapAnon { mm, at, len } => {
                let Some(i) = self.pick(mm) else { return };
                let Process { user, model, .. } = &mut self.processes[i];
                user.mmap(cx, Placement::Fixed(window(at, len)), Prot::ReadWrite).unwrap();
                let mapped = Mapped { prot: Prot::ReadWrite, file: None, shared: false, copy: None };
                model.extend((at..at + len).map(|page| (page, mapped)));
            }
            Op::Munmap { mm, at, len } => {
                let Some(i) = self.pick(mm) else { return };
                let Process { user, model, .. } = &mut self.processes[i];
                user.munmap(cx, window(at, len));
                model.retain(|page, _| !(at..at + len).contains(page));
            }
            Op::Store { mm, cpu, page, word, value } => {
                let Some(i) = self.pick(mm) else { return };
                let addr = page_addr(page).get() + word as u64 * 8;
                let got = self.machine.cpus()[cpu].store(cx, &self.processes[i].user, addr, value);
                let expected = self.expected(i, page, true);
                assert_eq!(got, expected.map(drop).map_err(AccessError::Fault));
                let Ok(mut contents) = expected else { return };
                contents[word] = value;
                let Some(mapped) = self.processes[i].model.get_mut(&page) else { return };
                match mapped.file.filter(|_| mapped.shared) {
                    Some((file, index)) => drop(self.files[file].1.contents.insert(index, contents)),
                    None => mapped.copy = Some(contents),
                }
            }
            Op::Load { mm, cpu, page, word } => {
                let Some(i) = self.pick(mm) else { return };
                let addr = page_addr(page).get() + word as u64 * 8;
                let got = self.machine.cpus()[cpu].load(cx, &self.processes[i].user, addr);
                let expected = self.expected(i, page, false);
                assert_eq!(got, expected.map(|c| c[word]).map_err(AccessError::Fault));
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
                    self.processes.remove(i).user.mmput(cx);
                }
            }
            Op::Write { file, page, word, value } => {
                let (file, model) = &mut self.files[file];
                file.write(cx, page, word, value).unwrap();
                model.pages = model.pages.max(page + 1);
                model.contents.entry(page).or_default()[word] = value;
            }
            Op::Read { file, page, word } => {
                let (file, model) = &self.files[file];
                let contents = model.contents.get(&page).copied().unwrap_or_default();
                let expected =
                    if page < model.pages { Ok(contents[word]) } else { Err(FileError::PastEnd(page)) };
                assert_eq!(file.read(cx, page, word), expected);
            }
            Op::Truncate { file, pages } => {
                self.files[file].0.truncate(cx, pages).unwrap();
                let model = &mut self.files[file].1;
                model.pages = pages;
                model.contents.retain(|&index, _| index < pages);
                self.drop_copies(file, pages);
            }
            Op::Punch { file, at, len } => {
                let (file, model) = &mut self.files[file];
                file.punch_hole(cx, at..at + len);
                model.contents.retain(|index, _| !(at..at + len).contains(index));
            }
            Op::Fsync { file } => self.files[file].0.fsync(cx),
            Op::Reclaim { file, page } => drop(self.files[file].0.reclaim(cx, page, page % 2 == 0)),
            Op::Age { file, page } => drop(self.files[file].0.referenced(cx, page)),
            Op::Mprotect { mm, at, len, write } => {
                let Some(i) = self.pick(mm) else { return };
                let Process { user, model, .. } = &mut self.processes[i];
                if (at..at + len).all(|page| model.contains_key(&page)) {
                    let prot = if write { Prot::ReadWrite } else { Prot::Read };
                    user.mprotect(cx, window(at, len), prot).unwrap();
                    (at..at + len).for_each(|page| model.get_mut(&page).unwrap().prot = prot);
                }
            }
            Op::Dontneed { mm, at, len } => {
                let Some(i) = self.pick(mm) else { return };
                let Process { user, model, .. } = &mut self.processes[i];
                let mapped = (at..at + len).all(|page| model.contains_key(&page));
                assert_eq!(user.madvise_dontneed(cx, window(at, len)).is_ok(), mapped);
                model.range_mut(at..at + len).for_each(|(_, mapped)| mapped.copy = None);
            }
            Op::SwapOut { mm, page } => {
                let Some(i) = self.pick(mm) else { return };
                let pte = self.processes[i].user.peek_pte(page_addr(page));
                if pte.is_mapped() && !self.machine.frames().is_file(pte.pfn()) {
                    self.machine.reclaim_page(cx, self.machine.frames().id(pte.pfn()), true);
                }
            }
            Op::Probe { file, page, word } => self.probe(cx, file, page, word),
            Op::Unprobe { probe } if !self.probes.is_empty() => {
                let probe = self.probes.swap_remove(probe % self.probes.len());
                self.unprobe(cx, probe);
            }
            Op::Unprobe { .. } => {}
            Op::Pin { mm, page, write, get, longterm, fast } => {
                let Some(i) = self.pick(mm) else { return };
                let hold = if get { FollRef::Get } else { FollRef::Pin };
                let foll = Foll { write, longterm, hold, force: false };
                self.pin(cx, i, page, foll, fast);
            }
            Op::Unpin { pin } if !self.pins.is_empty() => drop(self.pins.swap_remove(pin % self.pins.len())),
            Op::Unpin { .. } => {}
        }
    }

    fn probe(&mut self, cx: &mut MaySleep<'_>, file: usize, page: u64, word: usize) {
        let (of, model) = &self.files[file];
        let contents = model.contents.get(&page).copied().unwrap_or_default();
        let expected = if of.kind() == FileKind::Xip {
            Err(UprobeError::NoPageCache)
        } else if page >= model.pages {
            Err(UprobeError::File(FileError::PastEnd(page)))
        } else if self.probes.iter().any(|&(f, p, w, _)| (f, p, w) == (file, page, word)) {
            Err(UprobeError::Exists)
        } else {
            Ok(())
        };
        assert_eq!(of.uprobe_register(cx, page, word), expected);
        if expected.is_ok() {
            self.probes.push((file, page, word, contents[word]));
            self.mapping(file, page).into_iter().for_each(|(i, at)| self.probed(i, at, word));
        }
    }

    /// Where the private mappings of that page of the file are: process and page.
    fn mapping(&self, file: usize, index: u64) -> Vec<(usize, u64)> {
        let all = self.processes.iter().enumerate();
        let pages =
            all.flat_map(|(i, process)| process.model.iter().map(move |(&at, mapped)| (i, at, *mapped)));
        let found = pages.filter(|(_, _, mapped)| mapped.file == Some((file, index)) && !mapped.shared);
        found.map(|(i, at, _)| (i, at)).collect()
    }

    /// A mapping that cannot write has a copy with a breakpoint.
    fn probed(&mut self, i: usize, at: u64, word: usize) {
        let mapped = self.processes[i].model[&at];
        let Ok(mut contents) = self.expected(i, at, false) else { return };
        if !mapped.shared && !mapped.prot.writable() {
            contents[word] = BREAKPOINT;
            self.processes[i].model.get_mut(&at).unwrap().copy = Some(contents);
        }
    }

    fn unprobe(&mut self, cx: &mut MaySleep<'_>, (file, index, word, original): (usize, u64, usize, u64)) {
        self.files[file].0.uprobe_unregister(cx, index, word).unwrap();
        assert_eq!(self.files[file].0.uprobe_unregister(cx, index, word), Err(UprobeError::Missing));
        for (i, at) in self.mapping(file, index) {
            let of_file = self.files[file].1.contents.get(&index).copied().unwrap_or_default();
            let gone = self.processes[i].user.peek_pte(page_addr(at)).is_none();
            let Some(copy) = &mut self.processes[i].model.get_mut(&at).unwrap().copy else { continue };
            if copy[word] != BREAKPOINT {
                continue;
            }
            copy[word] = original;
            // What is as in the file may go (5.4 and later).
            if gone {
                assert_eq!(*copy, of_file);
                self.processes[i].model.get_mut(&at).unwrap().copy = None;
            }
        }
    }

    /// A truncated file takes private copies past its end along.
    fn drop_copies(&mut self, file: usize, pages: u64) {
        for mapped in self.processes.iter_mut().flat_map(|p| p.model.values_mut()) {
            if mapped.file.is_some_and(|(of, index)| of == file && index >= pages) {
                mapped.copy = None;
            }
        }
    }

    fn pin(&mut self, cx: &mut MaySleep<'_>, i: usize, page: u64, foll: Foll, fast: bool) {
        let expected = self.expected(i, page, foll.write);
        let Process { user, model, .. } = &mut self.processes[i];
        let got = if fast {
            user.get_user_pages_fast(cx, &self.machine.cpus()[1], window(page, 1), foll)
        } else {
            user.get_user_pages(cx, window(page, 1), foll)
        };
        let pages = match (got, expected) {
            (Ok(pages), Ok(contents)) => {
                let frame = pages.frames().next().unwrap();
                for (word, value) in contents.into_iter().enumerate() {
                    assert_eq!(self.machine.frames().read(frame, word), Ok(value), "what the CPU would read");
                }
                pages
            }
            (Err(FaultError::NotPinnable(_)), _) => {
                let mapped = model[&page];
                let kind = mapped.file.map(|(file, _)| self.files[file].0.kind());
                let tracked = mapped.shared && foll.longterm && foll.write && kind == Some(FileKind::Regular);
                assert!(tracked || kind == Some(FileKind::Xip));
                return;
            }
            (got, expected) => {
                return assert_eq!(got.err(), expected.err());
            }
        };
        if let Some(mapped) = model.get_mut(&page).filter(|mapped| !mapped.shared) {
            // A write pin and a longterm read pin have broken copy-on-write.
            let unshares = self.machine.profile().read_pin_unshares;
            let broken = foll.write || (foll.longterm && foll.hold == FollRef::Pin && unshares);
            mapped.copy = mapped.copy.or(expected.ok().filter(|_| broken));
        }
        self.pins.push(pages);
    }

    fn pick(&self, mm: usize) -> Option<usize> {
        (!self.processes.is_empty()).then(|| mm % self.processes.len())
    }

    fn check(&self, cx: &mut MaySleep<'_>) {
        let frames = self.machine.frames();
        let mut mapped: BTreeMap<_, u32> = BTreeMap::new();
        for (i, Process { user, model, recorder }) in self.processes.iter().enumerate() {
            recorder.check_quiet(cx);
            for page in 0..PAGES {
                let pte = user.peek_pte(page_addr(page));
                if !pte.is_present() {
                    continue;
                }
                let contents = self.expected(i, page, false).expect("a present page is no fault");
                for (word, value) in contents.into_iter().enumerate() {
                    assert_eq!(frames.read(frames.id(pte.pfn()), word), Ok(value), "page {page} of {i}");
                }
                if !pte.is_special() {
                    *mapped.entry(pte.pfn()).or_default() += 1;
                    self.check_writable(model[&page], pte);
                }
            }
        }
        let mut references = mapped.clone();
        for (file, model) in &self.files {
            for (index, pfn) in file.cached(cx) {
                *references.entry(pfn).or_default() += 1;
                assert!(index < model.pages, "cached past the end");
                assert!(frames.is_file(pfn));
                if file.kind() == FileKind::Regular && !frames.dirty(pfn) {
                    let disk = file.on_disk(cx, index).unwrap_or_else(|| vec![0; WORDS]);
                    let contents = model.contents.get(&index).copied().unwrap_or_default();
                    assert_eq!(disk, contents, "page {index} is clean and not on the disk");
                }
            }
        }
        for pages in &self.pins {
            let profile = self.machine.profile();
            let pin = pages.foll().hold == FollRef::Pin && profile.foll_pin;
            let each = if pin { GUP_PIN_COUNTING_BIAS } else { 1 };
            for frame in pages.frames() {
                assert!(frames.is_live(frame), "a reference keeps the frame");
                let uncounted = frame.pfn == ZERO_PAGE && pin && profile.zero_page_unpinned;
                *references.entry(frame.pfn).or_default() += if uncounted { 0 } else { each };
            }
        }
        *references.entry(ZERO_PAGE).or_default() += 1;
        let sparse = self.files.iter().filter_map(|(file, _)| file.xip_sparse_page(cx)).collect::<Vec<_>>();
        for pfn in self.machine.swap_cache(cx).into_iter().map(|frame| frame.pfn).chain(sparse) {
            *references.entry(pfn).or_default() += 1;
        }
        for (&pfn, &count) in &references {
            assert_eq!(frames.refcount(pfn), count, "references of {pfn:?}");
            assert_eq!(frames.mapcount(pfn), mapped.get(&pfn).copied().unwrap_or(0), "mappers of {pfn:?}");
        }
        assert_eq!(frames.total_frames() + 1 - frames.free_frames(), references.len(), "a frame leaked");
    }

    fn check_writable(&self, mapped: Mapped, pte: softmm::Pte) {
        let frames = self.machine.frames();
        if !pte.is_writable() {
            return;
        }
        assert!(mapped.prot.writable());
        match mapped.file.filter(|_| mapped.shared) {
            Some((file, _)) if self.files[file].0.kind() == FileKind::Regular => {
                assert!(frames.dirty(pte.pfn()), "writable and clean: writeback would miss the write")
            }
            Some(_) => assert!(frames.is_file(pte.pfn())),
            None => assert!(!frames.is_file(pte.pfn()), "a private mapping writes the file's page"),
        }
    }

    fn finish(mut self, cx: &mut MaySleep<'_>) {
        while let Some(process) = self.processes.pop() {
            process.user.mmput(cx);
        }
        self.pins.clear();
        for frame in self.machine.swap_cache(cx) {
            assert_eq!(self.machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed);
        }
        assert_eq!(self.machine.swap().in_use(cx), 0);
        let frames = self.machine.frames();
        self.files.clear();
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
    fn files_are_the_model(ops in ops(), profile in prop::sample::select(&KernelProfile::ALL[..])) {
        MaySleep::enter(|cx| {
            let mut world = World::new(cx, profile);
            for op in &ops {
                world.apply(cx, op);
                world.check(cx);
            }
            world.finish(cx);
        });
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{reports:#?}");
    }
}
