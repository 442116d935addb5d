// SPDX-License-Identifier: MIT OR Apache-2.0
//! Is a driver of a secondary MMU right, whatever the mm does and in whatever order? Computed, not argued.
//!
//! A [`scenario`] puts one driver beside one [`path`] of the mm under one kernel profile and tries the orders of their
//! steps; the [`oracle`] judges each access of the device.
#![forbid(unsafe_code)]

pub mod answer;
pub mod check;
pub mod corpus;
pub mod diff;
pub mod driver;
pub mod era;
pub mod explain;
pub mod ledger;
pub mod mutate;
pub mod oracle;
pub mod own;
pub mod path;
pub mod scenario;

pub use check::{Check, Checked, check};
pub use oracle::{Broken, Oracle, Rule};
pub use path::{PATHS, Path};
pub use scenario::{Cell, Facts, Outcome};

/// The listings of docs/tutorial.md are run.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/tutorial.md")]
struct Tutorial;
