// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr watch` on programs with a known number of changes, and what such a program notices of it: nothing.

#![expect(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "what is tested are processes; nothing here runs under exploration"
)]

mod counts;
mod kinds;
mod others;
mod page;
mod refused;
mod run;
mod unnoticed;
