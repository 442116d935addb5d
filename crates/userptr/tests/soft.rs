// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cache over softmm: the code that runs live, with an mm that can be stopped anywhere.

use std::sync::Arc;
use std::time::Duration;

use interleave::explore::{Config, Report, Strategy, explore};
use interleave::{AtomicU64, MaySleep, Ordering, Sleep, scope};
use mmu_notifier::primary::{
    CountedBefore, GupError, IdentityError, Invalidate, PageIdentity, Pin, PrimaryMmu, SeqMoved, SetSeq,
    SubscribeError, Unheard,
};
use mmu_notifier::{Access, Invalidation, PAGE_SIZE, PageAddr, Range, WouldBlock};
use softmm::{Machine, Mm, MmPin, Placement, Prot};
use userptr::cache::{Admit, Options, Reaper, RegistrationCache, Verdict};
use userptr::device::pinned::Pinned;
use userptr::{CacheError, Lease};

type Cache = RegistrationCache<Mm, Pinned>;

fn pages(first: u64, pages: u64) -> Range {
    Range::new((0x100 + first) * PAGE_SIZE, pages * PAGE_SIZE).unwrap()
}

fn options(entries: usize) -> Options {
    Options { entries, reaper: Reaper::Manual, threads: 1, ..Options::default() }
}

fn map(cx: &mut MaySleep<'_>, mm: &Mm, range: Range, value: u64) {
    mm.mmap(cx, Placement::Fixed(range), Prot::ReadWrite).unwrap();
    for page in range.iter_pages() {
        mm.machine().cpus()[0].store(cx, mm, page.get(), value).unwrap();
    }
}

fn get(cache: &Cache, range: Range, access: Access) -> Result<Lease<'_, Mm, Pinned>, CacheError> {
    cache.get(range.start() as usize, range.len() as usize, access)
}

/// What the device sees in the first word of `page`.
fn see(machine: &Machine, pin: &MmPin, page: PageAddr) -> u64 {
    let frame = machine.frames().id(pin.pfn(page).expect("softmm knows its frames"));
    machine.frames().read(frame, 0).expect("a pin keeps the frame")
}

fn device_sees(cache: &Cache, range: Range) -> u64 {
    let lease = get(cache, range, Access::Write).unwrap();
    see(cache.mm().machine(), lease.mapping(), range.first_page())
}

/// An mm of its own; afterwards no frame may be missing.
fn with_mm(f: impl FnOnce(&mut MaySleep<'_>, &Arc<Mm>)) {
    let machine = Machine::new(softmm::Config::default());
    MaySleep::enter(|cx| {
        let user = machine.new_mm().unwrap();
        f(cx, &user);
        user.mmput(cx);
    });
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "a pin was leaked");
}

#[test]
fn any_part_of_a_registration_hits() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 64), 7);
        drop(get(&cache, pages(3, 20), Access::Write).unwrap());
        for (first, len) in [(3, 20), (3, 1), (22, 1), (9, 7), (5, 17)] {
            assert_eq!(device_sees(&cache, pages(first, len)), 7);
        }
        assert_eq!((cache.stats().unwrap().hits, cache.stats().unwrap().registered), (5, 1));
        drop(get(&cache, pages(2, 20), Access::Write).unwrap());
        assert_eq!(cache.stats().unwrap().registered, 2, "one page outside");
    });
}

#[test]
fn bytes_are_rounded_to_their_pages_and_the_lease_knows_both() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 4), 7);
        let addr = pages(1, 1).end() as usize - 3;
        let lease = cache.get(addr, 6, Access::Read).unwrap();
        assert_eq!((lease.addr(), lease.len(), lease.registered()), (addr, 6, pages(1, 2)));
        assert_eq!(lease.device_addr().0, addr as u64);
        assert!(matches!(cache.get(addr, 0, Access::Read), Err(CacheError::Range(_))));
        assert!(matches!(cache.get(usize::MAX - 3, 9, Access::Read), Err(CacheError::Range(_))));
    });
}

#[test]
fn rights_are_kept_apart_and_the_stronger_replace_the_weaker() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 4), 7);
        let reader = get(&cache, pages(0, 4), Access::Read).unwrap();
        assert_eq!(reader.rights(), Access::Read);
        let verdict = |access| cache.explain(pages(0, 1).start() as usize, 1, access).unwrap().verdict;
        assert_eq!((verdict(Access::Read), verdict(Access::Write)), (Verdict::Hit, Verdict::ReadOnly));
        let writer = get(&cache, pages(0, 4), Access::Write).unwrap();
        assert_eq!(writer.rights(), Access::Write);
        assert_eq!(get(&cache, pages(1, 1), Access::Read).unwrap().rights(), Access::Write);
        assert_eq!(cache.stats().unwrap().merged, 1);
        assert_eq!(cache.stats().unwrap().entries, 2, "the reader still has its own");
        drop(reader);
        cache.reap().unwrap();
        assert_eq!(cache.stats().unwrap().entries, 1);
    });
}

#[test]
fn replaced_memory_is_registered_anew_and_a_lease_outlives_it() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 2), 1);
        let old = get(&cache, pages(0, 2), Access::Write).unwrap();
        assert!(old.is_current());
        mm.munmap(cx, pages(0, 2));
        assert!(!old.is_current());
        assert!(matches!(get(&cache, pages(0, 2), Access::Write), Err(CacheError::Device(_))));
        map(cx, mm, pages(0, 2), 2);
        assert_eq!(device_sees(&cache, pages(0, 2)), 2);
        assert_eq!(
            see(mm.machine(), old.mapping(), pages(0, 1).first_page()),
            1,
            "the pages of the lease stay"
        );
        let before = cache.stats().unwrap();
        assert_eq!((before.leased_dead_bytes, before.entries), (2 * PAGE_SIZE, 2));
        drop(old);
        assert_eq!(cache.reap().unwrap(), 1);
        assert_eq!(cache.stats().unwrap().leased_dead_bytes, 0);
    });
}

#[test]
fn bounds_hold_and_what_is_used_stays() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(4)).unwrap();
        map(cx, mm, pages(0, 64), 7);
        for first in 0..64 {
            drop(get(&cache, pages(first, 1), Access::Write).unwrap());
            drop(get(&cache, pages(0, 1), Access::Write).unwrap());
            assert!(cache.stats().unwrap().entries <= 4);
        }
        let stats = cache.stats().unwrap();
        assert!(stats.evicted >= 60 && stats.registered < 64 + 40, "{stats:?}");
        let leases: Vec<_> = (0..4).map(|n| get(&cache, pages(n, 1), Access::Write).unwrap()).collect();
        let full = get(&cache, pages(9, 1), Access::Write);
        assert!(matches!(full, Err(CacheError::Full { entries: 4, max: 4, .. })));
        drop(leases);
        drop(get(&cache, pages(9, 1), Access::Write).unwrap());

        let mut options = options(64);
        options.bytes = 10 * PAGE_SIZE;
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options).unwrap();
        for first in 0..20 {
            drop(get(&cache, pages(3 * first, 3), Access::Write).unwrap());
            assert!(cache.stats().unwrap().bytes <= 10 * PAGE_SIZE);
        }
        assert!(matches!(get(&cache, pages(0, 11), Access::Write), Err(CacheError::Full { .. })));
    });
}

#[test]
fn what_is_used_once_is_not_admitted() {
    with_mm(|cx, mm| {
        let mut options = options(8);
        options.admit = Admit::SecondUse { or_bytes: 4 * PAGE_SIZE };
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options).unwrap();
        map(cx, mm, pages(0, 8), 7);
        let cached: Vec<bool> =
            (0..3).map(|_| get(&cache, pages(1, 1), Access::Write).unwrap().is_cached()).collect();
        assert_eq!(cached, [false, true, true]);
        assert!(get(&cache, pages(4, 4), Access::Write).unwrap().is_cached());
        let stats = cache.stats().unwrap();
        assert_eq!((stats.one_shot, stats.unheard, stats.entries, stats.hits), (1, 0, 2, 1));
    });
}

#[test]
fn more_leases_than_slots_are_counted_in_the_entry() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(8)).unwrap();
        map(cx, mm, pages(0, 1), 7);
        let leases: Vec<_> = (0..40).map(|_| get(&cache, pages(0, 1), Access::Write).unwrap()).collect();
        assert_eq!(cache.stats().unwrap().hits, 39);
        mm.munmap(cx, pages(0, 1));
        for lease in leases {
            assert_eq!(cache.reap().unwrap(), 0);
            drop(lease);
        }
        assert_eq!(cache.reap().unwrap(), 1);
    });
}

#[test]
fn a_registration_that_fails_leaves_nothing() {
    with_mm(|cx, mm| {
        let cache = Cache::new(mm.clone(), Pinned { mappings: 64 }, options(1)).unwrap();
        map(cx, mm, pages(0, 1), 7);
        for _ in 0..3 {
            assert!(matches!(get(&cache, pages(0, 2), Access::Write), Err(CacheError::Device(_))));
        }
        let stats = cache.stats().unwrap();
        assert_eq!((stats.entries, stats.bytes, stats.failed), (0, 0, 3));
        assert_eq!(device_sees(&cache, pages(0, 1)), 7);
    });
}

/// A mm whose news reach a subscriber in another way.
struct Told {
    mm: Arc<Mm>,
    how: How,
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    /// As softmm does: the change waits for the callback.
    Blocks,
    /// The sequence moves before the change, and the callback never comes: as late as a live source can be.
    Late,
    /// The control: nothing moves and nobody is called.
    Never,
}

/// In place of a callback that does not come.
struct Silent(How);

impl Invalidate for Silent {
    fn invalidate(
        &self,
        _: Sleep<'_, '_>,
        _: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        Ok(if self.0 == How::Never { seq.skip_against_the_rules() } else { seq.set() })
    }
}

impl PrimaryMmu for Told {
    type Delivery = CountedBefore;
    type Subscription = <Mm as PrimaryMmu>::Subscription;
    type Pin = MmPin;

    fn subscribe(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<Self::Subscription, SubscribeError> {
        let callback = if self.how == How::Blocks { callback } else { Arc::new(Silent(self.how)) };
        self.mm.subscribe(cx, range, callback)
    }

    fn fault_in(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<(), GupError> {
        self.mm.fault_in(cx, range, access)
    }

    fn pin(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<MmPin, GupError> {
        self.mm.pin(cx, range, access)
    }

    fn page_identity(&self, cx: &mut MaySleep<'_>, page: PageAddr) -> Result<PageIdentity, IdentityError> {
        self.mm.page_identity(cx, page)
    }

    fn cannot_hear(&self) -> &'static [Unheard] {
        &[]
    }
}

/// One thread looks up and lets the device read, while another replaces the memory. The device must never show what was
/// there before a replacement that was complete when the lookup began.
fn lookups_beside_a_replacement(cx: &mut MaySleep<'_>, how: How, registered_before: bool, threads: usize) {
    let machine = Machine::new(softmm::Config::default());
    let user = machine.new_mm().unwrap();
    let mm = Arc::new(Told { mm: user.clone(), how });
    let cache =
        RegistrationCache::new(mm, Pinned { mappings: 4 }, Options { threads, ..options(2) }).unwrap();
    let range = pages(0, 1);
    let look = || {
        let lease = cache.get(range.start() as usize, PAGE_SIZE as usize, Access::Write).ok()?;
        Some(see(&machine, lease.mapping(), range.first_page()))
    };
    map(cx, &user, range, 1);
    if registered_before {
        assert_eq!(look(), Some(1));
    }
    let complete = AtomicU64::new(1);
    scope(cx, |threads, _| {
        threads.spawn("replacer", |cx| {
            user.munmap(cx, range);
            map(cx, &user, range, 2);
            complete.store(2, Ordering::SeqCst);
        });
        threads.spawn("reader", |_| {
            for _ in 0..2 {
                let since = complete.load(Ordering::SeqCst);
                // Nothing is mapped in between, and between munmap and store the page is new, and zero.
                let Some(seen) = look() else { continue };
                assert!(seen >= since || (seen == 0 && since < 2), "sees {seen}, {since} was complete");
            }
        });
    });
    assert_eq!(look(), Some(2));
    drop(cache);
    user.mmput(cx);
    assert_eq!(machine.frames().free_frames(), machine.frames().total_frames(), "a pin was leaked");
}

/// `threads`: how many have lease slots of their own.
fn explored(how: How, registered_before: bool, threads: usize) -> Report {
    let config = Config::new(Strategy::CachedPreemptions(2)).max_time(Duration::from_secs(3));
    explore(&config, |cx| lookups_beside_a_replacement(cx, how, registered_before, threads))
}

#[test]
fn no_order_of_lookup_and_replacement_shows_the_past() {
    for how in [How::Blocks, How::Late] {
        for registered_before in [true, false] {
            for threads in [4, 0] {
                let report = explored(how, registered_before, threads);
                report.assert_ok();
                assert!(report.executions > 100, "only {}", report.executions);
            }
        }
    }
}

#[test]
fn without_a_notifier_an_order_shows_the_past() {
    for registered_before in [true, false] {
        assert!(!explored(How::Never, registered_before, 4).failures.is_empty(), "the control");
    }
}
