// SPDX-License-Identifier: MIT OR Apache-2.0
//! Owned leases: they go where borrowed ones cannot, and the cache goes when the last of them has gone.

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use common::memory::{Memory, memfd};
use common::{Cache, DEADLINE, cache, eventually, kvm_source, over_both, see, uffd_source};
use hostmm::primary::Source;
use hostmm::testing;
use interleave::{MaySleep, spawn};
use mmu_notifier::Access;
use userptr::CacheError;
use userptr::cache::{Options, OwnedLease, VecLease};
use userptr::device::io_uring::IoUring;

#[test]
fn an_owned_lease_outlives_its_handle_and_moves_between_threads() {
    fn body<S: Source + 'static>(source: S) {
        let cache = Arc::new(cache(source, Options::default()));
        let memory = Memory::stamped(2, 7);
        let (addr, len) = (memory.0.start() as usize, memory.0.len() as usize);
        let lease = cache.get_owned(addr, len, Access::Write).unwrap();
        let again = cache.get_owned(addr, 8, Access::Read).unwrap();
        assert_eq!(cache.stats().unwrap().hits, 1, "an owned lease hits as a borrowed one does");
        let alive = Arc::downgrade(&cache);
        drop(cache);
        let user = spawn("user", move |_| {
            assert_eq!(see(lease.cache(), lease.lease()), 7);
            lease
        });
        let lease = MaySleep::enter(|cx| user.join(cx)).unwrap();
        memory.unmap();
        assert!(!lease.lease().is_current() && see(again.cache(), again.lease()) == 7, "the pages are kept");
        drop(again);
        assert!(lease.cache().device().pinned_bytes() > 0 && alive.upgrade().is_some());
        drop(lease);
        assert!(alive.upgrade().is_none(), "the cache goes with its last lease");
    }
    over_both(
        "an_owned_lease_outlives_its_handle_and_moves_between_threads",
        || body(kvm_source()),
        || body(uffd_source()),
    );
}

/// A read that is begun when it is first polled, and done at the second.
struct Read<S: Source + 'static> {
    lease: Option<VecLease<hostmm::primary::HostMm<S>, IoUring>>,
    file: Arc<File>,
    offset: u64,
    polled: bool,
}

impl<S: Source + 'static> Future for Read<S> {
    type Output = Vec<u8>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Vec<u8>> {
        if !std::mem::replace(&mut self.polled, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let (file, offset) = (Arc::clone(&self.file), self.offset);
        let mut lease = self.lease.take().expect("polled once too often");
        let cache = Arc::clone(lease.cache());
        cache.device().read_at(&file, offset, &mut lease).unwrap();
        Poll::Ready(lease.into_bytes())
    }
}

#[test]
fn futures_hold_leases_across_their_polls() {
    fn body<S: Source + 'static>(source: S) {
        let cache: Arc<Cache<S>> = Arc::new(cache(source, Options::default()));
        let file = Arc::new(memfd());
        let data: Vec<u8> = (0..100_000_u32).map(|n| (n * 7) as u8).collect();
        file.write_all_at(&data, 0).unwrap();
        let mut reads: Vec<Pin<Box<dyn Future<Output = Vec<u8>> + Send>>> = (0..8)
            .map(|n| {
                let lease = cache.lease_vec(vec![0; 10_000]).unwrap();
                let (lease, file, offset) = (Some(lease), Arc::clone(&file), n * 10_000);
                Box::pin(Read { lease, file, offset, polled: false })
                    as Pin<Box<dyn Future<Output = _> + Send>>
            })
            .collect();
        drop(cache);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(reads.iter_mut().all(|read| read.as_mut().poll(&mut cx).is_pending()));
        for (n, read) in reads.iter_mut().enumerate() {
            let Poll::Ready(bytes) = read.as_mut().poll(&mut cx) else { panic!("not at the second poll") };
            assert!(bytes[..] == data[n * 10_000..(n + 1) * 10_000]);
        }
    }
    over_both("futures_hold_leases_across_their_polls", || body(kvm_source()), || body(uffd_source()));
}

#[test]
fn a_vector_comes_back_whatever_happens() {
    if !common::has_uffd() {
        return;
    }
    testing::in_child("a_vector_comes_back_whatever_happens", DEADLINE, || {
        let cache = Arc::new(cache(uffd_source(), Options { entries: 1, ..Options::default() }));
        let refused = cache.lease_vec(Vec::new()).err().unwrap();
        assert!(matches!(refused.error, CacheError::Range(_)) && refused.bytes.is_empty());
        let one = cache.lease_vec(vec![1; 5000]).unwrap();
        let refused = cache.lease_vec(vec![2; 5000]).err().unwrap();
        assert!(matches!(refused.error, CacheError::Full { .. }) && refused.bytes == [2; 5000]);
        let file = memfd();
        let written = cache.device().scope(|io| io.write(file.as_fd(), 0, one.lease())).unwrap();
        assert_eq!(written[0].as_ref().unwrap(), &5000);
        let mut one = one;
        one.bytes_mut()[0] = 3;
        assert_eq!((one.bytes()[0], one.into_bytes().len()), (3, 5000));
        eventually("there is room", || cache.lease_vec(vec![2; 5000]).is_ok());
    });
}

/// Compiles: an owned lease goes to other threads, for as long as they like.
#[expect(dead_code, reason = "it need only compile")]
fn goes_anywhere<S: Source + 'static>(
    lease: OwnedLease<hostmm::primary::HostMm<S>, IoUring>,
) -> impl Send + 'static {
    lease
}
