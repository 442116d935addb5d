// SPDX-License-Identifier: MIT OR Apache-2.0
//! The software mm beside the running kernel: the same operations on both, the same notifications, contents and faults.
