// SPDX-License-Identifier: MIT OR Apache-2.0
//! The contract, held by both live sources on real memory.

use std::sync::mpsc;
use std::time::Duration;

use interleave::Sleep;
use mmu_notifier::primary::{SeqMoved, SetSeq};
use mmu_notifier::{Invalidation, PAGE_SIZE, WouldBlock};

use super::*;
use crate::capability::Capability;
use crate::kvm::{self, KvmSource};
use crate::sys::test_memory::{Memory, RW};
use crate::testing;
use crate::uffd::{self, UffdSource};

const DEADLINE: Duration = Duration::from_secs(600);
/// The zap of this much memory takes some ten milliseconds.
const WIDE: u64 = 512 << 20;
/// Where it is, far from where the kernel maps what programs ask for.
const THERE: u64 = 0x2000_0000_0000;

struct Tell(mpsc::Sender<Range>);

impl Invalidate for Tell {
    fn invalidate(
        &self,
        _: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let _ = self.0.send(inv.range);
        Ok(seq.set())
    }
}

/// Deaf to what the VMs of other programs do elsewhere: where a test says that nothing changed, nothing did.
fn over_kvm() -> HostMm<KvmSource> {
    let window = Some(Range::new(THERE, WIDE).unwrap());
    let options = kvm::Options { ring: Some(1 << 16), window, ..kvm::Options::default() };
    HostMm::new(KvmSource::open(&options).unwrap(), 8).unwrap()
}

fn anon(bytes: u64) -> Memory {
    Memory::map(Some(THERE), bytes, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None).unwrap()
}

fn over_uffd() -> HostMm<UffdSource> {
    HostMm::new(UffdSource::open(&uffd::Options::default()).unwrap(), 8).unwrap()
}

fn has_kvm() -> bool {
    [Capability::DevKvm, Capability::Bpf, Capability::IoUring].into_iter().all(testing::require)
}

fn has_uffd() -> bool {
    [Capability::Userfaultfd, Capability::IoUring].into_iter().all(testing::require)
}

fn hears_and_calls<S: Source>(mm: &HostMm<S>) {
    MaySleep::enter(|cx| {
        let memory = anon(4 * PAGE_SIZE);
        memory.touch();
        let (tell, told) = mpsc::channel();
        let page = Range::page(memory.page(1));
        let sub = mm.subscribe(cx, page, Arc::new(Tell(tell))).unwrap();
        let seq = sub.read_begin(cx).unwrap();
        let before = mm.page_identity(cx, memory.page(1)).unwrap();
        assert!(before.present && before.pfn.is_some());
        assert!(!sub.read_retry(seq), "nothing has changed");

        memory.madvise(libc::MADV_DONTNEED).unwrap();
        assert!(sub.read_retry(seq));
        assert_eq!(told.recv_timeout(DEADLINE).unwrap(), page, "clipped to the subscription");
        assert!(!mm.page_identity(cx, memory.page(1)).unwrap().present);

        let seq = sub.read_begin(cx).unwrap();
        mm.fault_in(cx, page, Access::Write).unwrap();
        assert!(!sub.read_retry(seq), "a fault that fills a hole changes no translation");
        let pin = mm.pin(cx, page, Access::Write).unwrap();
        assert!(!sub.read_retry(seq));
        sub.unsubscribe(cx).unwrap();
        pin.unpin(cx, true);
        while told.try_recv().is_ok() {}
        drop(memory);
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err(), "no callback after unsubscribe");
    });
}

#[test]
fn kvm_hears_and_calls() {
    if has_kvm() {
        testing::in_child("primary::tests::kvm_hears_and_calls", DEADLINE, || hears_and_calls(&over_kvm()));
    }
}

#[test]
fn uffd_hears_and_calls() {
    if has_uffd() {
        testing::in_child("primary::tests::uffd_hears_and_calls", DEADLINE, || hears_and_calls(&over_uffd()));
    }
}

/// A thread pins the last page after the source has announced its end and before it is gone.
/// `None`: not so this time. Otherwise whether the device sees the program's page.
fn pin_in_the_gap<S: Source>(mm: &HostMm<S>, wait: bool) -> Option<bool> {
    MaySleep::enter(|cx| {
        let memory = anon(WIDE);
        memory.madvise(libc::MADV_NOHUGEPAGE).unwrap();
        memory.touch();
        let last = Range::page(memory.range.last_page());
        memory.write(WIDE - PAGE_SIZE, b"old");
        let sub = mm.watch(last).unwrap();
        let announced = sub.snapshot().unwrap();
        let (done, is_done) = mpsc::channel::<()>();
        let (pin, seq, in_the_gap) = std::thread::scope(|threads| {
            threads.spawn(|| {
                memory.madvise(libc::MADV_DONTNEED).unwrap();
                done.send(()).unwrap();
            });
            while !sub.read_retry(announced) {}
            let seq = if wait { sub.read_begin(cx).unwrap() } else { sub.snapshot().unwrap() };
            let pin = mm.pin(cx, last, Access::Write).unwrap();
            // Without waiting, the operation must still be at it, or there was no gap to fall into.
            let in_the_gap = wait || is_done.try_recv().is_err();
            (pin, seq, in_the_gap)
        });
        // Not trusted: the caller would try again.
        if !in_the_gap || sub.read_retry(seq) {
            return None;
        }
        let mut device = [0; 3];
        pin.buffer().read_through(0, &mut device).unwrap();
        Some(device == memory.read(WIDE - PAGE_SIZE, 3)[..])
    })
}

fn the_gap_is_closed<S: Source>(mm: &HostMm<S>) {
    // A pin that comes too late for the old page is the program's own.
    let control = testing::until(|| pin_in_the_gap(mm, false).filter(|same| !*same));
    assert!(control.is_some(), "the control: a snapshot alone lets a stale pin through");
    for _ in 0..3 {
        assert_eq!(testing::until(|| pin_in_the_gap(mm, true)), Some(true));
    }
}

#[test]
fn kvm_read_begin_closes_the_gap() {
    if has_kvm() {
        let name = "primary::tests::kvm_read_begin_closes_the_gap";
        testing::in_child(name, DEADLINE, || the_gap_is_closed(&over_kvm()));
    }
}

#[test]
fn a_barrier_announces_nothing_itself() {
    if !has_kvm() {
        return;
    }
    testing::in_child("primary::tests::a_barrier_announces_nothing_itself", DEADLINE, || {
        let mm = over_kvm();
        for bytes in [PAGE_SIZE, 8 * PAGE_SIZE] {
            let file = std::fs::File::from(
                rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
            );
            file.set_len(bytes).unwrap();
            let memory = Memory::map(Some(THERE), bytes, RW, libc::MAP_SHARED, Some(&file)).unwrap();
            memory.touch();
            let sub = mm.watch(memory.range).unwrap();
            MaySleep::enter(|cx| {
                for _ in 0..3 {
                    memory.madvise(libc::MADV_DONTNEED).unwrap();
                    // Each follows a change, so each passes a barrier.
                    let seq = sub.read_begin(cx).unwrap();
                    assert!(!sub.read_retry(seq), "read_begin moves its own sequence");
                }
            });
        }
    });
}

#[test]
fn what_cannot_be_got_says_why() {
    if !has_uffd() {
        return;
    }
    testing::in_child("primary::tests::what_cannot_be_got_says_why", DEADLINE, || {
        let mm = over_uffd();
        MaySleep::enter(|cx| {
            let memory = Memory::anon(3 * PAGE_SIZE);
            memory.touch();
            memory.mprotect(libc::PROT_READ);
            let at = memory.page(0);
            for got in [
                mm.pin(cx, memory.range, Access::Write).map(drop),
                mm.fault_in(cx, memory.range, Access::Write),
            ] {
                assert!(matches!(got, Err(GupError::AccessDenied { at: page, .. }) if page == at), "{got:?}");
            }
            mm.fault_in(cx, memory.range, Access::Read).unwrap();
            let range = memory.range;
            memory.munmap();
            for got in [mm.pin(cx, range, Access::Write).map(drop), mm.fault_in(cx, range, Access::Read)] {
                assert!(matches!(got, Err(GupError::NotMapped { at: page, .. }) if page == at), "{got:?}");
            }
            assert!(matches!(mm.watch(range), Err(SubscribeError::Unsupported { .. })));
            assert!(mm.page_identity(cx, at).is_err());
        });
    });
}
