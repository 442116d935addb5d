// SPDX-License-Identifier: MIT OR Apache-2.0
//! An empty KVM virtual machine: no memory, nothing that runs, but an mmu_notifier on this mm.
//!
//! KVM_CREATE_VM registers the notifier on the calling process's mm and takes it off when the last reference to the
//! VM goes. A mapping of a vCPU's run page is such a reference: it keeps the vCPU's file, and that keeps the VM. So
//! the VM here is one PROT_NONE mapping and **no descriptor**: `close_range(2)` of careless code cannot silence it,
//! exec takes it away with the mm, and MADV_DONTFORK keeps it out of children.

use super::map::Mapping;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const KVM_GET_API_VERSION: libc::Ioctl = 0xAE00;
const KVM_CREATE_VM: libc::Ioctl = 0xAE01;
const KVM_CREATE_VCPU: libc::Ioctl = 0xAE41;
/// The only version that there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What went wrong while the VM was made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmError {
    #[error("open: {0}")]
    Open(io::Error),
    #[error("not KVM: KVM_GET_API_VERSION {0}")]
    NotKvm(String),
    #[error("KVM_CREATE_VM: {0}")]
    CreateVm(io::Error),
    #[error("KVM_CREATE_VCPU: {0}")]
    CreateVcpu(io::Error),
    #[error("mapping the vCPU: {0}")]
    Map(io::Error),
}

/// Opens a /dev/kvm.
pub(crate) fn open(path: &Path) -> Result<OwnedFd, VmError> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|e| VmError::Open(io::Error::other(e)))?;
    // SAFETY: a NUL-terminated path.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(VmError::Open(io::Error::last_os_error()));
    }
    // SAFETY: a descriptor that open just returned.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The VM. Dropping it takes the notifier off the mm.
#[derive(Debug)]
pub(crate) struct Vm {
    #[expect(dead_code, reason = "held, never read: the mapping is the VM")]
    keep: Mapping,
}

impl Vm {
    /// Makes a VM on the calling process's mm through `kvm`, a descriptor of /dev/kvm. Call it with signals blocked.
    pub(crate) fn create(kvm: BorrowedFd<'_>) -> Result<Vm, VmError> {
        let vm = create(kvm)?;
        let vcpu = retry(|| ioctl(vm.as_fd(), KVM_CREATE_VCPU, 0)).map_err(VmError::CreateVcpu)?;
        // SAFETY: KVM_CREATE_VCPU returns a new descriptor.
        let vcpu = unsafe { OwnedFd::from_raw_fd(vcpu) };
        let keep = Mapping::shared(vcpu.as_fd(), 4096, libc::PROT_NONE, 0).map_err(VmError::Map)?;
        keep.advise(libc::MADV_DONTFORK).map_err(VmError::Map)?;
        Ok(Vm { keep })
    }
}

/// Makes a VM that lives by its descriptor. Call it with signals blocked.
pub(crate) fn create(kvm: BorrowedFd<'_>) -> Result<OwnedFd, VmError> {
    match ioctl(kvm, KVM_GET_API_VERSION, 0) {
        Ok(API_VERSION) => {}
        Ok(other) => return Err(VmError::NotKvm(format!("says {other}, wanted {API_VERSION}"))),
        Err(e) => return Err(VmError::NotKvm(e.to_string())),
    }
    // Registration takes every VMA lock of the mm and gives up with EINTR when a signal is pending.
    let vm = retry(|| ioctl(kvm, KVM_CREATE_VM, 0)).map_err(VmError::CreateVm)?;
    // SAFETY: KVM_CREATE_VM returns a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(vm) })
}

fn ioctl(fd: BorrowedFd<'_>, request: libc::Ioctl, arg: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the requests used here take an integer, not a pointer.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, arg) } {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}

fn retry<T>(mut f: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match f() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
