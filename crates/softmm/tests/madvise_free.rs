// SPDX-License-Identifier: MIT OR Apache-2.0
//! MADV_FREE: what may be discarded, and what keeps a page.

mod common;

use common::range;
use interleave::MaySleep;
use mmu_notifier::{PAGE_SHIFT, PageAddr};
use softmm::{
    ChangeError, Config, FileKind, Foll, KernelProfile, Machine, MapKind, MmUser, Placement, Prot, Reclaim,
};
use std::sync::Arc;

const PAGE: u64 = 16;

struct Setup {
    machine: Arc<Machine>,
    user: MmUser,
}

impl Setup {
    /// One page that was written and given up.
    fn freed(cx: &mut MaySleep<'_>, profile: KernelProfile) -> Setup {
        let machine = Machine::new(Config { profile, ..Config::default() });
        let user = machine.new_mm().unwrap();
        user.mmap(cx, Placement::Fixed(range(PAGE, 2)), Prot::ReadWrite).unwrap();
        let setup = Setup { machine, user };
        setup.store(cx, 1);
        setup.user.madvise_free(cx, range(PAGE, 1)).unwrap();
        setup
    }

    fn store(&self, cx: &mut MaySleep<'_>, value: u64) {
        self.machine.cpus()[0].store(cx, &self.user, PAGE << PAGE_SHIFT, value).unwrap();
    }

    fn load(&self, cx: &mut MaySleep<'_>) -> u64 {
        self.machine.cpus()[0].load(cx, &self.user, PAGE << PAGE_SHIFT).unwrap()
    }

    fn reclaim(&self, cx: &mut MaySleep<'_>) -> Reclaim {
        let pte = self.user.peek_pte(PageAddr::new(PAGE << PAGE_SHIFT).unwrap());
        self.machine.reclaim_page(cx, self.machine.frames().id(pte.pfn()), true)
    }

    /// The page is like any other again: it goes to swap, and what is in it comes back.
    fn is_kept(self, cx: &mut MaySleep<'_>, value: u64) {
        assert_eq!(self.reclaim(cx), Reclaim::Reclaimed);
        assert_eq!((self.machine.swap().in_use(cx), self.load(cx)), (1, value));
        self.finish(cx);
    }

    fn finish(self, cx: &mut MaySleep<'_>) {
        self.user.mmput(cx);
        for frame in self.machine.swap_cache(cx) {
            assert_eq!(self.machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed);
        }
        assert_eq!(self.machine.frames().free_frames(), self.machine.frames().total_frames());
        assert_eq!(self.machine.swap().in_use(cx), 0);
    }
}

/// In every kernel that has it.
fn each(check: impl Fn(&mut MaySleep<'_>, KernelProfile)) {
    MaySleep::enter(|cx| {
        let with = KernelProfile::ALL.into_iter().filter(|profile| profile.madvise_free);
        with.for_each(|profile| check(cx, profile));
    });
}

#[test]
fn what_nobody_wrote_again_is_discarded_and_takes_no_swap() {
    each(|cx, profile| {
        let s = Setup::freed(cx, profile);
        assert_eq!(s.load(cx), 1, "until the memory is needed");
        assert_eq!(s.reclaim(cx), Reclaim::Reclaimed);
        assert_eq!((s.machine.swap().in_use(cx), s.load(cx)), (0, 0));
        s.finish(cx);
    });
}

#[test]
fn a_store_through_a_cached_translation_keeps_the_page() {
    each(|cx, profile| {
        let s = Setup::freed(cx, profile);
        s.store(cx, 2);
        assert_eq!(s.reclaim(cx), Reclaim::Mapped, "{}", profile.name);
        s.is_kept(cx, 2);
    });
}

#[test]
fn a_pin_keeps_the_page_and_a_dirty_one_its_contents() {
    each(|cx, profile| {
        for dirties in [false, true] {
            let s = Setup::freed(cx, profile);
            let pin = s.user.get_user_pages(cx, range(PAGE, 1), Foll::PIN).unwrap();
            assert_eq!(s.reclaim(cx), Reclaim::Mapped);
            s.machine.frames().write(pin.frames().next().unwrap(), 0, 3).unwrap();
            if dirties {
                pin.set_dirty_lock(cx);
            }
            drop(pin);
            if dirties {
                assert_eq!(s.reclaim(cx), Reclaim::Mapped);
                s.is_kept(cx, 3);
            } else {
                assert_eq!(s.reclaim(cx), Reclaim::Reclaimed);
                assert_eq!(s.load(cx), 0, "nobody was told of the device's write");
                s.finish(cx);
            }
        }
    });
}

#[test]
fn a_swapped_page_is_given_back_and_a_shared_dirty_one_passed_over() {
    each(|cx, profile| {
        let s = Setup::freed(cx, profile);
        s.store(cx, 2);
        assert_eq!(s.reclaim(cx), Reclaim::Mapped);
        assert_eq!(s.reclaim(cx), Reclaim::Reclaimed);
        let child = s.user.fork(cx).unwrap();
        // Both have the page now, in the swap cache.
        assert_eq!((s.load(cx), s.machine.cpus()[1].load(cx, &child, PAGE << PAGE_SHIFT)), (2, Ok(2)));
        s.user.madvise_free(cx, range(PAGE, 1)).unwrap();
        child.mmput(cx);
        assert_eq!(s.reclaim(cx), Reclaim::Reclaimed);
        assert_eq!(s.machine.swap().in_use(cx), 1);
        s.user.madvise_free(cx, range(PAGE, 1)).unwrap();
        assert_eq!((s.machine.swap().in_use(cx), s.load(cx)), (0, 0));
        s.finish(cx);
    });
}

#[test]
fn a_file_and_a_hole_are_refused() {
    each(|cx, profile| {
        let s = Setup::freed(cx, profile);
        let page = |number: u64| PageAddr::new(number << PAGE_SHIFT).unwrap();
        assert_eq!(s.user.madvise_free(cx, range(PAGE + 1, 2)), Err(ChangeError::Hole(page(PAGE + 2))));
        let file = s.machine.new_file(FileKind::Regular, 1);
        let there = Placement::Fixed(range(PAGE + 1, 1));
        s.user.mmap_file(cx, there, Prot::ReadWrite, &file, 0, MapKind::Private).unwrap();
        let refused = s.user.madvise_free(cx, range(PAGE, 2));
        assert_eq!(refused, Err(ChangeError::NotAnonymous(page(PAGE + 1))));
        s.finish(cx);
    });
}

#[test]
fn a_kernel_without_it_refuses() {
    MaySleep::enter(|cx| {
        let machine = Machine::new(Config { profile: KernelProfile::V3_16, ..Config::default() });
        let user = machine.new_mm().unwrap();
        user.mmap(cx, Placement::Fixed(range(PAGE, 1)), Prot::ReadWrite).unwrap();
        assert!(matches!(user.madvise_free(cx, range(PAGE, 1)), Err(ChangeError::NotAnonymous(_))));
        user.mmput(cx);
    });
}
