// SPDX-License-Identifier: MIT OR Apache-2.0
//! What must hold when two threads meet in one path: in a scripted order where a callback gives a place to meet, else
//! on real threads, often.

mod common;

use common::{range, register};
use interleave::{AtomicU64, LockClass, MaySleep, Ordering, Sleep, SpinLock, scope, spin_hint, yield_now};
use mmu_notifier::{Event, Invalidation, MmuNotifier, Ops, WouldBlock};
use softmm::{Config, Foll, Machine, Mm, Placement, Prot};
use std::sync::{Arc, Weak};

static TEST: LockClass = LockClass::new("test state");

fn quiet(machine: &Machine) {
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
    assert_eq!(machine.tables_in_use(), 0);
    let reports = interleave::lockdep::take_reports();
    assert!(reports.is_empty(), "{reports:#?}");
}

/// At the first S of a copy-on-write, lets another thread finish the same fault.
struct OvertakeAtStart {
    mm: Weak<Mm>,
    armed: SpinLock<bool>,
}

impl MmuNotifier for OvertakeAtStart {
    fn ops(&self) -> Ops {
        Ops::START
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let (Sleep::May(cx), Some(mm)) = (cx, self.mm.upgrade()) else { return Ok(()) };
        if inv.event == Some(Event::Clear) && std::mem::replace(&mut *self.armed.lock(cx), false) {
            let other = interleave::spawn("overtaker", move |cx| {
                mm.machine().cpus()[1].store(cx, &mm, (16 << 12) + 8, 9).unwrap();
            });
            other.join(cx).expect("the other store works");
        }
        Ok(())
    }
}

#[test]
fn the_loser_of_a_copy_on_write_keeps_the_winners_page() {
    MaySleep::enter(|cx| {
        let machine = Machine::new(Config::default());
        let user = machine.new_mm().unwrap();
        user.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
        let cpu = &machine.cpus()[0];
        cpu.store(cx, &user, 16 << 12, 1).unwrap();
        let child = user.fork(cx).unwrap();
        let armed = SpinLock::new(&TEST, true);
        register(cx, &user, Arc::new(OvertakeAtStart { mm: Arc::downgrade(&user), armed }));
        cpu.store(cx, &user, 16 << 12, 2).unwrap();
        assert_eq!(cpu.load(cx, &user, 16 << 12), Ok(2));
        assert_eq!(cpu.load(cx, &user, (16 << 12) + 8), Ok(9), "the overtaker's store is not lost");
        child.mmput(cx);
        user.mmput(cx);
        quiet(&machine);
    });
}

/// Two threads wait for each other for the `nth` time (from 1).
fn meet(arrivals: &AtomicU64, nth: u64) {
    arrivals.fetch_add(1, Ordering::SeqCst);
    let start = interleave::time::now();
    let mut spins = 0;
    while arrivals.load(Ordering::SeqCst) < 2 * nth {
        assert!(start.elapsed().as_secs() < 300, "the other thread is gone");
        spins += 1;
        // To yield at once would let the other thread get away; one that is not here by now wants this CPU.
        if spins < 10_000 { spin_hint() } else { yield_now() }
    }
}

#[test]
fn two_first_touches_of_a_page_are_one_page() {
    const ROUNDS: u64 = 2_000;
    MaySleep::enter(|cx| {
        // Large pages to clear make the gap between looking and mapping wide.
        let machine = Machine::new(Config { frames: 8, words_per_page: 512, ..Config::default() });
        let user = machine.new_mm().unwrap();
        let (mm, machine): (&Mm, &Machine) = (&user, &machine);
        let arrivals = &AtomicU64::new(0);
        mm.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
        scope(cx, |s, _| {
            for who in 0..2 {
                s.spawn("toucher", move |cx| {
                    let cpu = &machine.cpus()[who as usize];
                    for round in 0..ROUNDS {
                        meet(arrivals, 3 * round + 1);
                        cpu.store(cx, mm, (16 << 12) + who * 8, round).unwrap();
                        meet(arrivals, 3 * round + 2);
                        for word in 0..2 {
                            assert_eq!(cpu.load(cx, mm, (16 << 12) + word * 8), Ok(round));
                        }
                        meet(arrivals, 3 * round + 3);
                        if who == round % 2 {
                            mm.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
                        }
                    }
                });
            }
        });
        user.mmput(cx);
        quiet(machine);
    });
}

#[test]
fn a_fast_pin_beside_fork_stays_with_the_parent() {
    const ROUNDS: u64 = 4_000;
    MaySleep::enter(|cx| {
        let machine = Machine::new(Config::default());
        let user = machine.new_mm().unwrap();
        let (mm, machine): (&Mm, &Machine) = (&user, &machine);
        mm.mmap(cx, Placement::Fixed(range(16, 4)), Prot::ReadWrite).unwrap();
        scope(cx, |s, _| {
            s.spawn("forker", |cx| {
                for _ in 0..ROUNDS {
                    mm.fork(cx).unwrap().mmput(cx);
                }
            });
            s.spawn("pinner", |cx| {
                let cpu = &machine.cpus()[0];
                for round in 0..ROUNDS * 2 {
                    let foll = if round % 2 == 0 { Foll::PIN.write() } else { Foll::PIN };
                    cpu.store(cx, mm, 16 << 12, round).unwrap();
                    let pin = mm.get_user_pages_fast(cx, cpu, range(16, 1), foll).unwrap();
                    let frame = pin.frames().next().unwrap();
                    cpu.store(cx, mm, 16 << 12, round + 1).unwrap();
                    assert_eq!(
                        machine.frames().read(frame, 0),
                        Ok(round + 1),
                        "{foll:?}: the pin was left behind"
                    );
                }
            });
        });
        user.mmput(cx);
        quiet(machine);
    });
}
