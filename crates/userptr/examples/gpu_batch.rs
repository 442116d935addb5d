// SPDX-License-Identifier: MIT OR Apache-2.0
//! A batch as one would give it to a GPU, on ordinary memory: paint a picture, and look whether it is right.
//!
//! `cargo run -p userptr --example gpu_batch`; needs the right to open `/dev/kvm`.

use std::error::Error;

use userptr::device::kvm::{KvmDevice, Polling};
use userptr::device::{Command, DeviceAddr, checksum};

const WIDTH: usize = 64;
const HEIGHT: usize = 16;

/// A picture of a byte for each point, with a sprite all over it, painted by the device.
pub(crate) fn paint(device: &KvmDevice) -> Result<Vec<u8>, Box<dyn Error>> {
    let sprite = *b"/\\\\/";
    let mut picture = vec![0; WIDTH * HEIGHT];
    let mut results = [0; 16];

    let context = device.context()?;
    let mut batch = context.batch();
    let src = batch.source(&sprite)?;
    let dst = batch.target(&mut picture)?;
    let out = batch.target(&mut results)?;
    batch.push(Command::Fill { dst, len: (WIDTH * HEIGHT) as u64, byte: b'.' })?;
    for place in (0..WIDTH * HEIGHT).step_by(4 * WIDTH + 5).take(4) {
        batch.push(Command::Blit2d {
            dst: DeviceAddr(dst.0 + place as u64),
            dst_pitch: WIDTH as u64,
            src,
            src_pitch: 2,
            width: 2,
            height: 2,
        })?;
    }
    batch.push(Command::Checksum { src: dst, len: (WIDTH * HEIGHT) as u64, result: out })?;
    // The first row against the last: where do they part?
    batch.push(Command::Compare {
        a: dst,
        b: DeviceAddr(dst.0 + (WIDTH * (HEIGHT - 1)) as u64),
        len: WIDTH as u64,
        result: DeviceAddr(out.0 + 8),
    })?;
    batch.run()?;

    let result = |n: usize| u64::from_le_bytes(std::array::from_fn(|i| results[8 * n + i]));
    if result(0) != checksum(&picture) {
        return Err("the device saw another picture than the program".into());
    }
    println!("the first and the last row part at column {}", result(1));
    Ok(picture)
}

fn main() -> Result<(), Box<dyn Error>> {
    let picture = paint(&KvmDevice::open(Polling::default())?)?;
    for row in picture.chunks(WIDTH) {
        println!("{}", String::from_utf8_lossy(row));
    }
    Ok(())
}
