// SPDX-License-Identifier: MIT OR Apache-2.0
//! The library's own consumers of notifications as drivers of the table: what people embed, judged as what the kernel has.
//!
//! The code that runs is that of the crate `userptr`, which runs live; what is modelled is what is around it: the source
//! ([`softmm::told`]) and the device (hardware.rs).

pub mod cache;
mod consumer;
mod hardware;
pub mod objects;

use drivers::{Kind, SubmitError};
use mmu_notifier::GupError;
use softmm::FaultError;
use userptr::device::DeviceError;

/// Our own.
pub static OWN: &[&Kind] = &[&cache::KIND, &cache::LATE, &objects::KIND, &objects::EXACT];

/// Every driver: those of kernels, the designs, and our own.
pub fn all() -> impl Iterator<Item = &'static Kind> + Clone {
    drivers::DRIVERS.iter().chain(OWN).copied()
}

/// The driver called `name`.
pub fn named(name: &str) -> Option<&'static Kind> {
    all().find(|kind| kind.name == name)
}

/// Why pages were not got, as drivers say it.
fn fault(error: &DeviceError) -> SubmitError {
    match error {
        DeviceError::Pages(GupError::NotMapped { at, .. }) => FaultError::Unmapped(*at).into(),
        DeviceError::Pages(GupError::AccessDenied { at, .. }) => FaultError::Access(*at).into(),
        DeviceError::Pages(GupError::Source { source, .. }) => {
            source.downcast_ref::<FaultError>().map_or(SubmitError::Again, |fault| (*fault).into())
        }
        DeviceError::Pages(GupError::Released(_)) => SubmitError::Exited,
        _ => SubmitError::Again,
    }
}
