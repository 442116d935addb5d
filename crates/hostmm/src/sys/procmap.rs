// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ioctl `PROCMAP_QUERY` on `/proc/PID/maps` (Linux 6.11).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `_IOWR('f', 17, struct procmap_query)`
const PROCMAP_QUERY: libc::Ioctl = ioctl_number(17, size_of::<Query>()) as libc::Ioctl;

pub(crate) const READABLE: u64 = 0x1;
pub(crate) const WRITABLE: u64 = 0x2;
pub(crate) const EXECUTABLE: u64 = 0x4;
pub(crate) const SHARED: u64 = 0x8;
const COVERING_OR_NEXT: u64 = 0x10;

pub(super) const fn ioctl_number(nr: u64, size: usize) -> u64 {
    (3 << 30) | ((size as u64) << 16) | ((b'f' as u64) << 8) | nr
}

/// `struct procmap_query`; the first field lets the kernel extend it.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// A mapping.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) flags: u64,
    pub(crate) offset: u64,
    pub(crate) inode: u64,
    pub(crate) dev: (u32, u32),
    pub(crate) name: Vec<u8>,
}

/// The mapping that holds `addr` or the next one above.
///
/// # Errors
/// ENOTTY where the kernel does not know the ioctl, ESRCH if the process is gone.
pub(crate) fn query(maps: &File, addr: u64) -> io::Result<Option<Found>> {
    let mut name = vec![0_u8; libc::PATH_MAX as usize];
    let mut q = Query {
        size: size_of::<Query>() as u64,
        query_flags: COVERING_OR_NEXT,
        query_addr: addr,
        vma_name_size: name.len() as u32,
        vma_name_addr: name.as_mut_ptr() as u64,
        ..Query::default()
    };
    // SAFETY: q is a procmap_query of the size that it states; the kernel writes it and at most vma_name_size bytes
    // to name, which outlives the call.
    if unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut q) } < 0 {
        let e = io::Error::last_os_error();
        return if e.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(e) };
    }
    // The size that comes back counts the terminating zero; it is 0 where there is no name.
    name.truncate((q.vma_name_size as usize).saturating_sub(1));
    Ok(Some(Found {
        start: q.vma_start,
        end: q.vma_end,
        flags: q.vma_flags,
        offset: q.vma_offset,
        inode: q.inode,
        dev: (q.dev_major, q.dev_minor),
        name,
    }))
}
