// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kvm device sees what the program sees after every way in which Linux changes memory, and is told of none.

use std::time::Duration;

use hostmm::capability::Capability;
use hostmm::disturb::{
    After, Arena, Change, DisturbError, Event, Observer, Outcome, Sighting, Via, catalogue,
};
use hostmm::page::{Maps, PidOrSelf};
use hostmm::testing::{in_child, require, scratch, skip, skip_rest};
use interleave::MaySleep;
use mmu_notifier::{Access, Range};
use userptr::device::kvm::{KvmContext, KvmDevice, Polling};
use userptr::device::{Command, DeviceAddr, Engine, Fence, FenceError};

const DEADLINE: Duration = Duration::from_secs(90);

/// A page that only the device and the test use.
#[repr(align(4096))]
struct Page([u64; 512]);

struct Device {
    context: KvmContext,
    _device: KvmDevice,
    word: *const u64,
}

impl Device {
    fn open(cx: &mut MaySleep<'_>) -> Device {
        let device = KvmDevice::open(Polling::default()).unwrap();
        let context = KvmContext::new(cx, &device).unwrap();
        let word = Box::leak(Box::new(Page([0; 512]))).0.as_mut_ptr();
        let range = Range::new(word.addr() as u64, 4096).unwrap();
        context.map_range(cx, range, Access::Write, None).unwrap();
        Device { context, _device: device, word }
    }

    fn run(&self, cx: &mut MaySleep<'_>, command: Command) -> Result<(), FenceError> {
        // SAFETY: what it writes is the leaked page and the scene's memory, which no reference points to.
        unsafe { self.context.submit(cx, &[command]) }.unwrap().wait(cx)
    }

    /// What the device sees at `addr`.
    fn look(&self, cx: &mut MaySleep<'_>, addr: u64) -> Sighting {
        let load = Command::Copy { dst: DeviceAddr(self.word.addr() as u64), src: DeviceAddr(addr), len: 8 };
        match self.run(cx, load) {
            // SAFETY: the leaked page, which the device has written and nobody writes now.
            Ok(()) => Sighting::Stamp(unsafe { self.word.read_volatile() }),
            Err(FenceError::Fault(fault)) => {
                assert_eq!((fault.addr, fault.access), (DeviceAddr(addr), Access::Read));
                Sighting::Fault
            }
            Err(e) => panic!("{e}"),
        }
    }
}

/// May the program read and write at `addr`?
fn is_writable(addr: u64) -> bool {
    let page = Range::enclosing(addr, 1).unwrap();
    let vmas = Maps::open(PidOrSelf::Myself).unwrap().in_range(page).unwrap();
    vmas.iter().any(|vma| vma.read && vma.write)
}

fn not_today(event: &Event, error: &DisturbError) -> ! {
    if event.via == Via::KernelThread && matches!(error, DisturbError::Timeout { .. }) {
        skip_rest("kernel_thread", &error.to_string());
    }
    panic!("{}: {error}", event.name)
}

fn body(cx: &mut MaySleep<'_>, event: &Event, arena: &mut Arena) {
    let mut scene = event.setup(arena).unwrap_or_else(|e| not_today(event, &e));
    let addr = scene.watched().start();
    let device = Device::open(cx);
    device.context.map_range(cx, scene.watched(), Access::Write, None).unwrap();
    assert_eq!(device.look(cx, addr), Sighting::Stamp(scene.before()), "{}: before", event.name);
    let change = scene.disturb(&mut || ()).unwrap_or_else(|e| not_today(event, &e));
    let expected = match (change, scene.after()) {
        (Change::Refused, _) => Sighting::Stamp(scene.before()),
        (Change::Happened, After::Stamp(stamp)) => Sighting::Stamp(stamp),
        (Change::Happened, After::Faults) => Sighting::Fault,
    };
    assert_eq!(device.look(cx, addr), expected, "{}: after", event.name);
    let Sighting::Stamp(stamp) = expected else { return };
    // And the other way round, with the program's rights.
    let value = !stamp as u32;
    match device.run(cx, Command::StoreDword { dst: DeviceAddr(addr), value }) {
        Ok(()) => {
            assert!(is_writable(addr), "{}: the device wrote what the program may not", event.name);
            let now = Observer::new(scene.watched(), stamp).look();
            assert_eq!(now, Sighting::Stamp(stamp >> 32 << 32 | u64::from(value)), "{}: written", event.name);
        }
        Err(e) => assert!(!is_writable(addr), "{}: {e}", event.name),
    }
}

#[test]
fn the_device_sees_what_the_program_sees() {
    if !require(Capability::DevKvm) {
        return;
    }
    for event in catalogue() {
        if event.via == Via::OtherProcess && event.expect.unpinned == Outcome::NotMappable {
            // exit: the memory is another process's.
            continue;
        }
        in_child(&format!("the_device_sees_what_the_program_sees#{}", event.name), DEADLINE, || {
            let mut arena = Arena::new(scratch(env!("CARGO_TARGET_TMPDIR")));
            let missing =
                event.needs.iter().find_map(|need| Some((need.capability(), need.missing(&arena)?)));
            match missing {
                Some((capability, why)) => skip(capability, &why),
                None => MaySleep::enter(|cx| body(cx, event, &mut arena)),
            }
        });
    }
}
