// SPDX-License-Identifier: MIT OR Apache-2.0
//! Models of real secondary-MMU drivers, faults included, and of the device that they drive.
//!
//! These are what a checker checks; nobody uses them live. One driver, one file, headed by its algorithm, its lock
//! order and the kernel that it is taken from. All are [`Driver`]s on a [`Device`] over a [`softmm::Mm`], and every access of
//! the device is shown to an [`Observer`] at the moment that it happens.
//!
//! ```
//! use drivers::{Callback, Device, DeviceOp, Options, kvm_v6_18};
//! use interleave::MaySleep;
//! use mmu_notifier::{Access, Range};
//! use softmm::{Config, Machine, Placement, Prot};
//! use std::sync::Arc;
//!
//! MaySleep::enter(|cx| {
//!     let machine = Machine::new(Config::default());
//!     let mm = machine.new_mm()?;
//!     let range = mm.mmap(cx, Placement::Anywhere { len: 0x1000 }, Prot::ReadWrite)?;
//!     let driver = (kvm_v6_18::KIND.open)(cx, &mm, &Device::new(Arc::new(())), Options::default())?;
//!     let memslot = driver.bind(cx, range, Access::Write)?;
//!     driver.access(cx, memslot, DeviceOp::Write(range.start(), 42))?;
//!     assert_eq!(machine.cpus()[0].load(cx, &mm, range.start())?, 42);
//!     mm.munmap(cx, range);
//!     assert!(driver.access(cx, memslot, DeviceOp::Read(range.start())).is_err());
//!     assert_eq!(driver.counts().effects(Callback::Start), 1);
//!     driver.close(cx);
//!     mm.mmput(cx);
//!     Ok::<(), Box<dyn std::error::Error>>(())
//! }).unwrap();
//! ```
//!
//! A driver that is opened without a callback that it needs ([`Options::callbacks`]) does what the real one would: it may use freed
//! pages, make no progress (an error after a bounded number of tries), or wait for ever: KVM without `invalidate_range_end` hangs
//! where it changes a memslot. An explorer calls that a deadlock; on real threads it is one.
#![forbid(unsafe_code)]

pub mod amd_iommu_invalidate_range;
pub mod amd_iommu_v2_3_16;
mod bindings;
mod callbacks;
mod counters;
mod design;
pub mod design_atomic_change_pte;
pub mod design_drop_everything;
pub mod design_exact_start_only;
pub mod design_flag_change_pte;
pub mod design_start_with_seq;
pub mod device;
mod driver;
mod engine;
mod hmm;
pub mod i915_mistakes;
pub mod i915_sleeping;
pub mod i915_v3_16;
pub mod i915_v3_16_ro;
pub mod i915_v4_19;
pub mod i915_v5_13;
mod kvm;
pub mod kvm_v3_16;
pub mod kvm_v6_18;
mod listener;
pub mod mirror;
mod observer;
mod op;
mod pasid;
pub mod proc_mem;
pub mod rdma_odp;
mod sequence;
mod site;
pub mod vfio;
mod work;

pub use callbacks::{Callback, Callbacks};
pub use counters::{Counters, Counts};
pub use device::{Device, DeviceContext, Translation};
pub use driver::{
    BindError, Driver, DriverError, Holds, Kind, Open, OpenError, Options, SubmitError, check_ops,
};
pub use engine::{RequestId, Resolve, refuse};
pub use listener::Registered;
pub use mirror::{Mirror, Port};
pub use observer::{DeviceAccess, DriverBug, Follows, Moment, Observer};
pub use op::{Binding, DeviceFault, DeviceOp};
pub use work::WorkMode;

/// Every driver there is.
pub static DRIVERS: &[&Kind] = &[
    &i915_v3_16::KIND,
    &i915_v3_16::MENDED,
    &i915_v3_16_ro::KIND,
    &i915_v3_16_ro::UNENFORCED,
    &i915_v4_19::KIND,
    &i915_v5_13::KIND,
    &i915_v5_13::KIND_6_10,
    &kvm_v3_16::KIND,
    &kvm_v3_16::KIND_5_13,
    &kvm_v3_16::NO_BUMP,
    &kvm_v6_18::KIND,
    &amd_iommu_v2_3_16::KIND,
    &amd_iommu_invalidate_range::KIND_3_19,
    &amd_iommu_invalidate_range::KIND,
    &rdma_odp::KIND,
    &i915_sleeping::CHANGE_PTE,
    &i915_sleeping::INVALIDATE_PAGE,
    &vfio::KIND,
    &design_drop_everything::KIND,
    &design_exact_start_only::KIND,
    &design_start_with_seq::KIND,
    &design_atomic_change_pte::KIND,
    &design_flag_change_pte::KIND,
];

macro_rules! sources {
    ($($file:literal),* $(,)?) => {
        &[$(($file, include_str!($file))),*]
    };
}

/// The files of drivers, for tools that show a place in one.
static SOURCES: &[(&str, &str)] = sources![
    "amd_iommu_invalidate_range.rs",
    "amd_iommu_v2_3_16.rs",
    "design.rs",
    "design_atomic_change_pte.rs",
    "design_drop_everything.rs",
    "design_exact_start_only.rs",
    "design_flag_change_pte.rs",
    "design_start_with_seq.rs",
    "hmm.rs",
    "i915_v3_16.rs",
    "i915_v4_19.rs",
    "i915_v5_13.rs",
    "kvm_v3_16.rs",
    "kvm_v6_18.rs",
    "pasid.rs",
    "proc_mem.rs",
    "rdma_odp.rs",
    "sequence.rs",
    "vfio.rs",
];

/// The text of the driver's file called `name`.
pub fn source(name: &str) -> Option<&'static str> {
    SOURCES.iter().find(|(file, _)| *file == name).map(|(_, text)| *text)
}
