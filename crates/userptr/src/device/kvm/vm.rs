// SPDX-License-Identifier: MIT OR Apache-2.0
//! The virtual machine: its system memory, one vCPU, straight in long mode.

use std::sync::atomic::Ordering;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::blob::blob;
use super::error::KvmError;
use super::layout::{
    BLOB, GDT, IDT, KERNEL_CS, KERNEL_ROOT, KERNEL_SS, LARGE, MAILBOX, PAGE, RING, SHARED_PD, SHARED_PDPT,
    STACK_TOP, SYSTEM, SYSTEM_LEN, TSS, TSS_SELECTOR, USER_CS, USER_SS, mailbox,
};
use super::memory::SystemMemory;
use super::ppgtt::{LARGE_PAGE, PRESENT_RW};

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
/// PAE, OSFXSR, OSXMMEXCPT: SSE without more. PCIDE is refused under PVM, and without it a load of CR3 flushes all.
const CR4: u64 = 0x620;
/// LME, LMA, NXE.
const EFER: u64 = 0xd00;
/// IOPL 3, so that CPL 3 may use ports.
const RFLAGS: u64 = 0x3002;
const VECTOR_UD: u64 = 6;
const VECTOR_PF: u64 = 14;

/// A VM with nothing but system memory.
pub(super) fn create_vm(kvm: &Kvm, memory: &SystemMemory) -> Result<VmFd, KvmError> {
    let vm = loop {
        match kvm.create_vm() {
            // It takes every VMA lock of the mm and gives up when a signal is pending.
            Err(e) if e.errno() == libc::EINTR => {}
            other => break other.map_err(KvmError::kvm("KVM_CREATE_VM"))?,
        }
    };
    // Intel processors without "unrestricted guest" want a hole for this; nobody else minds or knows it.
    let _ = vm.set_tss_address(0xfffb_d000);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: SYSTEM_LEN,
        userspace_addr: memory.addr(),
    };
    // SAFETY: the guest accesses it as atomic words do, and `memory` outlives the vCPU, which `Shared` sees to.
    unsafe { vm.set_user_memory_region(region) }.map_err(KvmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    Ok(vm)
}

/// Fills the system memory: code, descriptor tables, and the page tables that map the system memory itself.
pub(super) fn load(memory: &SystemMemory) {
    let blob = blob();
    memory.write(BLOB, blob.code);
    let set = |at: u64, value: u64| memory.word(at).store(value, Ordering::Relaxed);
    let tss = SYSTEM + TSS;
    for (selector, descriptor) in [
        (KERNEL_CS, 0x00af_9b00_0000_ffff),
        (KERNEL_SS, 0x00cf_9300_0000_ffff),
        (USER_SS & !3, 0x00cf_f300_0000_ffff),
        (USER_CS & !3, 0x00af_fb00_0000_ffff),
        (TSS_SELECTOR, 0x0000_8b00_0000_0067 | ((tss & 0xff_ffff) << 16) | ((tss >> 24 & 0xff) << 56)),
        (TSS_SELECTOR + 8, tss >> 32),
    ] {
        set(GDT + u64::from(selector), descriptor);
    }
    // RSP0 lies across two words, at 4.
    set(TSS, (SYSTEM + STACK_TOP) << 32);
    set(TSS + 8, (SYSTEM + STACK_TOP) >> 32);
    for vector in 0..32 {
        let handler = SYSTEM
            + BLOB
            + match vector {
                VECTOR_UD => blob.undefined,
                VECTOR_PF => blob.fault,
                _ => blob.other,
            };
        // A 64-bit interrupt gate, DPL 0.
        let low = handler & 0xffff;
        let middle = handler >> 16 & 0xffff;
        set(IDT + vector * 16, low | (u64::from(KERNEL_CS) << 16) | (0x8e << 40) | (middle << 48));
        set(IDT + vector * 16 + 8, handler >> 32);
    }
    set(KERNEL_ROOT + (SYSTEM >> 39) * 8, SHARED_PDPT | PRESENT_RW);
    set(SHARED_PDPT, SHARED_PD | PRESENT_RW);
    for (entry, at) in (0..SYSTEM_LEN).step_by(LARGE as usize).enumerate() {
        set(SHARED_PD + entry as u64 * 8, at | PRESENT_RW | LARGE_PAGE);
    }
    set(MAILBOX + mailbox::AWAITED, u64::MAX);
}

/// The vCPU, ready to execute the slot at position 0.
pub(super) fn create_vcpu(kvm: &Kvm, vm: &VmFd) -> Result<VcpuFd, KvmError> {
    let vcpu = vm.create_vcpu(0).map_err(KvmError::kvm("KVM_CREATE_VCPU"))?;
    let cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(KvmError::kvm("KVM_SET_CPUID2"))?;
    restart(&vcpu, 0, KERNEL_ROOT).map_err(KvmError::kvm("setting the registers of the vCPU"))?;
    Ok(vcpu)
}

/// Sets every register, so that the command processor goes on with the slot at `position` in address space `root`,
/// whatever it was doing.
pub(super) fn restart(vcpu: &VcpuFd, position: u64, root: u64) -> Result<(), kvm_ioctls::Error> {
    let mut events = vcpu.get_vcpu_events()?;
    events.exception.injected = 0;
    events.exception.pending = 0;
    vcpu.set_vcpu_events(&events)?;
    let mut sregs: kvm_sregs = vcpu.get_sregs()?;
    let code = |selector: u16| segment(selector, 0xb, true);
    let data = |selector: u16| segment(selector, 0x3, false);
    sregs.cs = code(USER_CS);
    sregs.ss = data(USER_SS);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data(USER_SS), data(USER_SS), data(USER_SS), data(USER_SS));
    sregs.tr = kvm_segment {
        base: SYSTEM + TSS,
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { base: SYSTEM + GDT, limit: TSS_SELECTOR + 15, ..Default::default() };
    sregs.idt = kvm_dtable { base: SYSTEM + IDT, limit: 32 * 16 - 1, ..Default::default() };
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = root;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: SYSTEM + BLOB,
        rsp: SYSTEM + STACK_TOP - PAGE,
        rflags: RFLAGS,
        r13: SYSTEM + MAILBOX,
        r14: position,
        r15: SYSTEM + RING,
        ..Default::default()
    })
}

fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: (selector & 3) as u8,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}
