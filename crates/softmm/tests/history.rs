// SPDX-License-Identifier: MIT OR Apache-2.0
//! What became of a device's page in each kernel: the known ways to lose it, and since when they are closed.

mod common;

use common::{range, register};
use interleave::{Context, LockClass, MaySleep, PageContext, Sleep, SpinLock};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, PageAddr, WouldBlock};
use softmm::{
    Config, FileKind, Foll, FrameId, KernelProfile, Machine, MapKind, Mm, MmUser, Placement, Prot, Reap,
    Reclaim, UserPages,
};
use std::sync::{Arc, Weak};

static TEST: LockClass = LockClass::new("test state");

fn page() -> PageAddr {
    PageAddr::new(16 << 12).unwrap()
}

/// A process with 1 in the page, and what a device does to it.
struct Scene {
    machine: Arc<Machine>,
    user: MmUser,
}

impl Scene {
    fn new(cx: &mut MaySleep<'_>, profile: KernelProfile) -> Scene {
        let machine = Machine::new(Config { profile, ..Config::default() });
        let user = machine.new_mm().unwrap();
        user.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
        let scene = Scene { machine, user };
        scene.store(cx, 1);
        scene
    }

    fn store(&self, cx: &mut MaySleep<'_>, value: u64) {
        self.machine.cpus()[0].store(cx, &self.user, 16 << 12, value).unwrap();
    }

    fn load(&self, cx: &mut MaySleep<'_>, mm: &Mm) -> u64 {
        self.machine.cpus()[0].load(cx, mm, 16 << 12).unwrap()
    }

    fn pin(&self, cx: &mut MaySleep<'_>, mm: &Mm, foll: Foll) -> UserPages {
        mm.get_user_pages(cx, range(16, 1), foll).unwrap()
    }

    fn mapped(&self) -> FrameId {
        self.machine.frames().id(self.user.peek_pte(page()).pfn())
    }

    fn device_reads(&self, pages: &UserPages) -> u64 {
        self.machine.frames().read(pages.frames().next().unwrap(), 0).unwrap()
    }

    fn device_writes(&self, pages: &UserPages, value: u64) {
        self.machine.frames().write(pages.frames().next().unwrap(), 0, value).unwrap();
    }

    fn finish(self, cx: &mut MaySleep<'_>) {
        self.user.mmput(cx);
        for frame in self.machine.swap_cache(cx) {
            assert_eq!(self.machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed);
        }
        assert_eq!(self.machine.frames().free_frames(), self.machine.frames().total_frames());
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{reports:#?}");
    }
}

/// Runs `check` under every profile; it says whether the device and the CPU stayed together. Gives the profiles where not.
fn broken_in(check: impl Fn(&mut MaySleep<'_>, &Scene) -> bool) -> Vec<&'static str> {
    let mut broken = Vec::new();
    for profile in KernelProfile::ALL {
        MaySleep::enter(|cx| {
            let scene = Scene::new(cx, profile);
            if !check(cx, &scene) {
                broken.push(profile.name);
            }
            scene.finish(cx);
        });
    }
    broken
}

const UNTIL_4_14: [&str; 7] =
    ["v3_16", "unwrapped_a", "unwrapped_b", "unwrapped_c", "v3_19", "v4_12", "v4_14"];

#[test]
fn a_write_pin_and_fork() {
    // The parent writes first and leaves the device with what is now the child's page, until fork copies for the child.
    let broken = broken_in(|cx, s| {
        let pages = s.pin(cx, &s.user, Foll::PIN.write());
        let child = s.user.fork(cx).unwrap();
        s.store(cx, 2);
        s.device_writes(&pages, 3);
        let (seen, of_child) = (s.load(cx, &s.user), s.load(cx, &child));
        child.mmput(cx);
        (seen, of_child) == (3, 1)
    });
    assert_eq!(broken, UNTIL_4_14);
}

#[test]
fn a_write_pin_and_swap() {
    // The page goes to swap and comes back read-only; a kernel that counts references then copies it on the next store.
    let broken = broken_in(|cx, s| {
        let pages = s.pin(cx, &s.user, Foll::PIN.write());
        assert_eq!(s.machine.reclaim_page(cx, s.mapped(), true), Reclaim::Held);
        assert_eq!(s.load(cx, &s.user), 1);
        s.store(cx, 2);
        s.device_writes(&pages, 3);
        s.load(cx, &s.user) == 3
    });
    assert_eq!(broken, ["v5_10"]);
}

#[test]
fn a_get_and_swap() {
    // Nobody spares a FOLL_GET, and the swap cache keeps its page. A store that faults the page in itself may have it: the entry
    // is the only one (until 5.18), or says that the page was exclusive.
    let broken = broken_in(|cx, s| {
        let pages = s.pin(cx, &s.user, Foll::GET.write());
        assert_eq!(s.machine.reclaim_page(cx, s.mapped(), true), Reclaim::Held);
        s.store(cx, 2);
        s.device_writes(&pages, 3);
        s.load(cx, &s.user) == 3
    });
    assert!(broken.is_empty(), "{broken:?}");
}

#[test]
fn a_read_pin_and_copy_on_write() {
    // The pin shows the page that was shared; un-sharing gives it one that the parent keeps.
    let broken = broken_in(|cx, s| {
        let child = s.user.fork(cx).unwrap();
        let pages = s.pin(cx, &s.user, Foll::PIN);
        s.store(cx, 2);
        let seen = s.device_reads(&pages);
        child.mmput(cx);
        seen == 2
    });
    assert_eq!(broken, [&UNTIL_4_14[..], &["v5_10"]].concat());
}

#[test]
fn a_childs_reference_does_not_read_the_parents_secret() {
    // CVE-2020-29374: the child holds the shared page and unmaps it; the parent is the only mapper left and writes in
    // place, if references do not count.
    let leaks = broken_in(|cx, s| {
        let child = s.user.fork(cx).unwrap();
        let pages = s.pin(cx, &child, Foll::GET);
        child.munmap(cx, range(16, 1));
        s.store(cx, 2);
        let seen = s.device_reads(&pages);
        child.mmput(cx);
        seen == 1
    });
    assert_eq!(leaks, UNTIL_4_14);
}

/// Holds pages and tries to mark them dirty at each P and S.
struct DirtyAtInvalidate {
    pages: SpinLock<Option<UserPages>>,
    lost: SpinLock<usize>,
}

impl MmuNotifier for DirtyAtInvalidate {
    fn ops(&self) -> Ops {
        Ops::START | Ops::PAGE
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
        self.mark(&mut cx);
        Ok(())
    }

    fn invalidate_page(&self, mut cx: PageContext<'_, '_>, _: PageAddr) {
        self.mark(&mut cx);
    }
}

impl DirtyAtInvalidate {
    fn mark<C: Context>(&self, cx: &mut C) {
        let pages = self.pages.lock(cx).take();
        let lost = pages.map_or(0, |pages| pages.try_set_dirty(cx));
        *self.lost.lock(cx) += lost;
    }
}

#[test]
fn a_driver_that_tries_for_the_page_lock_in_reclaim_loses_the_dirty_bit() {
    for profile in KernelProfile::ALL {
        MaySleep::enter(|cx| {
            let s = Scene::new(cx, profile);
            let pages = s.pin(cx, &s.user, Foll::GET.write());
            pages.set_dirty_lock(cx);
            let (pages, lost) = (SpinLock::new(&TEST, Some(pages)), SpinLock::new(&TEST, 0));
            let driver = Arc::new(DirtyAtInvalidate { pages, lost });
            register(cx, &s.user, driver.clone());
            s.machine.reclaim_page(cx, s.mapped(), true);
            assert_eq!(*driver.lost.lock(cx), 1, "{}: reclaim holds the page lock", profile.name);
            drop(driver);
            s.finish(cx);
        });
    }
}

/// At the E of the first copy-on-write, another thread throws the copy away.
struct DontneedAtEnd {
    mm: Weak<Mm>,
    armed: SpinLock<bool>,
}

impl MmuNotifier for DontneedAtEnd {
    fn ops(&self) -> Ops {
        Ops::END
    }

    fn invalidate_range_end(&self, cx: Sleep<'_, '_>, _: &Invalidation) {
        let (Sleep::May(cx), Some(mm)) = (cx, self.mm.upgrade()) else { return };
        if std::mem::replace(&mut *self.armed.lock(cx), false) {
            let other =
                interleave::spawn("dontneed", move |cx| mm.madvise_dontneed(cx, range(32, 1)).unwrap());
            other.join(cx).expect("it is mapped");
        }
    }
}

#[test]
fn dirty_cow() {
    // CVE-2016-5195: a forced write to a read-only private mapping of a file ends in the page cache.
    let broken = broken_in(|cx, s| {
        let file = s.machine.new_file(FileKind::Regular, 1);
        file.write(cx, 0, 0, 7).unwrap();
        let there = Placement::Fixed(range(32, 1));
        s.user.mmap_file(cx, there, Prot::Read, &file, 0, MapKind::Private).unwrap();
        assert_eq!(s.machine.cpus()[0].load(cx, &s.user, 32 << 12), Ok(7));
        let armed = SpinLock::new(&TEST, true);
        register(cx, &s.user, Arc::new(DontneedAtEnd { mm: Arc::downgrade(&s.user), armed }));
        let pages = s.user.get_user_pages(cx, range(32, 1), Foll::GET.write().force()).unwrap();
        s.device_writes(&pages, 8);
        file.read(cx, 0, 0) == Ok(7)
    });
    // Without the pair around change_pte there is no E to do it at; the window is the same.
    assert_eq!(broken, ["v3_16", "v3_19"]);
}

#[test]
fn the_oom_reaper_and_notifiers() {
    struct Deaf;
    impl MmuNotifier for Deaf {
        fn ops(&self) -> Ops {
            Ops::NONE
        }
    }
    for profile in KernelProfile::ALL {
        MaySleep::enter(|cx| {
            let s = Scene::new(cx, profile);
            let late = matches!(profile.name, "v5_10" | "v6_18");
            let none = !late && !matches!(profile.name, "v4_12" | "v4_14");
            register(cx, &s.user, Arc::new(Deaf));
            let expected = if none {
                Reap::None
            } else if profile.name == "v4_14" {
                Reap::Spared
            } else {
                Reap::Left(vec![])
            };
            assert_eq!(s.user.oom_reap(cx), expected, "{}", profile.name);
            assert_eq!(s.user.peek_pte(page()).is_none(), matches!(expected, Reap::Left(_)));
            s.finish(cx);
        });
    }
}

/// mprotect's range begins at the first piece of page table and ends with the slice.
#[test]
fn mprotect_notifies_from_the_first_page_table_to_the_end_of_the_slice() {
    const GIB: u64 = 1 << 18;
    const PMD: u64 = 1 << 9;
    let sections = |profile: KernelProfile| {
        MaySleep::enter(|cx| {
            let machine = Machine::new(Config { profile, ..Config::default() });
            let user = machine.new_mm().unwrap();
            let all = range(GIB, 3 * GIB);
            let recorder = common::Recorder::new(&user, range(16, 1));
            register(cx, &user, recorder.clone());
            user.mmap(cx, Placement::Fixed(all), Prot::ReadWrite).unwrap();
            for at in [GIB + 5 * PMD + 3, 3 * GIB + 7] {
                machine.cpus()[0].store(cx, &user, at << 12, 1).unwrap();
            }
            user.mprotect(cx, range(GIB, 3 * GIB), Prot::Read).unwrap();
            let heard = recorder.take(cx);
            user.mmput(cx);
            let starts = heard.into_iter().filter_map(|heard| match heard {
                common::Heard::S(_, range) => Some((range.start() >> 12, range.end() >> 12)),
                _ => None,
            });
            starts.collect::<Vec<_>>()
        })
    };
    let expected = [(GIB + 5 * PMD, 2 * GIB), (3 * GIB, 4 * GIB)];
    for profile in KernelProfile::ALL {
        let heard = sections(profile);
        if profile.name == "v6_18" {
            assert_eq!(heard, [(GIB, 4 * GIB)]);
        } else {
            assert_eq!(heard, expected, "{}", profile.name);
        }
    }
}
