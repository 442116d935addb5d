// SPDX-License-Identifier: MIT OR Apache-2.0
//! Address spaces, their tables and windows.

use super::*;

#[test]
fn contexts_have_address_spaces_of_their_own() {
    live("spaces::contexts_have_address_spaces_of_their_own", Polling::default(), |cx, device, one| {
        let two = KvmContext::new(cx, device).unwrap();
        let (first, second, result) = (Memory::new(1), Memory::new(1), Memory::new(1));
        let at = DeviceAddr(0x7000_0000);
        one.map_range(cx, first.range(), Access::Write, Some(at)).unwrap();
        two.map_range(cx, second.range(), Access::Write, Some(at)).unwrap();
        for context in [one, &two] {
            context.map_range(cx, result.range(), Access::Write, None).unwrap();
        }
        for round in 0..200_u64 {
            first.write(0, &(2 * round).to_le_bytes());
            second.write(0, &(2 * round + 1).to_le_bytes());
            let load = [Command::Copy { dst: result.at(0), src: at, len: 8 }];
            run(cx, one, &load).unwrap();
            assert_eq!(result.word(0), 2 * round);
            run(cx, &two, &load).unwrap();
            assert_eq!(result.word(0), 2 * round + 1);
        }
        drop(two);
        run(cx, one, &[Command::Copy { dst: result.at(0), src: at, len: 8 }]).unwrap();
        assert_eq!(result.word(0), first.word(0));
    });
}

#[test]
fn what_was_unmapped_is_never_reached_again() {
    live("spaces::what_was_unmapped_is_never_reached_again", Polling::default(), |cx, device, context| {
        let result = Memory::new(1);
        context.map_range(cx, result.range(), Access::Write, None).unwrap();
        // Large pages in the middle, small ones at both ends, and all of them small.
        let pages = 3 * 512 + 100;
        let (one, two) = (Memory::new(pages), Memory::new(pages));
        one.write(1000 * PAGE, &1_u64.to_le_bytes());
        two.write(1000 * PAGE, &2_u64.to_le_bytes());
        let other = KvmContext::new(cx, device).unwrap();
        for round in 0..60_u64 {
            let like = |memory: &Memory| memory.at(0).0 % (2 << 20);
            let (memory, value) = if round % 2 == 0 { (&one, 1) } else { (&two, 2) };
            let skew = if round % 3 == 0 { 4096 } else { 0 };
            let at = DeviceAddr((1 << 40) + like(memory) + skew);
            let mapping = context.map_range(cx, memory.range(), Access::Read, Some(at)).unwrap();
            let load =
                [Command::Copy { dst: result.at(0), src: DeviceAddr(at.0 + (1000 * PAGE) as u64), len: 8 }];
            run(cx, context, &load).unwrap();
            assert_eq!(result.word(0), value, "round {round}");
            if round % 5 == 0 {
                run(cx, &other, &[]).unwrap();
            }
            context.unmap_range(cx, mapping);
            match run(cx, context, &load) {
                Err(FenceError::Fault(fault)) => assert_eq!(fault.access, Access::Read),
                other => panic!("round {round}: {other:?}"),
            }
        }
    });
}

#[test]
fn mappings_have_their_own_addresses_or_none_of_anothers() {
    live(
        "spaces::mappings_have_their_own_addresses_or_none_of_anothers",
        Polling::default(),
        |cx, _, context| {
            let memory = Memory::new(4);
            let own = context.map_range(cx, memory.range(), Access::Write, None).unwrap();
            assert_eq!(own.address(), memory.at(0));
            let again = context.map_range(cx, memory.range(), Access::Write, None).unwrap();
            assert_ne!(again.address(), memory.at(0));
            run(cx, context, &[Command::StoreDword { dst: again.address(), value: 5 }]).unwrap();
            assert_eq!(memory.word(0), 5);
            let refused = |cx: &mut MaySleep<'_>, at: u64| {
                let at = Some(DeviceAddr(at));
                let got = context.map_range(cx, memory.range(), Access::Write, at);
                assert!(matches!(got, Err(crate::device::DeviceError::Address { .. })), "{at:?}: {got:?}");
            };
            for at in
                [memory.at(PAGE).0, 4097, SYSTEM, SYSTEM - 4096, 1 << 47, (1 << 47) - 4096, u64::MAX - 4095]
            {
                refused(cx, at);
            }
            context.unmap_range(cx, again);
            context.unmap_range(cx, own);
            let own = context.map_range(cx, memory.range(), Access::Write, None).unwrap();
            assert_eq!(own.address(), memory.at(0));
        },
    );
}

#[test]
fn tables_are_found_again_or_missed_in_words() {
    live("spaces::tables_are_found_again_or_missed_in_words", Polling::default(), |cx, device, context| {
        let memory = Memory::new(1);
        memory.write(0, &42_u64.to_le_bytes());
        let result = Memory::new(1);
        context.map_range(cx, result.range(), Access::Write, None).unwrap();
        // Three levels below the top for the first of these, one more table for each of the others.
        device.inner.pool.lock(cx).shrink(2 + 8);
        let at = |n: u64| DeviceAddr((1 << 40) + n * (2 << 20));
        let map =
            |cx: &mut MaySleep<'_>, n: u64| context.map_range(cx, memory.range(), Access::Read, Some(at(n)));
        for n in 0..100 {
            let mapping = map(cx, n).unwrap();
            run(cx, context, &[Command::Copy { dst: result.at(0), src: at(n), len: 8 }]).unwrap();
            assert_eq!(result.word(0), 42);
            result.write(0, &[0; 8]);
            context.unmap_range(cx, mapping);
            assert!(run(cx, context, &[Command::Copy { dst: result.at(0), src: at(n), len: 8 }]).is_err());
        }
        let mut mappings: Vec<KvmMapping> = (0..8).map(|n| map(cx, n).unwrap()).collect();
        assert!(matches!(map(cx, 8), Err(crate::device::DeviceError::Full { .. })));
        context.unmap_range(cx, mappings.swap_remove(3));
        let mapping = map(cx, 8).unwrap();
        run(cx, context, &[Command::Copy { dst: result.at(0), src: at(8), len: 8 }]).unwrap();
        assert_eq!(result.word(0), 42);
        context.unmap_range(cx, mapping);
    });
}

#[test]
fn memory_may_lie_anywhere() {
    live("spaces::memory_may_lie_anywhere", Polling::default(), |cx, _, context| {
        let result = Memory::new(1);
        context.map_range(cx, result.range(), Access::Write, None).unwrap();
        let mut look = |range: Range, offset: u64| {
            let mapping = context.map_range(cx, range, Access::Read, None).unwrap();
            let src = DeviceAddr(mapping.address().0 + offset);
            run(cx, context, &[Command::Copy { dst: result.at(0), src, len: 8 }]).unwrap();
            context.unmap_range(cx, mapping);
            result.word(0)
        };
        // Across a window's end.
        let reserved = Memory::new((2 << 30) / PAGE);
        let end = (reserved.at(0).0 | ((1 << 30) - 1)) + 1;
        let across = (end - reserved.at(0).0) as usize;
        reserved.write(across - 4, &0x1122_3344_5566_7788_u64.to_le_bytes());
        let range = Range::new(end - PAGE as u64, 2 * PAGE as u64).unwrap();
        assert_eq!(look(range, PAGE as u64 - 4), 0x1122_3344_5566_7788);
        // What the kernel put there: the main thread's stack, in the last window, code, and the vdso.
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let of = |name: &str| {
            let line = maps.lines().find(|line| line.ends_with(name)).unwrap();
            let (start, rest) = line.split_once('-').unwrap();
            let end = rest.split_once(' ').unwrap().0;
            let hex = |text| u64::from_str_radix(text, 16).unwrap();
            Range::new(hex(start), hex(end) - hex(start)).unwrap()
        };
        let program = std::env::current_exe().unwrap();
        for name in ["[stack]", "[vdso]", program.to_str().unwrap()] {
            let range = of(name);
            // SAFETY: mapped and readable; the first page of a program or vdso is never written, nor is the far end of
            // a stack that is not in use.
            let cpu = unsafe { (range.start() as *const u64).read_volatile() };
            assert_eq!(look(range, 0), cpu, "{name}");
        }
    });
}
