// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies a file through an io_uring and ordinary memory: `cargo run --example copy -- FROM TO`
//!
//! Two halves of one buffer take turns: while the device writes one it reads the other. The buffer is registered
//! once; each later use costs some tens of nanoseconds and the question whether it is still the same memory.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use userptr::cache::Options;
use userptr::device::io_uring::IoUring;
use userptr::{RegistrationCache, source};

const BLOCK: usize = 256 << 10;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(from), Some(to)) = (args.next(), args.next()) else {
        return Err("usage: copy FROM TO".into());
    };
    let bytes = copy(from.as_ref(), to.as_ref())?;
    println!("{bytes} bytes");
    Ok(())
}

/// Copies, and says how many bytes.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<u64, Box<dyn Error>> {
    let (from, to) = (File::open(from)?, File::create(to)?);
    let cache = RegistrationCache::new(source::open_mm(1)?, IoUring::new(16)?, Options::default())?;
    let mut buffer = vec![0_u8; 2 * BLOCK];
    let (mut full, mut empty) = buffer.split_at_mut(BLOCK);
    let mut done = 0;
    let mut read = cache.device().read_at(&from, 0, &mut cache.lease_mut(full)?)?;
    while read > 0 {
        let out = cache.lease(&full[..read])?;
        let mut into = cache.lease_mut(empty)?;
        let mut results = cache.device().scope(|io| {
            io.write(to.as_fd(), done, out.lease());
            io.read(from.as_fd(), done + read as u64, &mut into);
        })?;
        let (next, written) = (results.pop(), results.pop());
        let written = written.ok_or("two transfers")??;
        if written < read {
            return Err(format!("{written} of {read} bytes were written: is the disk full?").into());
        }
        drop((out, into));
        done += read as u64;
        read = next.ok_or("two transfers")??;
        (full, empty) = (empty, full);
    }
    Ok(done)
}
