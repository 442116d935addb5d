// SPDX-License-Identifier: MIT OR Apache-2.0
//! perf_event_open(2) for tracepoints: an event to hang a BPF program on, and rings to read.

use super::map::Mapping;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use interleave::{Ordering, fence};

/// The head of a ring, which the kernel writes.
#[expect(clippy::disallowed_types, reason = "a word of the ring, in memory shared with the kernel")]
type Head = std::sync::atomic::AtomicU64;

const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_SAMPLE_RAW: u64 = 1 << 10;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 1 << 3;
const PERF_EVENT_IOC_ENABLE: libc::Ioctl = 0x2400;
const PERF_EVENT_IOC_SET_FILTER: libc::Ioctl = 0x4008_2406;
const PERF_EVENT_IOC_SET_BPF: libc::Ioctl = 0x4004_2408;
const ATTR_DISABLED: u64 = 1;
/// `wakeup_events` is a watermark in bytes.
const ATTR_WATERMARK: u64 = 1 << 14;
/// Offset of `data_head` in struct perf_event_mmap_page.
const DATA_HEAD: usize = 1024;
/// `type` of struct perf_event_header.
const PERF_RECORD_SAMPLE: u32 = 9;
const PAGE: usize = 4096;

/// struct perf_event_attr up to `config2` (PERF_ATTR_SIZE_VER0 and 1; the kernel takes any known size).
#[repr(C)]
#[derive(Default)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
    config2: u64,
}

fn open(attr: &Attr, cpu: i32) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is a perf_event_attr of the size that it says; pid -1 and no group.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the call just returned; descriptors fit an i32.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn attr(tracepoint: u64) -> Attr {
    Attr { kind: PERF_TYPE_TRACEPOINT, size: size_of::<Attr>() as u32, config: tracepoint, ..Attr::default() }
}

/// An event of `tracepoint` that never counts: a place to attach a program to.
///
/// Opening it makes the tracepoint call perf's probe on every CPU, and a program attached to it belongs to the
/// tracepoint's own array, which the probe runs whatever CPU the event was opened on and whether or not the event is
/// enabled. Left disabled it is on no CPU's list, so the probe stops after the program.
pub(crate) fn attach_point(tracepoint: u64) -> io::Result<OwnedFd> {
    open(&Attr { flags: ATTR_DISABLED, ..attr(tracepoint) }, 0)
}

/// A breakpoint at `offset` of the file at `path`, in every process that maps it, until the descriptor is closed.
pub(crate) fn uprobe(path: &std::ffi::CStr, offset: u64) -> io::Result<OwnedFd> {
    let kind = std::fs::read_to_string("/sys/bus/event_source/devices/uprobe/type")?;
    let kind = kind.trim().parse().map_err(io::Error::other)?;
    let config1 = path.as_ptr() as u64;
    open(&Attr { kind, size: size_of::<Attr>() as u32, config1, config2: offset, ..Attr::default() }, 0)
}

/// Attaches the program `prog` to `event`.
pub(crate) fn set_bpf(event: BorrowedFd<'_>, prog: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument is a descriptor, not a pointer.
    if unsafe { libc::ioctl(event.as_raw_fd(), PERF_EVENT_IOC_SET_BPF, prog.as_raw_fd()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Keeps `event` alive without its descriptor: the mapping of its control page holds the file.
pub(crate) fn keep(event: BorrowedFd<'_>) -> io::Result<Mapping> {
    Mapping::shared(event, PAGE, libc::PROT_READ, 0)
}

/// One CPU's ring of tracepoint records, mapped read-only: the kernel overwrites the oldest and never waits.
#[derive(Debug)]
pub(crate) struct Ring {
    map: Mapping,
    data_len: u64,
}

impl Ring {
    /// A ring of `pages` (a power of two) data pages for `tracepoint` on `cpu`; `filter` in the tracepoint's filter
    /// language. `wakes`: whoever polls the descriptor is woken by each record; otherwise as seldom as can be, since a
    /// wakeup is dear even where nobody waits. The descriptor is needed to wait, not to read.
    pub(crate) fn open(
        tracepoint: u64,
        cpu: i32,
        pages: usize,
        filter: Option<&str>,
        wakes: bool,
    ) -> io::Result<(Ring, OwnedFd)> {
        let attr = Attr {
            flags: if wakes { ATTR_DISABLED } else { ATTR_DISABLED | ATTR_WATERMARK },
            sample_period: 1,
            sample_type: PERF_SAMPLE_RAW,
            wakeup_events: if wakes { 1 } else { (PAGE * pages) as u32 },
            ..attr(tracepoint)
        };
        let fd = open(&attr, cpu)?;
        if let Some(filter) = filter {
            let text = CString::new(filter).map_err(io::Error::other)?;
            // SAFETY: a NUL-terminated string that outlives the call.
            if unsafe { libc::ioctl(fd.as_raw_fd(), PERF_EVENT_IOC_SET_FILTER, text.as_ptr()) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        let map = Mapping::shared(std::os::fd::AsFd::as_fd(&fd), PAGE * (1 + pages), libc::PROT_READ, 0)?;
        // SAFETY: the request takes no pointer.
        if unsafe { libc::ioctl(fd.as_raw_fd(), PERF_EVENT_IOC_ENABLE, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((Ring { map, data_len: (PAGE * pages) as u64 }, fd))
    }

    /// Bytes ever written; moves with every record, also with those that overwrite others.
    #[inline]
    pub(crate) fn head(&self) -> &Head {
        // SAFETY: data_head lies in the control page, 8-byte aligned, mapped for as long as `self` lives, and both
        // sides access it as one word.
        unsafe { self.map.ptr().add(DATA_HEAD).cast::<Head>().as_ref() }
    }

    /// The records written since `tail`, as raw tracepoint data, oldest first. `None` if any was lost or
    /// overwritten. Moves `tail` to the head either way.
    pub(crate) fn read(&self, tail: &mut u64) -> Option<Vec<Vec<u8>>> {
        let head = self.head().load(Ordering::Acquire);
        let from = std::mem::replace(tail, head);
        if head.wrapping_sub(from) > self.data_len {
            return None;
        }
        let bytes: Vec<u8> = (from..head).map(|at| self.byte(at)).collect();
        // Order the copy before the second look at the head. A record is written before the head is moved over it,
        // and may overwrite what was copied; leave room for a few such records in flight.
        fence(Ordering::Acquire);
        let now = self.head().load(Ordering::Acquire);
        if now.wrapping_sub(from) > self.data_len.saturating_sub(IN_FLIGHT) {
            return None;
        }
        parse(&bytes)
    }

    fn byte(&self, at: u64) -> u8 {
        let offset = PAGE + (at % self.data_len) as usize;
        // SAFETY: `offset` lies inside the data pages. The kernel may write the byte meanwhile; the read is volatile
        // and what was overwritten is thrown away by the caller, who compares the head again.
        unsafe { self.map.ptr().add(offset).as_ptr().read_volatile() }
    }
}

/// Room for records that are being written while the head still stands before them: one per nesting level.
const IN_FLIGHT: u64 = 1024;

/// Splits perf records into the raw data of their samples. `None` if one is not what was asked for.
fn parse(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let u32_at = |b: &[u8], at: usize| Some(u32::from_ne_bytes(b.get(at..at + 4)?.try_into().ok()?));
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let kind = u32_at(bytes, 0)?;
        let size = usize::from(u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?));
        let record = bytes.get(..size).filter(|r| r.len() >= 8)?;
        if kind != PERF_RECORD_SAMPLE {
            return None;
        }
        let raw = u32_at(record, 8)? as usize;
        out.push(record.get(12..12 + raw)?.to_vec());
        bytes = &bytes[size..];
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(raw: &[u8]) -> Vec<u8> {
        let mut r = Vec::new();
        r.extend(PERF_RECORD_SAMPLE.to_ne_bytes());
        r.extend(0u16.to_ne_bytes());
        r.extend(u16::try_from(12 + raw.len()).unwrap().to_ne_bytes());
        r.extend(u32::try_from(raw.len()).unwrap().to_ne_bytes());
        r.extend(raw);
        r
    }

    #[test]
    fn records_are_split_and_anything_odd_is_a_loss() {
        let two = [sample(&[1, 2, 3, 4]), sample(&[5, 6, 7, 8])].concat();
        assert_eq!(parse(&two).unwrap(), vec![vec![1, 2, 3, 4], vec![5, 6, 7, 8]]);
        assert_eq!(parse(&[]).unwrap(), Vec::<Vec<u8>>::new());
        assert!(parse(&two[..two.len() - 1]).is_none());
        let mut lost = two.clone();
        lost[0] = 2;
        assert!(parse(&lost).is_none());
        let mut zero = two;
        zero[6] = 0;
        assert!(parse(&zero).is_none());
    }

    #[test]
    fn the_attribute_is_of_a_size_that_the_kernel_knows() {
        assert_eq!(size_of::<Attr>(), 72);
    }
}
