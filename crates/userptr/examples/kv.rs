// SPDX-License-Identifier: MIT OR Apache-2.0
//! A key-value store whose values are read from disk straight into ordinary vectors: `cargo run --example kv`
//!
//! The store appends values to a file and remembers where. A value that is read lands in memory that `Vec` got from
//! the allocator: no pool, no copy. Programs that cache registrations by address cannot do that, since the allocator unmaps
//! and reuses addresses as it likes; here the cache is told by the kernel.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::error::Error;
use std::fs::File;
use std::io;
use std::sync::Arc;

use hostmm::primary::{HostMm, Source};
use userptr::cache::{Admit, Options};
use userptr::device::io_uring::IoUring;
use userptr::source::{self, AnySource};
use userptr::{CacheError, RegistrationCache};

/// What registers the values.
pub(crate) type Cache<S = AnySource> = RegistrationCache<HostMm<S>, IoUring>;

/// Where a value is.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    len: usize,
}

/// See the module.
pub(crate) struct Store<S: Source + 'static = AnySource> {
    file: File,
    end: u64,
    index: HashMap<String, Place>,
    cache: Arc<Cache<S>>,
}

/// What the store can fail with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The memory cannot be leased.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The file cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The end came early.
    #[error("the file holds fewer bytes than were put into it")]
    Short,
}

/// A cache for stores to share.
pub(crate) fn cache_of<S: Source + 'static>(mm: Arc<HostMm<S>>) -> Result<Arc<Cache<S>>, Box<dyn Error>> {
    // Small values come and go with the allocator: only what is asked for again is worth a registration.
    let options = Options { admit: Admit::SecondUse { or_bytes: 64 << 10 }, ..Options::default() };
    Ok(Arc::new(RegistrationCache::new(mm, IoUring::new(1024)?, options)?))
}

impl<S: Source + 'static> Store<S> {
    /// An empty store in `file`.
    pub(crate) fn new(file: File, cache: Arc<Cache<S>>) -> Store<S> {
        Store { file, end: 0, index: HashMap::new(), cache }
    }

    /// Puts a value, which the device reads where it lies.
    pub(crate) fn put(&mut self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let place = Place { offset: self.end, len: value.len() };
        if !value.is_empty() {
            let lease = self.cache.lease(value)?;
            if self.cache.device().write_at(&self.file, place.offset, lease.lease())? < value.len() {
                return Err(StoreError::Short);
            }
        }
        self.end += value.len() as u64;
        self.index.insert(key.to_owned(), place);
        Ok(())
    }

    /// Gets a value, which the device writes where the vector lies.
    pub(crate) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(place) = self.index.get(key) else { return Ok(None) };
        let mut value = vec![0; place.len];
        if place.len > 0 {
            let mut lease = self.cache.lease_mut(&mut value)?;
            if self.cache.device().read_at(&self.file, place.offset, &mut lease)? < place.len {
                return Err(StoreError::Short);
            }
        }
        Ok(Some(value))
    }

    /// What registers the values.
    pub(crate) fn cache(&self) -> &Cache<S> {
        &self.cache
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::temp_dir().join(format!("userptr-kv-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    let mut store = Store::new(file, cache_of(source::open_mm(1)?)?);
    for n in 0..100_usize {
        store.put(&format!("key {n}"), &vec![n as u8; 1000 * (n + 1)])?;
    }
    for round in 0..10 {
        for n in 0..100_usize {
            let value = store.get(&format!("key {n}"))?.ok_or("it was put")?;
            assert!(value.len() == 1000 * (n + 1) && value.iter().all(|b| *b == n as u8), "round {round}");
        }
    }
    println!("source {}: {:?}", store.cache().mm().source(), store.cache().stats()?);
    Ok(())
}
