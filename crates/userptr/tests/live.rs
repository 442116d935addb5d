// SPDX-License-Identifier: MIT OR Apache-2.0
//! The safe face over the running kernel: files into borrowed memory and back.

mod common;

use std::os::fd::AsFd;

use common::memory::memfd;
use common::{DEADLINE, has};
use hostmm::capability::Capability;
use hostmm::testing;
use userptr::RegistrationCache;
use userptr::cache::Options;
use userptr::device::io_uring::IoUring;

#[test]
fn a_file_is_read_into_borrowed_memory_and_written_from_it() {
    if !has(&[Capability::IoUring]) {
        return;
    }
    testing::in_child("a_file_is_read_into_borrowed_memory_and_written_from_it", DEADLINE, || {
        let mm = userptr::source::open_mm(1).unwrap();
        let cache = RegistrationCache::new(mm, IoUring::new(8).unwrap(), Options::default()).unwrap();
        let file = memfd();
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
