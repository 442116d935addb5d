// SPDX-License-Identifier: MIT OR Apache-2.0
//! One consumer, two primary MMUs: the same registration cache, word for word, over softmm and over the running kernel.
//! Memory is unmapped and mapped again underneath; whoever asks the cache afterwards is never shown the old page.

use std::sync::Arc;
use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::disturb::{After, Arena, Change, catalogue};
use hostmm::kvm::{self, KvmSource};
use hostmm::primary::{HostMm, HostPin};
use hostmm::testing;
use interleave::{AtomicBool, LockClass, MaySleep, Mutex, Ordering, Sleep, lockdep, scope, yield_now};
use mmu_notifier::primary::{GupError, Invalidate, Pin, PrimaryMmu, SeqMoved, SetSeq, Subscription};
use mmu_notifier::{Access, Delivery, Invalidation, Range, WouldBlock};
use softmm::{Config, Machine, Mm, MmPin, Placement, Prot};

const DEADLINE: Duration = Duration::from_secs(120);
static TABLE: LockClass = LockClass::new("registration table");

/// What a device has of the range: pages, and the sequence at which they were got.
struct Installed<M: PrimaryMmu> {
    pin: M::Pin,
    seq: <M::Subscription as Subscription>::Seq,
}

/// A device that reads through what is installed.
struct Device<M: PrimaryMmu> {
    table: Mutex<Option<Installed<M>>>,
}

impl<M: PrimaryMmu> Invalidate for Device<M>
where
    <M::Subscription as Subscription>::Seq: 'static,
{
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        _: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        let mut table = self.table.lock(cx);
        let moved = seq.set();
        // The device reads under this lock, so no access is in flight.
        let dropped = table.take();
        drop(table);
        drop(dropped);
        Ok(moved)
    }
}

/// A registration of one range. Nothing in it knows which primary MMU it is.
struct Registration<'m, M: PrimaryMmu> {
    mm: &'m M,
    device: Arc<Device<M>>,
    subscription: M::Subscription,
}

impl<'m, M: PrimaryMmu + 'static> Registration<'m, M> {
    fn new(cx: &mut MaySleep<'_>, mm: &'m M, range: Range) -> Self {
        let device = Arc::new(Device { table: Mutex::new(&TABLE, None) });
        let subscription = mm.subscribe(cx, range, device.clone()).expect("the range can be heard");
        Registration { mm, device, subscription }
    }

    /// What the device reads, through pages that are good when it begins. `None`: nothing is mapped at the moment.
    fn read(&self, cx: &mut MaySleep<'_>, see: &impl Fn(&M::Pin) -> u64) -> Option<u64> {
        loop {
            {
                let table = self.device.table.lock(cx);
                if let Some(installed) = &*table
                    && !self.subscription.read_retry(installed.seq)
                {
                    return Some(see(&installed.pin));
                }
            }
            let seq = self.subscription.read_begin(cx).expect("the subscription stands");
            let pin = match self.mm.pin(cx, self.subscription.range(), Access::Write) {
                Ok(pin) => pin,
                // What is wrong may be wrong no more: only an error at a sequence that stands is news.
                Err(_) if self.subscription.read_retry(seq) => continue,
                Err(GupError::NotMapped { .. }) => return None,
                Err(error) => panic!("{error}"),
            };
            let mut table = self.device.table.lock(cx);
            if self.subscription.read_retry(seq) {
                drop(table);
                pin.unpin(cx, false);
                continue;
            }
            let old = table.replace(Installed { pin, seq });
            drop(table);
            drop(old);
        }
    }

    /// What a device reads that asks nobody.
    fn read_without_asking(&self, cx: &mut MaySleep<'_>, see: &impl Fn(&M::Pin) -> u64) -> Option<u64> {
        self.device.table.lock(cx).as_ref().map(|installed| see(&installed.pin))
    }
}

/// Memory of a primary MMU that holds `old` and will be replaced by other memory that holds `new`.
struct Memory<R> {
    range: Range,
    old: u64,
    new: u64,
    /// Unmaps, maps again at the same address, and writes `new`.
    replace: R,
}

/// The range is replaced between two reads of one thread.
fn in_turn<M: PrimaryMmu + 'static>(
    cx: &mut MaySleep<'_>,
    mm: &M,
    see: impl Fn(&M::Pin) -> u64,
    memory: Memory<impl FnOnce(&mut MaySleep<'_>)>,
) {
    let registration = Registration::new(cx, mm, memory.range);
    assert_eq!(registration.read(cx, &see), Some(memory.old));
    assert_eq!(registration.read(cx, &see), Some(memory.old), "a hit");
    (memory.replace)(cx);
    // Only who blocks has dropped it by now; a device that does not ask may still have the old page.
    let unasked = registration.read_without_asking(cx, &see);
    assert!(unasked.is_none() || (unasked == Some(memory.old) && !M::Delivery::BLOCKS), "{unasked:?}");
    assert_eq!(registration.read(cx, &see), Some(memory.new));
    registration.subscription.unsubscribe(cx).expect("called from no callback");
}

/// One thread replaces the range while another reads. A read that begins after the replacement shows the new bytes.
fn at_once<M: PrimaryMmu + 'static>(
    cx: &mut MaySleep<'_>,
    mm: &M,
    see: impl Fn(&M::Pin) -> u64 + Sync,
    memory: Memory<impl FnOnce(&mut MaySleep<'_>) + Send>,
) where
    M::Pin: Sync,
{
    let registration = &Registration::new(cx, mm, memory.range);
    let Memory { old, new, replace, .. } = memory;
    let (reading, replaced) = (&AtomicBool::new(false), &AtomicBool::new(false));
    scope(cx, |threads, cx| {
        let reader = threads.spawn("reader", |cx| {
            loop {
                let over = replaced.load(Ordering::Acquire);
                let seen = registration.read(cx, &see);
                reading.store(true, Ordering::Release);
                if over {
                    return seen;
                }
                // New memory is zero until the replacer has written it.
                assert!([None, Some(old), Some(0), Some(new)].contains(&seen), "{seen:x?}");
            }
        });
        while !reading.load(Ordering::Acquire) {
            yield_now();
        }
        replace(cx);
        replaced.store(true, Ordering::Release);
        assert_eq!(reader.join(cx).expect("the reader does not panic"), Some(new));
    });
    registration.subscription.unsubscribe(cx).expect("called from no callback");
}

fn no_rule_was_broken() {
    let reports = lockdep::reports_about(&TABLE);
    assert!(reports.is_empty(), "{reports:#?}");
}

mod soft {
    use super::*;

    const ROUNDS: u64 = 500;

    fn memory<'m>(
        cx: &mut MaySleep<'_>,
        mm: &'m Mm,
        round: u64,
    ) -> Memory<impl FnOnce(&mut MaySleep<'_>) + Send + 'm> {
        let (old, new) = (round * 2 + 1, round * 2 + 2);
        let range = Range::new(0x10_0000, 0x1000).expect("one page");
        let fill = move |cx: &mut MaySleep<'_>, mm: &Mm, value| {
            mm.mmap(cx, Placement::Fixed(range), Prot::ReadWrite).expect("there is room");
            mm.machine().cpus()[0].store(cx, mm, range.start(), value).expect("it is mapped");
        };
        fill(cx, mm, old);
        let replace = move |cx: &mut MaySleep<'_>| {
            mm.munmap(cx, range);
            fill(cx, mm, new);
        };
        Memory { range, old, new, replace }
    }

    /// Reads the frame as a device does, by its number.
    fn see(machine: &Machine, pin: &MmPin) -> u64 {
        let frame = machine.frames().id(pin.pfn(pin.range().first_page()).expect("softmm knows its frames"));
        machine.frames().read(frame, 0).expect("a pin keeps the frame")
    }

    fn with_mm(f: impl FnOnce(&mut MaySleep<'_>, &Mm)) {
        let machine = Machine::new(Config::default());
        MaySleep::enter(|cx| {
            let user = machine.new_mm().expect("an empty machine has room");
            f(cx, &user);
            user.mmput(cx);
        });
        assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "a pin was leaked");
        no_rule_was_broken();
    }

    #[test]
    fn replaced_between_two_reads() {
        with_mm(|cx, mm| {
            for round in 0..ROUNDS {
                let memory = memory(cx, mm, round);
                in_turn(cx, mm, |pin| see(mm.machine(), pin), memory);
            }
        });
    }

    #[test]
    fn replaced_while_it_is_read() {
        with_mm(|cx, mm| {
            for round in 0..ROUNDS {
                let memory = memory(cx, mm, round);
                at_once(cx, mm, |pin| see(mm.machine(), pin), memory);
            }
        });
    }
}

mod host {
    use super::*;

    const ROUNDS: u64 = 100;

    /// Reads through the fixed buffer.
    fn see(pin: &HostPin) -> u64 {
        let mut bytes = [0; 8];
        pin.buffer().read_through(0, &mut bytes).expect("the buffer is registered");
        u64::from_ne_bytes(bytes)
    }

    fn memory(arena: &mut Arena) -> Memory<impl FnOnce(&mut MaySleep<'_>) + Send + 'static> {
        let event =
            catalogue().into_iter().find(|e| e.name == "munmap_mmap/raw").expect("an event of that name");
        let mut scene = event.setup(arena).expect("the scene can be set up");
        let After::Stamp(new) = scene.after() else { panic!("memory is mapped again") };
        let (range, old) = (scene.watched(), scene.before());
        let replace = move |_: &mut MaySleep<'_>| {
            assert_eq!(scene.disturb(&mut || ()).expect("it can be unmapped"), Change::Happened);
            // A reader may still be at it, so what the scene has mapped stays as long as the process.
            std::mem::forget(scene);
        };
        Memory { range, old, new, replace }
    }

    fn in_child(name: &str, f: impl FnOnce(&mut MaySleep<'_>, &HostMm<KvmSource>, &mut Arena)) {
        if ![Capability::DevKvm, Capability::Bpf, Capability::IoUring].into_iter().all(testing::require) {
            return;
        }
        testing::in_child(name, DEADLINE, || {
            let options = kvm::Options { ring: Some(1 << 16), ..kvm::Options::default() };
            let mm = HostMm::new(KvmSource::open(&options).unwrap(), 16).unwrap();
            MaySleep::enter(|cx| f(cx, &mm, &mut Arena::new(std::env::temp_dir())));
            no_rule_was_broken();
        });
    }

    #[test]
    fn replaced_between_two_reads() {
        in_child("host::replaced_between_two_reads", |cx, mm, arena| {
            for _ in 0..ROUNDS {
                in_turn(cx, mm, see, memory(arena));
            }
        });
    }

    #[test]
    fn replaced_while_it_is_read() {
        in_child("host::replaced_while_it_is_read", |cx, mm, arena| {
            for _ in 0..ROUNDS {
                at_once(cx, mm, see, memory(arena));
            }
        });
    }
}
