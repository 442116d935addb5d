// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong, and what to do about it.

use std::io;

use mmu_notifier::Range;

/// Why there is no source.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// EPERM from the system call and from the device.
    #[error(
        "userfaultfd is refused ({syscall}) and so is /dev/userfaultfd ({device}): allow the system call in the \
         seccomp profile of the container, or give this user read and write access to /dev/userfaultfd, or grant \
         CAP_SYS_PTRACE; before Linux 5.11 set sysctl vm.unprivileged_userfaultfd=1"
    )]
    NotPermitted {
        /// From userfaultfd(2).
        syscall: io::Error,
        /// From the device.
        device: io::Error,
    },
    /// ENOSYS.
    #[error(
        "this kernel has no userfaultfd: it needs CONFIG_USERFAULTFD, or a seccomp filter that does not answer ENOSYS"
    )]
    NotSupported,
    /// UFFDIO_API does not offer what is needed.
    #[error("userfaultfd offers features {offered:#x} and lacks {missing}: use Linux {since} or later")]
    Features {
        /// Their names.
        missing: &'static str,
        /// As UFFDIO_API returned them.
        offered: u64,
        /// The first kernel with them.
        since: &'static str,
    },
    /// Before 5.15 `mmap_changing` was a flag that two changes at once got wrong.
    #[error(
        "Linux {release} cannot tell exactly whether a change is in flight: use 5.15 or later, or \
         Options::ordered_only"
    )]
    NoStrictProbe {
        /// Of the running kernel.
        release: String,
    },
    /// An munmap of its own was not reported as it should be.
    #[error("userfaultfd does not work here: {0}")]
    Canary(&'static str),
    /// Something else.
    #[error("{what}: {source}")]
    System {
        /// The step.
        what: &'static str,
        /// The reason.
        source: io::Error,
    },
}

impl OpenError {
    pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> OpenError {
        move |source| OpenError::System { what, source }
    }
}

/// Why some pages are not watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The source is of no use any more.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The kernel would skip the hole in silence, and so never report what is mapped there later.
    #[error("{range} is not mapped at {at:#x}: map it first, or watch what is mapped")]
    Hole {
        /// What was asked for.
        range: Range,
        /// First page that is not mapped.
        at: u64,
    },
    /// Another userfaultfd has it: only one can.
    #[error("{range} is registered with another userfaultfd: share that source, or use the kvm source")]
    Busy {
        /// What was asked for.
        range: Range,
    },
    /// A kind of mapping that userfaultfd does not take.
    #[error(
        "{range} holds a mapping that userfaultfd does not take: special mappings (vdso, io_uring rings) never, \
         files and secret memory only where the kernel offers WP_ASYNC (Linux 6.7), hugetlb and shmem since 5.19; \
         hugetlb ranges must be aligned to the huge page"
    )]
    Unsupported {
        /// What was asked for.
        range: Range,
    },
    /// Isolated ranges cut VMAs, of which a process can have vm.max_map_count.
    #[error(
        "watching {range} takes more than {budget} VMAs: watch fewer or larger ranges, or raise Options::vma_budget"
    )]
    VmaBudget {
        /// What was asked for.
        range: Range,
        /// In VMAs.
        budget: usize,
    },
    /// The kernel could not split a VMA.
    #[error("no memory or no VMA left to watch {range}: raise sysctl vm.max_map_count or watch fewer ranges")]
    NoMemory {
        /// What was asked for.
        range: Range,
    },
    /// Something else.
    #[error("UFFDIO_REGISTER of {range}: {source}")]
    System {
        /// What was asked for.
        range: Range,
        /// The reason.
        source: io::Error,
    },
}

impl WatchError {
    pub(super) fn of_register(range: Range, source: io::Error) -> WatchError {
        match source.raw_os_error() {
            _ if !crate::sys::uffd::fully_mapped(range) => {
                WatchError::Hole { range, at: super::watch::first_hole(range) }
            }
            Some(libc::EBUSY) => WatchError::Busy { range },
            Some(libc::EINVAL) => WatchError::Unsupported { range },
            Some(libc::ENOMEM) => WatchError::NoMemory { range },
            // The monitor died and its descriptor is an eventfd now.
            Some(libc::ENOTTY | libc::EBADF) => WatchError::Gone(Gone::Closed),
            _ => WatchError::System { range, source },
        }
    }
}

/// Why a watch cannot vouch for anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Gone {
    /// This process is a forked child of the one that opened the source.
    #[error("the source belongs to the parent process: open one in the child")]
    Forked,
    /// The monitor thread has ended, or its descriptor was closed.
    #[error("the monitor of the source is gone: open a new source and watch again")]
    Closed,
    /// The pages were unmapped or moved, or events were lost.
    #[error("the watched pages were unmapped or moved: watch what is mapped there now")]
    Unmapped,
    /// A change has been in flight for longer than the caller is ready to wait.
    #[error("a change of watched memory is still in flight: try again")]
    Busy,
}
