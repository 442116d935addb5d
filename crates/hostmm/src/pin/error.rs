// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a range is not pinned. io_uring says EFAULT to most of it; the mappings tell the rest.

use std::ffi::OsString;
use std::io;

use interleave::AtomicContext;
use mmu_notifier::{Access, GupError, Range};

use super::{MAX_PIN, MAX_SLOTS};
use crate::page::{Maps, PidOrSelf, Vma};

/// Why a range is not pinned, or a pin not usable.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// io_uring cannot be used at all.
    #[error("io_uring is not available: {how} ({source})")]
    NoRing {
        /// What to do about it.
        how: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The ring belongs to the parent: what the device sees are the parent's pages.
    #[error("this pin was made before fork and holds the parent's pages: make another Pinner in the child")]
    Forked,
    /// No table has such slots.
    #[error("slots [{first}, +{slots}) lie outside any buffer table, which has at most {MAX_SLOTS}")]
    NoTable {
        /// The first slot that was to be ours.
        first: u32,
        /// How many.
        slots: u32,
    },
    /// Every slot of the table holds a pin.
    #[error(
        "all {slots} slots of the buffer table hold pins: drop one, or make a Pinner with more (at most 16384)"
    )]
    NoSlot {
        /// Size of the table.
        slots: u32,
    },
    /// Longer than a slot may be.
    #[error("{0} is longer than the {MAX_PIN} bytes (1 GiB) that a slot can hold: pin it in parts")]
    TooLong(Range),
    /// `RLIMIT_MEMLOCK` would be exceeded.
    #[error(
        "pinning {range} exceeds RLIMIT_MEMLOCK ({}): unpin something, raise the limit, or give CAP_IPC_LOCK",
        limit.map_or("unlimited, so the kernel is out of memory".to_owned(), |l| format!("{l} bytes for the user"))
    )]
    MemlockLimit {
        /// What was to be pinned.
        range: Range,
        /// The limit in bytes, for all pins and rings of the user together.
        limit: Option<u64>,
    },
    /// Part of it is not mapped.
    #[error("{range} cannot be pinned: nothing is mapped at {hole}")]
    Unmapped {
        /// What was to be pinned.
        range: Range,
        /// The first hole in it.
        hole: Range,
    },
    /// A private mapping that may not be written. A pin is for reading and writing (FOLL_WRITE).
    #[error(
        "{range} cannot be pinned: {part} is not writable; mprotect it to PROT_READ|PROT_WRITE while pinning"
    )]
    NotWritable {
        /// What was to be pinned.
        range: Range,
        /// The first mapping in it that refuses.
        part: Range,
    },
    /// A shared mapping of a file in a file system that writes back: a long-term pin would write to pages behind its
    /// back (FOLL_LONGTERM, Linux 6.5 and earlier by another check).
    #[error(
        "{range} cannot be pinned: {part} is a shared mapping of {name:?}, whose file system must be told before \
         each write; use a memfd, MAP_PRIVATE, or a copy"
    )]
    SharedFile {
        /// What was to be pinned.
        range: Range,
        /// The first mapping in it that refuses.
        part: Range,
        /// The file.
        name: OsString,
    },
    /// The kernel refuses and none of the reasons above holds: secret memory, device memory, a guard page, ...
    #[error("{range} cannot be pinned: {source} (secret, device or guard memory? a file's end inside it?)")]
    Refused {
        /// What was to be pinned.
        range: Range,
        /// What the kernel said.
        source: io::Error,
    },
    /// Bytes outside the pin.
    #[error("bytes [{off:#x}, +{len:#x}) lie outside the pin of {range}")]
    OutOfRange {
        /// First byte, from the start of the range.
        off: u64,
        /// Number of bytes.
        len: u64,
        /// What is pinned.
        range: Range,
    },
    /// The device moves data for its own ring only.
    #[error("this Pinner pins for a ring of somebody else and has no device of its own: submit to that ring")]
    NoDevice,
    /// The caller must not sleep.
    #[error("a transfer waits for the device: {0}")]
    Atomic(#[from] AtomicContext),
    /// The transfer failed.
    #[error("the device failed on [{off:#x}, +{len:#x}) of {range}: {source}")]
    Device {
        /// First byte, from the start of the range.
        off: u64,
        /// Number of bytes.
        len: u64,
        /// What is pinned.
        range: Range,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PinError {
    /// What it means to whoever asked a primary MMU for the pages of `range`.
    pub(super) fn about(self, range: Range, access: Access) -> GupError {
        match self {
            PinError::Unmapped { hole, .. } => GupError::NotMapped { range, access, at: hole.first_page() },
            PinError::NotWritable { part, .. } => {
                GupError::AccessDenied { range, access, at: part.first_page() }
            }
            PinError::MemlockLimit { .. } | PinError::NoSlot { .. } => {
                GupError::NoMemory { range, limit: self.to_string() }
            }
            PinError::TooLong(_) | PinError::SharedFile { .. } => {
                GupError::Unsupported { range, why: self.to_string() }
            }
            other => GupError::Source { range, source: other.into() },
        }
    }
}

pub(super) fn no_ring(source: io::Error) -> PinError {
    let how = match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "set the sysctl kernel.io_uring_disabled to 0 (1 leaves it to CAP_SYS_ADMIN and kernel.io_uring_group), or lift the seccomp filter"
        }
        Some(libc::ENOSYS) => "the kernel is built without CONFIG_IO_URING, or a seccomp filter hides it",
        Some(libc::EINVAL) => "sparse buffer tables need Linux 5.19, and at most 16384 slots",
        Some(libc::ENOMEM) => "raise RLIMIT_MEMLOCK or give CAP_IPC_LOCK (kernels before 5.12 count rings)",
        Some(libc::EMFILE | libc::ENFILE) => "raise RLIMIT_NOFILE",
        _ => "unexpected",
    };
    PinError::NoRing { how, source }
}

/// Shared mappings of these have no file system that writes back: if they refuse, it is for another reason.
const IN_MEMORY: [&str; 5] = ["/memfd:", "/dev/zero", "/dev/shm/", "/SYSV", "/secretmem"];

/// What a failed registration means. The mappings are read afterwards and may have changed since: then the answer is
/// [`PinError::Refused`].
pub(super) fn explain(range: Range, source: io::Error) -> PinError {
    match source.raw_os_error() {
        Some(libc::ENOMEM) => {
            let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
            return PinError::MemlockLimit { range, limit };
        }
        Some(libc::EFAULT | libc::EOPNOTSUPP) => {}
        _ => return PinError::Refused { range, source },
    }
    // By number: a handle for `Myself` maps a page, perhaps just into the hole that we look for.
    let Ok(maps) = Maps::open(PidOrSelf::Pid(std::process::id())) else {
        return PinError::Refused { range, source };
    };
    if let Some(hole) = maps.holes(range).ok().and_then(|holes| holes.first().copied()) {
        return PinError::Unmapped { range, hole };
    }
    let part = |vma: &Vma| vma.range.intersection(range).unwrap_or(range);
    for vma in maps.in_range(range).unwrap_or_default() {
        if !vma.write {
            return PinError::NotWritable { range, part: part(&vma) };
        }
        if let (true, Some(name)) = (vma.shared, &vma.name)
            && !IN_MEMORY.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
        {
            let name = name.clone();
            return PinError::SharedFile { range, part: part(&vma), name };
        }
    }
    PinError::Refused { range, source }
}
