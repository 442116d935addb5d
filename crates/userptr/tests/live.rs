// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cache over the running kernel, with an io_uring as the device and as the oracle: WRITE_FIXED writes what the
//! device sees into a memfd. The same cache over a source that never reports anything is the control.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::disturb::{After, Arena, Change, Event, Outcome, catalogue};
use hostmm::kvm::{self, KvmSource};
use hostmm::primary::{HostMm, LiveWatch, Source};
use hostmm::race::{self, Subject};
use hostmm::testing;
use hostmm::uffd::{self, UffdSource};
use mmu_notifier::primary::{CountedBefore, Gone, Invalidate, SubscribeError, Unheard};
use mmu_notifier::{Access, InsideInvalidation, Range};
use userptr::cache::{Options, Reaper};
use userptr::device::io_uring::IoUring;
use userptr::{CacheError, Lease, RegistrationCache};

const DEADLINE: Duration = Duration::from_secs(120);

type Cache<S> = RegistrationCache<HostMm<S>, IoUring>;

fn cache<S: Source + 'static>(source: S, options: Options) -> Cache<S> {
    let mm = Arc::new(HostMm::new(source, 1).unwrap());
    RegistrationCache::new(mm, IoUring::new(64).unwrap(), options).unwrap()
}

fn kvm_source() -> KvmSource {
    KvmSource::open(&kvm::Options { ring: Some(1 << 16), ..kvm::Options::default() }).unwrap()
}

fn uffd_source() -> UffdSource {
    UffdSource::open(&uffd::Options::default()).unwrap()
}

/// A source that hears nothing and says so to nobody.
struct NoNotifier;
struct Silence(Range);

impl Source for NoNotifier {
    type Delivery = CountedBefore;
    type Watch = Silence;
    const FILES: bool = false;
    const CANNOT_HEAR: &'static [Unheard] = &[];

    fn watch(&self, range: Range, _: Option<Arc<dyn Invalidate>>) -> Result<Silence, SubscribeError> {
        Ok(Silence(range))
    }
}

impl LiveWatch for Silence {
    type Seq = ();

    fn range(&self) -> Range {
        self.0
    }

    fn snapshot(&self) -> Result<(), Gone> {
        Ok(())
    }

    fn changed_since(&self, (): ()) -> bool {
        false
    }

    fn unsubscribe(&self) -> Result<(), InsideInvalidation> {
        Ok(())
    }
}

fn has(capabilities: &[Capability]) -> bool {
    capabilities.iter().all(|c| testing::require(*c))
}

fn has_kvm() -> bool {
    has(&[Capability::DevKvm, Capability::Bpf, Capability::IoUring])
}

fn has_uffd() -> bool {
    has(&[Capability::Userfaultfd, Capability::IoUring])
}

fn get<S: Source + 'static>(
    cache: &Cache<S>,
    range: Range,
) -> Result<Lease<'_, HostMm<S>, IoUring>, CacheError> {
    cache.get(range.start() as usize, range.len() as usize, Access::Write)
}

/// What the device sees in the first word.
fn see<S: Source + 'static>(cache: &Cache<S>, lease: &Lease<'_, HostMm<S>, IoUring>) -> u64 {
    let file = File::from(rustix::fs::memfd_create("seen", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    assert_eq!(cache.device().write_at(&file, 0, lease).unwrap(), lease.len());
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 0).unwrap();
    u64::from_ne_bytes(word)
}

/// How a device fares at its next use of the page.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Right,
    Stale,
    Refused,
}

fn after<S: Source + 'static>(cache: &Cache<S>, event: &Event, arena: &mut Arena) -> Option<Found> {
    let mut scene = event.setup(arena).unwrap();
    let watched = scene.watched();
    let lease = match get(cache, watched) {
        Ok(lease) => lease,
        Err(e) => {
            assert_eq!(event.expect.pinned, Outcome::NotMappable, "{}: {e}", event.name);
            return None;
        }
    };
    assert_eq!(see(cache, &lease), scene.before(), "{}", event.name);
    drop(lease);
    if scene.disturb(&mut || ()).unwrap() == Change::Refused {
        return None;
    }
    Some(match (get(cache, watched), scene.after()) {
        (Err(_), After::Faults) => Found::Refused,
        (Ok(lease), After::Stamp(stamp)) if see(cache, &lease) == stamp => Found::Right,
        (Ok(_), _) => Found::Stale,
        (Err(e), After::Stamp(_)) => panic!("{}: {e}", event.name),
    })
}

/// The events of these names, each over a cache of its own.
fn stays_right<S: Source + 'static>(events: &[&str], open: impl Fn() -> S) {
    let mut arena = Arena::new(testing::scratch(env!("CARGO_TARGET_TMPDIR")));
    let mut seen = 0;
    for event in catalogue().into_iter().filter(|e| events.iter().any(|name| e.name.starts_with(name))) {
        let cache = cache(open(), Options::default());
        let Some(found) = after(&cache, event, &mut arena) else { continue };
        assert_ne!(found, Found::Stale, "{}", event.name);
        seen += 1;
    }
    assert!(seen > 0, "none of {events:?} happened");
}

fn control_is_stale(events: &[&str]) {
    let mut arena = Arena::new(testing::scratch(env!("CARGO_TARGET_TMPDIR")));
    for event in catalogue().into_iter().filter(|e| events.iter().any(|name| e.name.starts_with(name))) {
        let cache = cache(NoNotifier, Options::default());
        let found = after(&cache, event, &mut arena);
        assert_eq!(found == Some(Found::Stale), event.expect.pinned.is_stale(), "{}: {found:?}", event.name);
    }
}

const UNMAPS: &[&str] = &["munmap", "free_large", "map_fixed", "brk", "mremap"];

#[test]
fn kvm_hears_of_what_is_unmapped() {
    if has_kvm() {
        testing::in_child("kvm_hears_of_what_is_unmapped", DEADLINE, || stays_right(UNMAPS, kvm_source));
    }
}

#[test]
fn uffd_hears_of_what_is_unmapped() {
    if has_uffd() {
        testing::in_child("uffd_hears_of_what_is_unmapped", DEADLINE, || stays_right(UNMAPS, uffd_source));
    }
}

#[test]
fn without_a_notifier_what_is_unmapped_is_stale() {
    if has(&[Capability::IoUring]) {
        testing::in_child("without_a_notifier_what_is_unmapped_is_stale", DEADLINE, || {
            control_is_stale(UNMAPS)
        });
    }
}

/// Any hit is stale: the page was never asked for since it was mapped.
struct Raced<S: Source + 'static>(Cache<S>);

impl<S: Source + 'static> Subject for Raced<S> {
    type Token = Range;

    fn take(&self, range: Range) -> Result<Range, String> {
        get(&self.0, range).map(|_| range).map_err(|e| e.to_string())
    }

    fn is_current(&self, range: &Range) -> bool {
        self.0.lookup(range.start() as usize, range.len() as usize, Access::Write).is_some()
    }
}

fn races<S: Source + 'static>(open: impl Fn() -> S) -> u64 {
    let options = || Options { reaper: Reaper::Thread, ..Options::default() };
    let mut stale = 0;
    for way in [race::Way::Munmap, race::Way::Mremap] {
        stale += race::reuse(&Raced(cache(open(), options())), way, 300, 0).unwrap().stale;
    }
    stale
}

#[test]
fn b6_02_an_address_that_is_mapped_while_another_thread_unmaps_it() {
    if has_kvm() && has_uffd() {
        testing::in_child("b6_02_an_address_that_is_mapped_while_another_thread_unmaps_it", DEADLINE, || {
            assert!(races(|| NoNotifier) > 500, "the control");
            assert_eq!(races(kvm_source), 0);
            assert_eq!(races(uffd_source), 0);
        });
    }
}

#[test]
fn a_file_is_read_into_borrowed_memory_and_written_from_it() {
    if !has(&[Capability::IoUring]) {
        return;
    }
    testing::in_child("a_file_is_read_into_borrowed_memory_and_written_from_it", DEADLINE, || {
        let mm = userptr::source::open_mm(1).unwrap();
        let cache = RegistrationCache::new(mm, IoUring::new(8).unwrap(), Options::default()).unwrap();
        let file = File::from(rustix::fs::memfd_create("data", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let data: Vec<u8> = (0..100_000_u32).map(|n| (n * 7) as u8).collect();
        let written = cache.device().write_at(&file, 0, cache.lease(&data).unwrap().lease()).unwrap();
        assert_eq!(written, data.len());
        let mut buffer = vec![0; 60_000];
        let (left, right) = buffer.split_at_mut(29_999);
        let (mut left, mut right) = (cache.lease_mut(left).unwrap(), cache.lease_mut(right).unwrap());
        let results = cache.device().scope(|io| {
            io.read(file.as_fd(), 5, &mut left);
            io.read(file.as_fd(), 50_000, &mut right);
        });
        let results: Vec<usize> = results.unwrap().into_iter().map(Result::unwrap).collect();
        assert_eq!(results, [29_999, 30_001]);
        drop((left, right));
        assert_eq!((&buffer[..29_999], &buffer[29_999..]), (&data[5..30_004], &data[50_000..80_001]));

        let other = IoUring::new(8).unwrap();
        let mut lease = cache.lease_mut(&mut buffer).unwrap();
        let error = other.read_at(&file, 0, &mut lease).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "a slot of another ring");
    });
}
