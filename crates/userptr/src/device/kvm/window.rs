// SPDX-License-Identifier: MIT OR Apache-2.0
//! Windows: how memory of this process becomes guest physical memory.
//!
//! A memory slot costs 40 us to 4 ms to add or delete, but next to nothing to have, and the memory behind it may be
//! unmapped, come and go. So the device has slots of 1 GiB each, aligned, made when the first page in them is mapped:
//! never one for each buffer. That exposes nothing: commands reach device addresses, and only through page tables.
//!
//! The n-th window is at guest physical address (4 + n) GiB. That the host address is not the guest physical one lets
//! hosts with few physical address bits play, and 1 GiB alignment on both sides keeps huge pages huge.
//!
//! Lock order: `kvm_device_windows` is a leaf. The processor's thread takes it.

use interleave::{LockClass, MaySleep, Mutex};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use mmu_notifier::{Access, Range};
use rustix::mm::{Advice, madvise};

use super::error::KvmError;
use super::layout::PAGE;

const WINDOW: u64 = 1 << 30;
const FIRST: u64 = 4 << 30;
/// End of what a program can map: Linux keeps the last page of the lower half empty.
const MEMORY_END: u64 = (1 << 47) - PAGE;
/// The least that processors with KVM have today is 39 bits.
const PHYSICAL_END: u64 = 1 << 39;

static WINDOWS: LockClass = LockClass::new("kvm_device_windows");

/// The slots of one VM.
#[derive(Debug)]
pub(super) struct Windows {
    vm: VmFd,
    most: usize,
    /// Which multiple of 1 GiB each is at.
    hosts: Mutex<Vec<u64>>,
}

impl Windows {
    /// For a VM that has room for `slots` slots, the first of them taken.
    pub(super) fn new(vm: VmFd, slots: usize) -> Windows {
        let most = ((PHYSICAL_END - FIRST) / WINDOW) as usize;
        Windows { vm, most: most.min(slots.saturating_sub(1)), hosts: Mutex::new(&WINDOWS, Vec::new()) }
    }

    /// The pieces of guest physical memory behind `range`: address and length in bytes, in order.
    pub(super) fn resolve(&self, cx: &mut MaySleep<'_>, range: Range) -> Result<Vec<(u64, u64)>, KvmError> {
        if range.end() > MEMORY_END {
            return Err(KvmError::NotMemory(range));
        }
        let mut hosts = self.hosts.lock(cx);
        let mut pieces = Vec::new();
        let mut at = range.start();
        while at < range.end() {
            let host = at / WINDOW;
            let number = match hosts.iter().position(|h| *h == host) {
                Some(number) => number,
                None => self.open(&mut hosts, host, range)?,
            };
            let offset = at % WINDOW;
            let len = (WINDOW - offset).min(range.end() - at);
            pieces.push((FIRST + number as u64 * WINDOW + offset, len));
            at += len;
        }
        Ok(pieces)
    }

    fn open(&self, hosts: &mut Vec<u64>, host: u64, range: Range) -> Result<usize, KvmError> {
        let number = hosts.len();
        if number == self.most {
            return Err(KvmError::NoWindow { range, most: self.most });
        }
        let start = host * WINDOW;
        let region = kvm_userspace_memory_region {
            slot: number as u32 + 1,
            flags: 0,
            guest_phys_addr: FIRST + number as u64 * WINDOW,
            memory_size: WINDOW.min(MEMORY_END - start),
            userspace_addr: start,
        };
        // SAFETY: slots do not overlap, being numbered. The memory behind is the process's, whatever and whenever it is:
        // only what is mapped is reached, and only by commands, whose submission is unsafe for that reason.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(KvmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        hosts.push(host);
        Ok(number)
    }

    /// The address in this process of a guest physical one.
    pub(super) fn host(&self, cx: &mut MaySleep<'_>, gpa: u64) -> Option<u64> {
        let number = gpa.checked_sub(FIRST)? / WINDOW;
        let host = *self.hosts.lock(cx).get(number as usize)?;
        Some(host * WINDOW + gpa % WINDOW)
    }

    /// Can the program access the page at `addr` so? Faults it in if it can.
    pub(super) fn is_accessible(&self, addr: u64, access: Access) -> bool {
        let advice = match access {
            Access::Read => Advice::LinuxPopulateRead,
            Access::Write => Advice::LinuxPopulateWrite,
        };
        let page = addr & !(PAGE - 1);
        // SAFETY: it faults pages in as an access would, and changes no content. Nothing is dereferenced.
        unsafe { madvise(page as *mut _, PAGE as usize, advice) }.is_ok()
    }
}
