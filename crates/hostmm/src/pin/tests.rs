// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a real device sees of pinned memory that changes underneath.

use std::fs::File;
use std::time::Duration;

use mmu_notifier::{PAGE_SIZE, Range};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::*;
use crate::capability::Capability;
use crate::page::{PageFlags, Pages, PidOrSelf};
use crate::sys::test_memory::{Memory, RW, fork};
use crate::testing::{in_child, require};

const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Run the test in a child if there is io_uring. `T` is a function in the test, for its name.
fn live<T>(_here: T, body: impl FnOnce()) {
    let name = std::any::type_name::<T>();
    let name = name.strip_prefix("hostmm::").unwrap().strip_suffix("::here").unwrap();
    if require(Capability::IoUring) {
        in_child(name, Duration::from_secs(30), body);
    }
}

fn device_sees(pin: &Pin, len: usize) -> String {
    let mut bytes = vec![0; len];
    pin.read_through(0, &mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn cpu_sees(m: &Memory, len: usize) -> String {
    String::from_utf8(m.read(0, len)).unwrap()
}

fn old() -> (Memory, Pinner, Pin) {
    let m = Memory::anon(PAGE_SIZE);
    m.write(0, b"OLD");
    let pinner = Pinner::new(8).unwrap();
    let pin = pinner.pin(m.range).unwrap();
    assert_eq!(device_sees(&pin, 3), "OLD");
    (m, pinner, pin)
}

fn memfd(bytes: u64) -> File {
    let file = File::from(memfd_create("pin test", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

#[test]
fn after_munmap_the_device_sees_the_old_page() {
    fn here() {}
    live(here, || {
        let (m, _pinner, pin) = old();
        let range = m.range;
        m.munmap();
        assert_eq!(device_sees(&pin, 3), "OLD", "nothing is mapped there");
        let again = Memory::map(Some(range.start()), PAGE_SIZE, RW, ANON, None).unwrap();
        again.write(0, b"NEW");
        assert_eq!((cpu_sees(&again, 3).as_str(), device_sees(&pin, 3).as_str()), ("NEW", "OLD"));
        // SAFETY: the pages are mapped nowhere.
        unsafe { pin.write_through(0, b"IN") }.unwrap();
        assert_eq!((cpu_sees(&again, 3).as_str(), device_sees(&pin, 3).as_str()), ("NEW", "IND"));
    });
}

#[test]
fn an_overlay_is_not_seen() {
    fn here() {}
    live(here, || {
        let (m, _pinner, pin) = old();
        let over = Memory::map(Some(m.range.start()), PAGE_SIZE, RW, ANON, None).unwrap();
        over.write(0, b"NEW");
        assert_eq!(device_sees(&pin, 3), "OLD");
        std::mem::forget(over);
    });
}

#[test]
fn dontneed_leaves_the_device_with_the_old_page_and_free_does_not() {
    fn here() {}
    live(here, || {
        let (m, _pinner, pin) = old();
        m.madvise(libc::MADV_FREE).unwrap();
        m.write(0, b"MID");
        assert_eq!(
            device_sees(&pin, 3),
            "MID",
            "MADV_FREE keeps the page until reclaim, which a pin prevents"
        );
        m.madvise(libc::MADV_DONTNEED).unwrap();
        m.write(0, b"NEW");
        assert_eq!((cpu_sees(&m, 3).as_str(), device_sees(&pin, 3).as_str()), ("NEW", "MID"));
    });
}

#[test]
fn mremap_moves_the_page_with_the_pin() {
    fn here() {}
    live(here, || {
        let (m, _pinner, pin) = old();
        let m = m.mremap();
        m.write(0, b"MOV");
        assert_eq!(device_sees(&pin, 3), "MOV", "through the old address");
        // SAFETY: nobody has a reference to the test's memory.
        unsafe { pin.write_through(0, b"DEV") }.unwrap();
        assert_eq!(cpu_sees(&m, 3), "DEV");
    });
}

#[test]
fn mprotect_does_not_stop_the_device() {
    fn here() {}
    live(here, || {
        let (m, _pinner, pin) = old();
        m.mprotect(libc::PROT_NONE);
        assert_eq!(device_sees(&pin, 3), "OLD");
    });
}

#[test]
fn a_hole_in_the_file_is_not_seen() {
    fn here() {}
    live(here, || {
        let file = memfd(PAGE_SIZE);
        let m = Memory::file(&file, PAGE_SIZE, libc::MAP_SHARED);
        m.write(0, b"OLD");
        let pin = Pinner::new(1).unwrap().pin(m.range).unwrap();
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, 0, PAGE_SIZE).unwrap();
        assert_eq!(cpu_sees(&m, 3), "\0\0\0");
        m.write(0, b"NEW");
        assert_eq!(device_sees(&pin, 3), "OLD", "the pin outlives its Pinner, too");
    });
}

#[test]
fn fork_leaves_the_parent_coherent_and_refuses_the_child() {
    fn here() {}
    live(here, || {
        let (m, pinner, pin) = old();
        let ok = fork(|| {
            m.write(0, b"CHI");
            assert!(matches!(pin.read_through(0, &mut [0]), Err(PinError::Forked)));
            assert!(matches!(pinner.pin(m.range), Err(PinError::Forked)));
        });
        assert!(ok);
        m.write(0, b"PAR");
        assert_eq!(device_sees(&pin, 3), "PAR", "fork copied the pinned page for the child");
    });
}

#[test]
fn the_parents_pin_survives_the_childs_drop() {
    fn here() {}
    live(here, || {
        let (m, _pinner, pin) = old();
        let mut pin = Some(pin);
        assert!(fork(|| drop(pin.take())));
        let pin = pin.unwrap();
        m.write(0, b"PAR");
        assert_eq!(device_sees(&pin, 3), "PAR");
    });
}

#[test]
fn what_cannot_be_pinned_is_explained() {
    fn here() {}
    live(here, || {
        let pinner = Pinner::new(4).unwrap();
        let m = Memory::map(None, 2 * PAGE_SIZE, libc::PROT_READ, ANON, None).unwrap();
        let e = pinner.pin(m.range).unwrap_err();
        assert!(matches!(e, PinError::NotWritable { part, .. } if part == m.range), "{e}");
        let (range, second) = (m.range, Range::page(m.page(1)));
        m.mprotect(RW);
        Memory { range: second }.munmap();
        let e = pinner.pin(range).unwrap_err();
        assert!(matches!(e, PinError::Unmapped { hole, .. } if hole == second), "{e}");
        let long = Range::new(0x10_0000_0000, MAX_PIN + PAGE_SIZE).unwrap();
        assert!(matches!(pinner.pin(long), Err(PinError::TooLong(r)) if r == long));
        assert_eq!(pinner.pinned_bytes(), 0);
        // No failure has cost a slot.
        let pins: Vec<Pin> = (0..4).map(|_| pinner.pin(Range::page(m.page(0))).unwrap()).collect();
        assert!(matches!(pinner.pin(Range::page(m.page(0))), Err(PinError::NoSlot { slots: 4 })));
        assert!(matches!(pins[0].read_through(PAGE_SIZE - 1, &mut [0; 2]), Err(PinError::OutOfRange { .. })));
        assert!(matches!(pins[0].read_through(u64::MAX, &mut [0; 2]), Err(PinError::OutOfRange { .. })));
        let mut slots: Vec<u32> = pins.iter().map(Pin::slot).collect();
        slots.sort_unstable();
        assert_eq!(slots, [0, 1, 2, 3]);
        drop(pins);
        assert!(pinner.pin(Range::page(m.page(0))).is_ok());
    });
}

#[test]
fn a_shared_file_is_refused_and_a_private_one_is_not() {
    fn here() {}
    live(here, || {
        let exe = std::env::current_exe().unwrap();
        let path = exe.with_file_name(format!("userptr-pin-{}", std::process::id()));
        let file =
            File::create_new(&path).and_then(|_| File::options().read(true).write(true).open(&path)).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(PAGE_SIZE).unwrap();
        let pinner = Pinner::new(4).unwrap();
        let private = Memory::file(&file, PAGE_SIZE, libc::MAP_PRIVATE);
        assert!(pinner.pin(private.range).is_ok());
        const TMPFS_MAGIC: i64 = 0x0102_1994;
        if rustix::fs::fstatfs(&file).unwrap().f_type != TMPFS_MAGIC {
            let shared = Memory::file(&file, PAGE_SIZE, libc::MAP_SHARED);
            let e = pinner.pin(shared.range).unwrap_err();
            assert!(matches!(e, PinError::SharedFile { part, .. } if part == shared.range), "{e}");
        }
    });
}

#[test]
fn the_end_of_a_file_and_secrets_are_refused() {
    fn here() {}
    live(here, || {
        let pinner = Pinner::new(1).unwrap();
        let past_end = Memory::file(&memfd(PAGE_SIZE), 2 * PAGE_SIZE, libc::MAP_SHARED);
        let e = pinner.pin(past_end.range).unwrap_err();
        assert!(matches!(e, PinError::Refused { .. }), "{e}");
        assert!(pinner.pin(Range::page(past_end.page(0))).is_ok());
        if require(Capability::MemfdSecret) {
            let file = File::from(crate::sys::probe::memfd_secret().unwrap());
            file.set_len(PAGE_SIZE).unwrap();
            let secret = Memory::file(&file, PAGE_SIZE, libc::MAP_SHARED);
            secret.write(0, b"s");
            let e = pinner.pin(secret.range).unwrap_err();
            assert!(matches!(e, PinError::Refused { .. }), "{e}");
        }
    });
}

fn vm_pin_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn freed_memory_stays_pinned_until_unpinned() {
    fn here() {}
    live(here, || {
        let before = vm_pin_bytes();
        let m = Memory::anon(8 << 20);
        let pinner = Pinner::new(1).unwrap();
        let pin = pinner.pin(m.range).unwrap();
        assert_eq!((vm_pin_bytes() - before, pinner.pinned_bytes()), (8 << 20, 8 << 20));
        m.munmap();
        assert_eq!(vm_pin_bytes() - before, 8 << 20);
        pin.unpin().unwrap();
        assert_eq!((vm_pin_bytes(), pinner.pinned_bytes()), (before, 0));
    });
}

#[test]
fn long_transfers_go_in_parts() {
    fn here() {}
    live(here, || {
        let len = 3 * CHUNK + 5 * PAGE_SIZE as usize;
        let m = Memory::anon(len as u64);
        let pin = Pinner::new(1).unwrap().pin(m.range).unwrap();
        let data: Vec<u8> = (0..len).map(|i| (i / 7 % 251) as u8).collect();
        // SAFETY: nobody has a reference to the test's memory.
        unsafe { pin.write_through(0, &data) }.unwrap();
        let mut back = vec![0; len - 100];
        pin.read_through(100, &mut back).unwrap();
        assert!(back == data[100..]);
        assert!(m.read(0, len) == data);
    });
}

#[test]
fn the_memlock_limit_is_named() {
    fn here() {}
    live(here, || {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let m = Memory::anon(4 << 20);
        let limit = Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
        setrlimit(Resource::Memlock, limit).unwrap();
        crate::testing::become_nobody();
        let pinner = Pinner::new(1).unwrap();
        let e = pinner.pin(m.range).unwrap_err();
        assert!(matches!(e, PinError::MemlockLimit { limit: Some(l), .. } if l == 1 << 20), "{e}");
        assert!(pinner.pin(Range::page(m.page(0))).is_ok());
    });
}

#[test]
fn a_ring_of_the_user_can_be_pinned_for() {
    fn here() {}
    live(here, || {
        let mut ring = IoUring::new(2).unwrap();
        ring.submitter().register_buffers_sparse(16).unwrap();
        let pinner = Pinner::on_ring(uring::descriptor(&ring).unwrap(), 10, 2).unwrap();
        let m = Memory::anon(PAGE_SIZE);
        m.write(0, b"OLD");
        let pins = [pinner.pin(m.range).unwrap(), pinner.pin(m.range).unwrap()];
        assert!(matches!(pinner.pin(m.range), Err(PinError::NoSlot { slots: 2 })));
        assert!(matches!(pins[0].read_through(0, &mut [0]), Err(PinError::NoDevice)));
        let file = memfd(0);
        let mut send = |slot: u32| {
            // SAFETY: from the pages to a file.
            unsafe { uring::transfer(&mut ring, Transfer::FromPages, &file, slot as u16, m.range.start(), 3) }
        };
        assert_eq!(send(pins[0].slot()).unwrap(), 3);
        assert_eq!(send(pins[1].slot()).unwrap(), 3);
        drop(pins);
        assert_eq!(send(10).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    });
}

#[test]
fn a_pinned_page_keeps_its_frame() {
    fn here() {}
    live(here, || {
        if !require(Capability::Pfn) || !require(Capability::Kpageflags) {
            return;
        }
        let m = Memory::anon(PAGE_SIZE);
        m.read(0, 1);
        let pages = Pages::open(PidOrSelf::Myself).unwrap();
        let zero = pages.detail(m.page(0)).unwrap();
        assert!(zero.flags.unwrap().contains(PageFlags::ZERO_PAGE));
        let pin = Pinner::new(1).unwrap().pin(m.range).unwrap();
        let pinned = pages.identity(m.page(0)).unwrap().pfn();
        assert_ne!(pinned, zero.identity.pfn(), "pinning for writing breaks away from the zero page");
        m.madvise(libc::MADV_PAGEOUT).unwrap();
        assert_eq!(pages.identity(m.page(0)).unwrap().pfn(), pinned);
        drop(pin);
    });
}

#[test]
fn slots_that_no_table_has_are_refused() {
    for (first, slots) in [(0, MAX_SLOTS + 1), (MAX_SLOTS, 1), (u32::MAX, 2)] {
        let ring = std::fs::File::open("/dev/null").unwrap().into();
        assert!(
            matches!(Pinner::on_ring(ring, first, slots), Err(PinError::NoTable { .. })),
            "{first} {slots}"
        );
    }
}
