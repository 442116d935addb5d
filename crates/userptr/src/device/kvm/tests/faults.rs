// SPDX-License-Identifier: MIT OR Apache-2.0
//! What faults, and where.

use super::*;

#[test]
fn what_is_not_mapped_faults_with_its_address() {
    live("faults::what_is_not_mapped_faults_with_its_address", Polling::default(), |cx, _, context| {
        let memory = Memory::new(4);
        let read_only = Memory::new(1);
        memory.write(0, &pattern(4 * PAGE, 1));
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        context.map_range(cx, read_only.range(), Access::Read, None).unwrap();
        let fault = |cx: &mut MaySleep<'_>, batch: &[Command]| match run(cx, context, batch) {
            Err(FenceError::Fault(fault)) => fault,
            other => panic!("{other:?}"),
        };
        let nop = Command::Fill { dst: memory.at(0), len: 0, byte: 0 };
        let copy = |dst, src| Command::Copy { dst, src, len: 8192 };
        let far = DeviceAddr(0x1234_5000);
        let got = fault(cx, &[nop, copy(far, memory.at(0))]);
        assert_eq!(got, Fault { command: 1, addr: far, access: Access::Write });
        let got = fault(cx, &[copy(memory.at(0), far)]);
        assert_eq!(got, Fault { command: 0, addr: far, access: Access::Read });
        // The first byte that is not there, also in the middle of an access.
        let end = memory.at(4 * PAGE);
        let sum = Command::Checksum { src: memory.at(0), len: 100, result: memory.at(4 * PAGE - 3) };
        assert_eq!(fault(cx, &[sum]), Fault { command: 0, addr: end, access: Access::Write });
        let sum = Command::Checksum { src: memory.at(3 * PAGE + 1), len: 5000, result: memory.at(0) };
        assert_eq!(fault(cx, &[sum]), Fault { command: 0, addr: end, access: Access::Read });
        let store = Command::StoreDword { dst: read_only.at(8), value: 1 };
        let got = fault(cx, &[nop, nop, store, nop]);
        assert_eq!(got, Fault { command: 2, addr: read_only.at(8), access: Access::Write });
        // The system's own addresses, and those that no processor has.
        for at in [SYSTEM, SYSTEM + 0x8000, 1 << 47, u64::MAX - 9000] {
            let got = fault(cx, &[nop, copy(DeviceAddr(at), memory.at(0))]);
            assert_eq!(got, Fault { command: 1, addr: DeviceAddr(at), access: Access::Write });
        }
        run(cx, context, &[nop]).unwrap();
        assert_eq!(memory.read(0, 4 * PAGE), pattern(4 * PAGE, 1));
        assert_eq!(read_only.read(0, PAGE), [0; PAGE]);
    });
}

#[test]
fn what_the_program_has_not_faults_with_its_address() {
    live("faults::what_the_program_has_not_faults_with_its_address", Polling::default(), |cx, _, context| {
        let memory = Memory::new(8);
        memory.write(0, &pattern(8 * PAGE, 1));
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let fault = |cx: &mut MaySleep<'_>, batch: &[Command]| match run(cx, context, batch) {
            Err(FenceError::Fault(fault)) => fault,
            other => panic!("{other:?}"),
        };
        let copy = Command::Copy { dst: memory.at(10), src: memory.at(4 * PAGE + 5), len: 2 * PAGE as u64 };
        run(cx, context, &[copy]).unwrap();
        memory.unmap(5, 1);
        assert_eq!(fault(cx, &[copy]), Fault { command: 0, addr: memory.at(5 * PAGE), access: Access::Read });
        memory.protect(1, libc::PROT_READ);
        let copy = Command::Copy { dst: memory.at(10), src: memory.at(2 * PAGE + 5), len: 8000 };
        assert_eq!(fault(cx, &[copy]), Fault { command: 0, addr: memory.at(PAGE), access: Access::Write });
        memory.protect(1, libc::PROT_READ | libc::PROT_WRITE);
        run(cx, context, &[copy]).unwrap();
    });
}

/// Puts a poison marker at a page, as a hardware error would: whoever touches it gets SIGBUS. `false`: this kernel has
/// no such thing.
fn poison(memory: &Memory, page: usize) -> bool {
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
    const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
    const UFFDIO_POISON: libc::Ioctl = 0xc020_aa08_u32 as libc::Ioctl;
    const FEATURE_POISON: u64 = 1 << 14;
    let at = memory.at(page * PAGE).0;
    // SAFETY: each request gets the structure that it is about; the descriptor is left open for the process's life.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
        let ioctl = |request, words: &mut [u64]| libc::ioctl(fd, request, words.as_mut_ptr()) == 0;
        fd >= 0
            && ioctl(UFFDIO_API, &mut [0xaa, FEATURE_POISON, 0])
            && ioctl(UFFDIO_REGISTER, &mut [at, PAGE as u64, 1, 0])
            && ioctl(UFFDIO_POISON, &mut [at, PAGE as u64, 0, 0])
    }
}

#[test]
fn a_page_that_the_hardware_lost_faults() {
    live("faults::a_page_that_the_hardware_lost_faults", Polling::default(), |cx, _, context| {
        let memory = Memory::new(4);
        memory.write(0, &[1]);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        if !poison(&memory, 2) {
            testing::skip(Capability::Userfaultfd, "no UFFDIO_POISON");
            return;
        }
        let copy = Command::Copy { dst: memory.at(0), src: memory.at(2 * PAGE - 100), len: 1000 };
        match run(cx, context, &[copy]) {
            Err(FenceError::Fault(fault)) => {
                assert_eq!(fault, Fault { command: 0, addr: memory.at(2 * PAGE), access: Access::Read });
            }
            other => panic!("{other:?}"),
        }
        match run(cx, context, &[store(&memory, 2 * PAGE + 8, 1)]) {
            Err(FenceError::Fault(fault)) => {
                assert_eq!(fault, Fault { command: 0, addr: memory.at(2 * PAGE + 8), access: Access::Write });
            }
            other => panic!("{other:?}"),
        }
        run(cx, context, &[store(&memory, 8, 1)]).unwrap();
    });
}
