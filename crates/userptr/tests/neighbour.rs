// SPDX-License-Identifier: MIT OR Apache-2.0
//! Wide changes, which the kvm source also counts of other processes' VMs: who is told, and who need not be.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use common::memory::{ANON, Memory};
use common::{DEADLINE, cache, eventually, get, has_kvm, kvm_source, see};
use hostmm::kvm::{self, KvmSource, Notice};
use hostmm::primary::HostMm;
use hostmm::testing;
use interleave::{AtomicU64, Ordering};
use mmu_notifier::{Access, PAGE_SIZE, Range};
use userptr::cache::{Options, RegistrationCache};
use userptr::device::cpu::Cpu;

const MIB: u64 = 1 << 20;
/// Twice what the default buckets call wide, in pages.
const WIDE: u64 = 8 * MIB / PAGE_SIZE;

/// Another process with a VM of its own, in which it maps and unmaps what it is asked to.
struct Neighbour(UnixStream);

impl Neighbour {
    /// To be started while there is one thread and nothing where it is asked to map.
    fn start() -> Neighbour {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // SAFETY: the child does what it is asked to and leaves by _exit.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            drop(ours);
            let done = std::panic::catch_unwind(|| Neighbour::serve(theirs));
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(i32::from(done.is_err())) };
        }
        Neighbour(ours)
    }

    fn serve(mut socket: UnixStream) {
        let _vm = KvmSource::open(&kvm::Options { buckets: None, ..kvm::Options::default() }).unwrap();
        let mut words = [0_u8; 16];
        // The test is over when nobody asks any more.
        while socket.read_exact(&mut words).is_ok() {
            let (at, times) = words.split_at(8);
            let [at, times] = [at, times].map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
            (0..times).for_each(|_| Memory::map(at, WIDE, ANON, None).unwrap().unmap());
            socket.write_all(&[1]).unwrap();
        }
    }

    /// Returns when it has been done.
    fn unmaps(&mut self, at: u64, times: u64) {
        self.0.write_all(&[at.to_ne_bytes(), times.to_ne_bytes()].concat()).unwrap();
        self.0.read_exact(&mut [0]).unwrap();
    }
}

/// Addresses that the kernel gives nobody who does not ask for them, and no other test of this machine: no two of them
/// share a bucket.
fn quiet_place() -> Range {
    let place = u64::from(std::process::id()) % 4096;
    Range::new((1 << 45) + (place << 34), 64 * MIB).unwrap()
}

#[test]
fn a_wide_change_elsewhere_costs_no_registration() {
    if !has_kvm() {
        return;
    }
    testing::in_child("a_wide_change_elsewhere_costs_no_registration", DEADLINE, || {
        let place = quiet_place();
        let mut neighbour = Neighbour::start();
        // Room for all records that there can be: nobody is told of everything because some were lost.
        let options = kvm::Options {
            prefer: kvm::Prefer::Bpf,
            window: Some(place),
            ring: Some(1 << 21),
            ..kvm::Options::default()
        };
        let mm = Arc::new(HostMm::new(KvmSource::open(&options).unwrap(), 1).unwrap());
        let cache = RegistrationCache::new(Arc::clone(&mm), Cpu::new(), Options::default()).unwrap();
        let pages = 1024;
        let ours = Memory::map(place.start() + 16 * MIB, pages, ANON, None).unwrap();
        ours.fill(1);
        let half = |first: u64| Range::new(ours.page(first).start(), pages / 2 * PAGE_SIZE).unwrap();
        // What really concerned each half, by whatever there is on this machine that moves pages.
        let halves = [0, pages / 2].map(|first| {
            let told = Arc::new(AtomicU64::new(0));
            let counter = Arc::clone(&told);
            let count = move |notice: &Notice| {
                assert!(matches!(notice, Notice::Range(_)), "{notice:?}");
                counter.fetch_add(1, Ordering::SeqCst);
            };
            (mm.source().subscribe(half(first), count).unwrap(), told)
        });
        let look_at_all = || {
            for page in ours.0.iter_pages() {
                drop(cache.get(page.get() as usize, 1, Access::Write).unwrap());
            }
            cache.stats().unwrap().registered
        };
        let explained = |registered: u64| {
            // Who is counted is told a little later.
            eventually("more is registered than was changed", || {
                let told = halves.iter().map(|(_, told)| told.load(Ordering::SeqCst)).sum::<u64>();
                registered <= pages + told * pages / 2
            });
        };
        explained(look_at_all());
        // Not on a boundary of anything but pages, as most mappings.
        let elsewhere = place.start() + 24 * MIB + 3 * PAGE_SIZE;
        for _ in 0..10 {
            neighbour.unmaps(elsewhere, 1000);
            explained(look_at_all());
        }

        // The same addresses in the neighbour: nobody can tell, so that half, and only that, is registered again.
        let before = cache.stats().unwrap().registered;
        neighbour.unmaps(half(pages / 2).start(), 1);
        let after = look_at_all();
        assert!(after >= before + pages / 2, "{before} and then {after}");
        explained(after);
    });
}

#[test]
fn a_wide_change_of_our_own_is_seen_to_its_last_page() {
    if !has_kvm() {
        return;
    }
    testing::in_child("a_wide_change_of_our_own_is_seen_to_its_last_page", DEADLINE, || {
        let cache = cache(kvm_source(), Options::default());
        let room = Memory::map(0, WIDE + 3000, ANON, None).unwrap();
        for round in 1..40 {
            // Another offset from the granules each time.
            let (first, pages) = (round * 71, WIDE - round * 13);
            let change = Range::new(room.page(first).start(), pages * PAGE_SIZE).unwrap();
            let looked = [first, first + 1, first + pages / 2, first + pages - 2, first + pages - 1];
            for page in looked {
                // SAFETY: memory of the test's own, to which no reference exists.
                unsafe { (room.page(page).start() as *mut u64).write_volatile(round) };
                assert_eq!(see(&cache, &get(&cache, room.page(page)).unwrap()), round);
            }
            room.madvise(change, libc::MADV_DONTNEED).unwrap();
            for page in looked {
                assert_eq!(
                    see(&cache, &get(&cache, room.page(page)).unwrap()),
                    0,
                    "page {page} of {change:?}"
                );
            }
        }
    });
}
