// SPDX-License-Identifier: MIT OR Apache-2.0
//! Failure modes of registration caches, by the number that docs/failure-modes.md has for them: what happens around a
//! registration, from its birth to its end.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::memory::{ANON, Memory, memfd};
use common::{DEADLINE, cache, eventually, get, has, has_uffd, kvm_source, over_both, see, uffd_source};
use hostmm::capability::Capability;
use hostmm::primary::{HostMm, Source};
use hostmm::testing;
use hostmm::uffd::{self, UffdSource};
use interleave::{AtomicBool, MaySleep, Ordering, scope};
use mmu_notifier::{Access, PAGE_SIZE, PrimaryMmu, Range};
use userptr::CacheError;
use userptr::cache::{Options, RegistrationCache};
use userptr::device::io_uring::{Buffer, IoUring};
use userptr::device::{Device, DeviceAddr, DeviceError, Hold, Limits};
use userptr::source::{AnonymousUffd, AnySource};

#[test]
fn b6_13_memory_that_goes_while_it_is_leased() {
    fn body<S: Source + 'static>(source: S) {
        let mm = Arc::new(HostMm::new(source, 1).unwrap());
        let quiet = (0..20).any(|_| {
            let device = IoUring::new(8).unwrap();
            let cache = RegistrationCache::new(Arc::clone(&mm), device, Options::default()).unwrap();
            let memory = Memory::stamped(2, 1);
            let (one, two) = (get(&cache, memory.0).unwrap(), get(&cache, memory.0).unwrap());
            // Some VM of the machine changed memory at such an address.
            if cache.stats().unwrap().registered != 1 || !two.is_current() {
                return false;
            }
            let range = memory.0;
            memory.unmap();
            assert!(cache.lookup(range.start() as usize, 1, Access::Read).is_none(), "unreachable at once");
            assert!(!one.is_current() && see(&cache, &one) == 1);
            drop(one);
            cache.reap().unwrap();
            assert_eq!((see(&cache, &two), cache.device().pinned_bytes()), (1, range.len()));
            drop(two);
            eventually("the pages are let go", || cache.device().pinned_bytes() == 0);
            assert_eq!(cache.stats().unwrap().released, 1);
            true
        });
        assert!(quiet);
    }
    over_both("b6_13_memory_that_goes_while_it_is_leased", || body(kvm_source()), || body(uffd_source()));
}

/// An io_uring that changes memory while it maps and unmaps: what allocators do inside of drivers.
struct Restless {
    inner: IoUring,
    /// Memory that the cache listens to.
    victim: Range,
}

impl Restless {
    fn stir(&self) {
        let scratch = vec![1_u8; 300 << 10];
        drop(std::hint::black_box(scratch));
        let victim = std::mem::ManuallyDrop::new(Memory(self.victim));
        victim.madvise(self.victim, libc::MADV_DONTNEED).unwrap();
    }
}

impl<S: Source> Device<HostMm<S>> for Restless {
    type Pages = Buffer;
    type Mapping = Buffer;
    const HOLD: Hold = Hold::Pinned;

    fn limits(&self) -> Limits {
        Device::<HostMm<S>>::limits(&self.inner)
    }

    fn get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &HostMm<S>,
        range: Range,
        access: Access,
    ) -> Result<Buffer, DeviceError> {
        self.stir();
        self.inner.get_pages(cx, mm, range, access)
    }

    fn put_pages(&self, cx: &mut MaySleep<'_>, pages: Buffer, written: bool) {
        self.stir();
        Device::<HostMm<S>>::put_pages(&self.inner, cx, pages, written);
    }

    fn map(
        &self,
        cx: &mut MaySleep<'_>,
        pages: Buffer,
        at: Option<DeviceAddr>,
    ) -> Result<Buffer, (DeviceError, Buffer)> {
        self.stir();
        Device::<HostMm<S>>::map(&self.inner, cx, pages, at)
    }

    fn address(&self, mapping: &Buffer) -> DeviceAddr {
        Device::<HostMm<S>>::address(&self.inner, mapping)
    }

    fn wait_idle(&self, cx: &mut MaySleep<'_>, mapping: &Buffer) {
        Device::<HostMm<S>>::wait_idle(&self.inner, cx, mapping);
    }

    fn unmap(&self, cx: &mut MaySleep<'_>, mapping: Buffer) -> Buffer {
        self.stir();
        Device::<HostMm<S>>::unmap(&self.inner, cx, mapping)
    }
}

#[test]
fn b6_15_16_a_device_that_gives_up_memory_that_is_listened_to() {
    fn body<S: Source + 'static>(source: S) {
        let victim = Memory::stamped(4, 1);
        let device = Restless { inner: IoUring::new(8).unwrap(), victim: victim.0 };
        let mm = Arc::new(HostMm::new(source, 1).unwrap());
        let cache = RegistrationCache::new(mm, device, Options { entries: 4, ..Options::default() }).unwrap();
        let memory = Memory::stamped(16, 2);
        for round in 0..50 {
            let ranges = [memory.page(round % 16), victim.page(round % 4)];
            for range in ranges {
                let lease = cache.get(range.start() as usize, PAGE_SIZE as usize, Access::Write);
                drop(lease.unwrap());
            }
        }
        assert!(cache.stats().unwrap().released > 20);
    }
    over_both(
        "b6_15_16_a_device_that_gives_up_memory_that_is_listened_to",
        || body(kvm_source()),
        || body(uffd_source()),
    );
}

#[test]
fn b6_19_the_heap_that_the_cache_itself_allocates_from() {
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options { entries: 16, ..Options::default() });
        let mut kept: Vec<Vec<u8>> = Vec::new();
        for n in 0..2000_usize {
            kept.push(vec![n as u8; 100 + n * 37 % 9000]);
            let at = n * 7919 % kept.len();
            let bytes = &mut kept[at];
            let lease = cache.lease_mut(bytes).unwrap();
            assert_eq!(see(&cache, lease.lease()) as u8, see_in(&lease));
            drop(lease);
            if kept.len() > 50 {
                kept.swap_remove(n % 50);
                // SAFETY: it may be called at any time.
                unsafe { libc::malloc_trim(0) };
            }
        }
    }
    fn see_in<M: PrimaryMmu, D: Device<M>>(lease: &userptr::cache::SliceMutLease<'_, '_, M, D>) -> u8 {
        lease.bytes()[0]
    }
    over_both(
        "b6_19_the_heap_that_the_cache_itself_allocates_from",
        || body(kvm_source()),
        || body(uffd_source()),
    );
}

#[test]
fn b6_21_a_source_that_dies() {
    if !has_uffd() {
        return;
    }
    testing::in_child("b6_21_a_source_that_dies", DEADLINE, || {
        for fault in [uffd::Fault::Panic, uffd::Fault::Return] {
            let source = UffdSource::open(&uffd::Options::default()).unwrap();
            let cache = cache(AnonymousUffd::new(source.clone()).unwrap(), Options::default());
            // Far from where the kernel maps what others ask for, so that nobody takes the hole.
            let at = 0x2000_0000_0000;
            let memory = Memory::map(at, 1, ANON, None).unwrap();
            memory.fill(1);
            drop(get(&cache, memory.0).unwrap());
            source.inject(fault);
            // The monitor is gone, or goes by this: whoever unmaps must not wait for it.
            memory.unmap();
            eventually("the cache notices", || cache.lookup(at as usize, 1, Access::Read).is_none());
            let memory = Memory::map(at, 1, ANON, None).unwrap();
            memory.fill(2);
            let lease = get(&cache, memory.0).unwrap();
            assert_eq!(
                (see(&cache, &lease), lease.is_cached()),
                (2, false),
                "one lease at a time from now on"
            );
        }
    });
}

#[test]
fn b6_22_a_storm_of_signals() {
    fn body<S: Source + 'static>(source: S) {
        extern "C" fn ignore(_: libc::c_int) {}
        let every = libc::timeval { tv_sec: 0, tv_usec: 500 };
        let timer = libc::itimerval { it_interval: every, it_value: every };
        // SAFETY: the handler does nothing, and the timer ends with this process.
        unsafe {
            libc::signal(libc::SIGALRM, ignore as extern "C" fn(libc::c_int) as libc::sighandler_t);
            assert_eq!(libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()), 0);
        }
        let cache = cache(source, Options::default());
        for round in 1..500 {
            let memory = Memory::stamped(2, round);
            assert_eq!(see(&cache, &get(&cache, memory.0).unwrap()), round);
        }
    }
    over_both("b6_22_a_storm_of_signals", || body(kvm_source()), || body(uffd_source()));
}

#[test]
fn b6_23_memory_that_another_userfaultfd_has() {
    if !has_uffd() {
        return;
    }
    testing::in_child("b6_23_memory_that_another_userfaultfd_has", DEADLINE, || {
        let memory = Memory::stamped(1, 4);
        let other = UffdSource::open(&uffd::Options::default()).unwrap();
        let _theirs = other.watch(memory.0).unwrap();
        let cache = cache(uffd_source(), Options::default());
        let lease = get(&cache, memory.0).unwrap();
        assert_eq!((lease.is_cached(), see(&cache, &lease)), (false, 4));
        drop(lease);
        assert_eq!(cache.stats().unwrap().unheard, 1);
        eventually("its pages are let go", || cache.device().pinned_bytes() == 0);
    });
}

#[test]
fn b6_24_no_source_at_all() {
    if !has(&[Capability::IoUring]) {
        return;
    }
    testing::in_child("b6_24_no_source_at_all", DEADLINE, || {
        let missing = hostmm::kvm::Options { kvm_path: "/nonexistent".into(), ..Default::default() };
        let kvm = hostmm::kvm::KvmSource::open(&missing).unwrap_err();
        let cache = cache(AnySource::None { kvm, uffd: "seccomp".into() }, Options::default());
        for round in 1..5 {
            let memory = Memory::stamped(1, round);
            let lease = get(&cache, memory.0).unwrap();
            assert_eq!((lease.is_cached(), see(&cache, &lease)), (false, round));
        }
        let stats = cache.stats().unwrap();
        assert_eq!((stats.unheard, stats.one_shot, stats.hits, stats.bytes), (4, 4, 0, 0));
        let warning = cache.warning().unwrap().unwrap();
        assert!(warning.contains("notifier source") && warning.contains("seccomp"), "{warning}");
    });
}

#[test]
fn b6_26_the_stack() {
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options::default());
        for round in 1..20_u64 {
            // The stacks of threads come and go, often at the same addresses.
            let thread = || {
                let mut words = [round; 3000];
                // SAFETY: the words as bytes, for as long as they are borrowed.
                let bytes =
                    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), 24_000) };
                let lease = cache.lease_mut(bytes).unwrap();
                assert_eq!(see(&cache, lease.lease()), round);
            };
            thread();
            MaySleep::enter(|cx| scope(cx, |threads, _| drop(threads.spawn("stack", |_| thread()))));
        }
    }
    over_both("b6_26_the_stack", || body(kvm_source()), || body(uffd_source()));
}

#[test]
fn b6_27_every_kind_of_memory() {
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options::default());
        let right = |memory: &Memory| {
            memory.fill(5);
            assert_eq!(see(&cache, &get(&cache, memory.0).unwrap()), 5);
        };
        right(&Memory::stamped(600, 1));
        let huge = Memory::map(0, 1024, ANON, None).unwrap();
        let _ = huge.madvise(huge.0, libc::MADV_HUGEPAGE);
        right(&huge);
        let locked = Memory::stamped(4, 1);
        locked.mlock();
        right(&locked);
        let file = memfd();
        file.set_len(4 * PAGE_SIZE).unwrap();
        for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
            right(&Memory::map(0, 4, flags, Some(&file)).unwrap());
        }
        right(&Memory::map(0, 4, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None).unwrap());
        if let Ok(hugetlb) = Memory::map(0, 512, ANON | libc::MAP_HUGETLB, None) {
            right(&hugetlb);
        }

        let several = Memory::stamped(6, 1);
        several.madvise(several.page(2), libc::MADV_DONTDUMP).unwrap();
        right(&several);
        drop(Memory(several.page(3)));
        assert!(matches!(get(&cache, several.0), Err(CacheError::Device(_))), "a hole");
        let none = Memory::stamped(1, 1);
        none.protect(libc::PROT_NONE);
        assert!(matches!(get(&cache, none.0), Err(CacheError::Device(_))));
        none.protect(libc::PROT_READ);
        assert!(matches!(get(&cache, none.0), Err(CacheError::Device(_))), "io_uring pins for writing");
        assert!(cache.stats().unwrap().failed == 3);
    }
    over_both("b6_27_every_kind_of_memory", || body(kvm_source()), || body(uffd_source()));
}

#[test]
fn b6_32_a_longer_buffer_at_the_same_address() {
    fn body<S: Source + 'static>(source: S) {
        let mm = Arc::new(HostMm::new(source, 1).unwrap());
        let quiet = (0..20).any(|_| {
            let device = IoUring::new(8).unwrap();
            let cache = RegistrationCache::new(Arc::clone(&mm), device, Options::default()).unwrap();
            let memory = Memory::stamped(8, 6);
            for pages in [1, 2, 8, 3, 1] {
                let part = Range::new(memory.0.start(), pages * PAGE_SIZE).unwrap();
                let lease = get(&cache, part).unwrap();
                assert!(lease.registered().contains(part) && see(&cache, &lease) == 6);
            }
            let stats = cache.stats().unwrap();
            // Some VM of the machine changed memory at such an address: what was dropped for it is no sign of anything.
            if stats.stale + stats.told + stats.retried > 0 {
                return false;
            }
            assert_eq!((stats.registered, stats.merged), (3, 2), "what is contained goes");
            true
        });
        assert!(quiet);
    }
    over_both("b6_32_a_longer_buffer_at_the_same_address", || body(kvm_source()), || body(uffd_source()));
}

#[test]
fn b6_35_two_caches_and_two_devices_over_one_range() {
    fn body<S: Source + 'static>(source: S) {
        let mm = Arc::new(HostMm::new(source, 1).unwrap());
        let cache = |slots| {
            let device = IoUring::new(slots).unwrap();
            RegistrationCache::new(Arc::clone(&mm), device, Options::default()).unwrap()
        };
        let (one, two) = (cache(8), cache(16));
        let cpu =
            RegistrationCache::new(Arc::clone(&mm), userptr::device::cpu::Cpu::new(), Options::default())
                .unwrap();
        for round in 1..20 {
            let memory = Memory::stamped(4, round);
            for cache in [&one, &two] {
                assert_eq!(see(cache, &get(cache, memory.0).unwrap()), round);
            }
            drop(cpu.get(memory.0.start() as usize, PAGE_SIZE as usize, Access::Read).unwrap());
            if round % 2 == 0 {
                memory.unmap();
                eventually("both let go", || one.device().pinned_bytes() + two.device().pinned_bytes() == 0);
            }
        }
        drop(one);
        let memory = Memory::stamped(1, 77);
        assert_eq!(see(&two, &get(&two, memory.0).unwrap()), 77);
    }
    over_both(
        "b6_35_two_caches_and_two_devices_over_one_range",
        || body(kvm_source()),
        || body(uffd_source()),
    );
}

#[test]
fn b6_37_the_end_of_the_program() {
    fn body<S: Source + 'static>(source: S) {
        // Left as it is: the process exits with a reaper, a monitor and pins.
        let cache = Box::leak(Box::new(cache(source, Options::default())));
        let memory = Box::leak(Box::new(Memory::stamped(4, 1)));
        std::mem::forget(get(cache, memory.0).unwrap());
    }
    over_both("b6_37_the_end_of_the_program", || body(kvm_source()), || body(uffd_source()));
}

/// Threads that look up while others change the memory, for a while: nothing may be leaked or hang.
#[test]
fn b6_14_lookups_beside_changes_leak_nothing() {
    fn body<S: Source + 'static>(source: S) {
        let cache = cache(source, Options { entries: 8, ..Options::default() });
        let memory = Memory::stamped(32, 1);
        let stop = AtomicBool::new(false);
        MaySleep::enter(|cx| {
            scope(cx, |threads, cx| {
                for n in 0..3_u64 {
                    let (cache, memory, stop) = (&cache, &memory, &stop);
                    threads.spawn("lookups", move |_| {
                        let mut at = n;
                        while !stop.load(Ordering::Relaxed) {
                            at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                            let (first, pages) = ((at >> 33) % 28, 1 + (at >> 50) % 4);
                            let range =
                                Range::new(memory.0.start() + first * PAGE_SIZE, pages * PAGE_SIZE).unwrap();
                            match get(cache, range) {
                                Ok(lease) => assert!(lease.registered().contains(range)),
                                Err(e) => assert!(matches!(e, CacheError::Full { .. }), "{e}"),
                            }
                        }
                    });
                }
                for n in 0..400 {
                    memory.madvise(memory.page(n % 32), libc::MADV_DONTNEED).unwrap();
                    interleave::time::sleep(cx, Duration::from_micros(500));
                }
                stop.store(true, Ordering::Relaxed);
            });
        });
        drop(memory);
        eventually("all is let go", || cache.device().pinned_bytes() == 0);
        let stats = cache.stats().unwrap();
        assert!(stats.stale + stats.told > 0 && stats.entries == 0, "{stats:?}");
    }
    over_both("b6_14_lookups_beside_changes_leak_nothing", || body(kvm_source()), || body(uffd_source()));
}
