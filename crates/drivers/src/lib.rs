// SPDX-License-Identifier: MIT OR Apache-2.0
//! Models of real secondary-MMU drivers, faults included, and of the device that they drive.
//!
//! These are what a checker checks; nobody uses them live. One driver, one file, headed by its algorithm, its lock
//! order and the kernel that it is taken from. All are [`Driver`]s on a [`Device`] over a [`softmm::Mm`], and every access of
//! the device is shown to an [`Observer`] at the moment that it happens.
#![forbid(unsafe_code)]

pub mod amd_iommu_invalidate_range;
pub mod amd_iommu_v2_3_16;
mod callbacks;
mod counters;
pub mod device;
mod driver;
mod engine;
mod hmm;
pub mod i915_v3_16;
pub mod kvm_v6_18;
mod listener;
mod observer;
mod pasid;
pub mod rdma_odp;
pub mod vfio;
mod work;

pub use callbacks::{Callback, Callbacks};
pub use counters::{Counters, Counts};
pub use device::{Binding, Device, DeviceContext, DeviceFault, DeviceOp, Translation};
pub use driver::{BindError, Driver, DriverError, Holds, Kind, Open, OpenError, Options, SubmitError};
pub use engine::RequestId;
pub use observer::{DeviceAccess, DriverBug, Observer};
pub use work::WorkMode;

/// Every driver there is.
pub static DRIVERS: &[&Kind] = &[
    &i915_v3_16::KIND,
    &i915_v3_16::MENDED,
    &kvm_v6_18::KIND,
    &amd_iommu_v2_3_16::KIND,
    &amd_iommu_invalidate_range::KIND,
    &rdma_odp::KIND,
    &vfio::KIND,
];
