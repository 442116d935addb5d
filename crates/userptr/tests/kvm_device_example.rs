// SPDX-License-Identifier: MIT OR Apache-2.0
//! The example of a batch on the kvm device does what it says.

use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::testing::{in_child, require};
use userptr::device::kvm::{KvmDevice, Polling};

#[expect(dead_code, reason = "its main is not run")]
#[path = "../examples/gpu_batch.rs"]
mod gpu_batch;

#[test]
fn the_picture_is_painted() {
    if !require(Capability::DevKvm) {
        return;
    }
    in_child("the_picture_is_painted", Duration::from_secs(180), || {
        let picture = gpu_batch::paint(&KvmDevice::open(Polling::default()).unwrap()).unwrap();
        let rows: Vec<&[u8]> = picture.chunks(64).collect();
        assert_eq!((&rows[0][..3], &rows[1][..3]), (&b"/\\."[..], &b"\\/."[..]));
        assert_eq!((&rows[4][4..8], &rows[5][4..8]), (&b"./\\."[..], &b".\\/."[..]));
        assert!(rows[15].iter().all(|point| *point == b'.'));
    });
}
