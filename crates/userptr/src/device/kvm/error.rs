// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong with the device.

use std::io;

use mmu_notifier::Range;

/// Why there is no device, or none any more, or it refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened. Load the module, or join the group that owns it.
    #[error("/dev/kvm: {0}; needs KVM and the right to read and write /dev/kvm (group kvm)")]
    Open(io::Error),
    /// A system call failed while the device was made or changed.
    #[error("{what}: {cause}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the kernel says.
        cause: io::Error,
    },
    /// The range has addresses that no program can have memory at.
    #[error("{0} is not memory of a program: the last page below 2^47 and what lies above is the kernel's")]
    NotMemory(Range),
    /// The pool of page tables is used up: too much is mapped. Unmap something.
    #[error("no page table is left: too much is mapped; unmap something")]
    NoTables,
    /// All windows of guest physical memory are open elsewhere. Use memory that lies closer together.
    #[error(
        "no window of guest memory left for {range}: the program's memory lies in more than {most} GiB-sized places"
    )]
    NoWindow {
        /// What was to be mapped.
        range: Range,
        /// How many windows there are.
        most: usize,
    },
    /// This process is a forked child; the device belongs to its parent. Make one here.
    #[error("the device was made by the parent process; make another one in this process")]
    Forked,
    /// The device is dead. Make another one.
    #[error("the device is lost: {0}; make another one")]
    Lost(String),
}

impl KvmError {
    pub(super) fn system(what: &'static str) -> impl Fn(io::Error) -> KvmError {
        move |cause| KvmError::System { what, cause }
    }

    pub(super) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
        move |e| KvmError::System { what, cause: io::Error::from_raw_os_error(e.errno()) }
    }
}
