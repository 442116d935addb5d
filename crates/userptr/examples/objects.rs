// SPDX-License-Identifier: MIT OR Apache-2.0
//! A batch on objects, as one would give it to a GPU: sprites are blitted into a picture, frame after frame, and the
//! program replaces the sprite in between as it likes.
//!
//! `cargo run -p userptr --example objects`; takes the kvm device if it can be opened, else the cpu.

use std::error::Error;

use mmu_notifier::PrimaryMmu;
use userptr::device::cpu::Cpu;
use userptr::device::kvm::{KvmDevice, Polling};
use userptr::device::{Command, Device, DeviceAddr, Engine};
use userptr::object::{Driver, Flags, Iommu};
use userptr::source;

const WIDTH: u64 = 64;
const HEIGHT: u64 = 20;
/// Bytes in a row of the sprite, and rows.
const SPRITE: u64 = 3;

/// A picture of a byte for each point, with six sprites, and looked at by the device as well.
pub(crate) fn paint<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static>(
    driver: &Driver<M, D>,
) -> Result<Vec<u8>, Box<dyn Error>> {
    let space = driver.space();
    let mut sprite = driver.object(vec![b'?'; (SPRITE * SPRITE) as usize], Flags::default())?;
    let picture = driver.object(vec![0; (WIDTH * HEIGHT) as usize], Flags::default())?;
    let mut result = driver.object(vec![0; 8], Flags::default())?;
    let src = space.bind(&sprite, Some(DeviceAddr(0x10_0000)))?;
    let dst = space.bind(&picture, None)?;
    let out = space.bind(&result, None)?;

    let clear = Command::Fill { dst, len: WIDTH * HEIGHT, byte: b'.' };
    let blits = (0..6).map(|n| Command::Blit2d {
        dst: DeviceAddr(dst.0 + n * (SPRITE * WIDTH + 2 * SPRITE)),
        dst_pitch: WIDTH,
        src,
        src_pitch: SPRITE,
        width: SPRITE,
        height: SPRITE,
    });
    let batch: Vec<Command> = [clear].into_iter().chain(blits).collect();
    // Not waited for: whoever looks at an object's bytes waits until the device is through with it.
    let first = space.execute(&[&sprite, &picture], &batch)?;
    sprite.bytes().ok_or("it owns its bytes")?.fill(b'#');
    space.execute(&[&sprite, &picture], &batch)?.wait()?;
    first.wait()?;

    // The first row against the last: where do they part?
    let last = DeviceAddr(dst.0 + WIDTH * (HEIGHT - 1));
    let compare = Command::Compare { a: dst, b: last, len: WIDTH, result: out };
    space.execute(&[&picture, &result], &[compare])?.wait()?;
    if result.bytes().ok_or("it owns its bytes")? != [0; 8] {
        return Err("the device saw another picture than the program".into());
    }
    Ok(picture.into_bytes().ok_or("it owns its bytes")?.into_vec())
}

fn show(picture: &[u8]) {
    for row in picture.chunks(WIDTH as usize) {
        println!("{}", String::from_utf8_lossy(row));
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mm = source::open_mm(1)?;
    match KvmDevice::open(Polling::default()) {
        Ok(device) => {
            let iommu = Iommu::remapping(DeviceAddr(1 << 45), 1 << 30);
            show(&paint(&Driver::new(mm, device.context()?, iommu))?);
        }
        Err(why) => {
            println!("on the cpu: {why}");
            show(&paint(&Driver::new(mm, Cpu::new(), Iommu::passthrough()))?);
        }
    }
    Ok(())
}
