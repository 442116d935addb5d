// SPDX-License-Identifier: MIT OR Apache-2.0
//! mremap: what a moved page can still do, in every profile.

mod common;

use common::range;
use interleave::MaySleep;
use mmu_notifier::PageAddr;
use softmm::{Config, KernelProfile, Machine, MremapError, Placement, Prot, Reclaim};

fn page(number: u64) -> PageAddr {
    PageAddr::new(number << 12).unwrap()
}

#[test]
fn a_moved_page_is_found_by_reclaim_in_parent_and_child() {
    for profile in KernelProfile::ALL {
        MaySleep::enter(|cx| {
            let machine = Machine::new(Config { profile, ..Config::default() });
            let (user, cpu) = (machine.new_mm().unwrap(), &machine.cpus()[0]);
            user.mmap(cx, Placement::Fixed(range(16, 4)), Prot::ReadWrite).unwrap();
            cpu.store(cx, &user, 16 << 12, 7).unwrap();
            user.mremap(cx, range(16, 1), range(40, 1)).unwrap();
            let child = user.fork(cx).unwrap();
            // The child moves its own on, the parent back to where another page has been made meanwhile.
            child.mremap(cx, range(40, 1), range(60, 1)).unwrap();
            user.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
            cpu.store(cx, &user, 16 << 12, 8).unwrap();
            let frame = machine.frames().id(user.peek_pte(page(40)).pfn());
            assert_eq!(child.peek_pte(page(60)).pfn(), frame.pfn, "{}", profile.name);
            assert_eq!(machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed, "{}", profile.name);
            assert!(user.peek_pte(page(40)).is_swap() && child.peek_pte(page(60)).is_swap());
            assert_eq!(cpu.load(cx, &child, 60 << 12).unwrap(), 7);
            assert_eq!(cpu.load(cx, &user, 40 << 12).unwrap(), 7);
            assert_eq!(cpu.load(cx, &user, 16 << 12).unwrap(), 8);
            child.mmput(cx);
            user.mmput(cx);
            for frame in machine.swap_cache(cx) {
                machine.reclaim_page(cx, frame, true);
            }
            assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
            assert_eq!((machine.tables_in_use(), machine.swap().in_use(cx)), (0, 0));
        });
    }
}

#[test]
fn cpus_do_not_use_the_old_address_and_bad_ranges_change_nothing() {
    for profile in KernelProfile::ALL {
        MaySleep::enter(|cx| {
            let machine = Machine::new(Config { profile, ..Config::default() });
            let (user, cpu) = (machine.new_mm().unwrap(), &machine.cpus()[0]);
            user.mmap(cx, Placement::Fixed(range(16, 4)), Prot::ReadWrite).unwrap();
            cpu.store(cx, &user, 17 << 12, 7).unwrap();
            for (from, to) in [(range(16, 2), range(17, 2)), (range(16, 2), range(40, 1))] {
                assert_eq!(user.mremap(cx, from, to), Err(MremapError::Ranges));
            }
            for from in [range(18, 4), range(30, 1)] {
                assert_eq!(user.mremap(cx, from, range(40, from.pages())), Err(MremapError::NotOneVma));
            }
            assert_eq!(user.vma_ranges(cx), [range(16, 4)]);
            // Another leaf table.
            user.mremap(cx, range(16, 4), range(5000, 4)).unwrap();
            assert!(cpu.load(cx, &user, 17 << 12).is_err(), "{}", profile.name);
            assert_eq!(cpu.load(cx, &user, 5001 << 12).unwrap(), 7);
            user.mmput(cx);
            assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
        });
    }
}
