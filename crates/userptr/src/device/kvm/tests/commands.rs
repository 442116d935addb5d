// SPDX-License-Identifier: MIT OR Apache-2.0
//! What commands do, and what may be submitted.

use super::*;

#[test]
fn every_command_does_what_it_says() {
    live("commands::every_command_does_what_it_says", Polling::default(), |cx, _, context| {
        let memory = Memory::new(16);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let bytes = pattern(2 * PAGE, 7);
        memory.write(100, &bytes);
        run(
            cx,
            context,
            &[Command::Copy { dst: memory.at(5 * PAGE + 3), src: memory.at(100), len: 2 * PAGE as u64 }],
        )
        .unwrap();
        assert_eq!(memory.read(5 * PAGE + 3, 2 * PAGE), bytes);
        assert_eq!(memory.read(5 * PAGE, 3), [0; 3]);
        assert_eq!(memory.read(7 * PAGE + 3, 1), [0]);
        run(
            cx,
            context,
            &[
                Command::Fill { dst: memory.at(8 * PAGE + 1), len: 5000, byte: 0xa5 },
                Command::Checksum { src: memory.at(101), len: 8111, result: memory.at(12 * PAGE) },
                Command::Compare {
                    a: memory.at(100),
                    b: memory.at(5 * PAGE + 3),
                    len: 8192,
                    result: memory.at(12 * PAGE + 8),
                },
                Command::StoreDword { dst: memory.at(5 * PAGE + 5000), value: 0x1234_5678 },
                Command::Compare {
                    a: memory.at(100),
                    b: memory.at(5 * PAGE + 3),
                    len: 8192,
                    result: memory.at(12 * PAGE + 16),
                },
                Command::Blit2d {
                    dst: memory.at(10 * PAGE),
                    dst_pitch: 50,
                    src: memory.at(100),
                    src_pitch: 100,
                    width: 20,
                    height: 3,
                },
            ],
        )
        .unwrap();
        assert_eq!(memory.read(8 * PAGE, 5002), [vec![0], vec![0xa5; 5000], vec![0]].concat());
        assert_eq!(memory.word(12 * PAGE), checksum(&bytes[1..8112]));
        assert_eq!(memory.word(12 * PAGE + 8), 8192);
        assert_eq!(memory.word(12 * PAGE + 16), 4997);
        for row in 0..3 {
            assert_eq!(memory.read(10 * PAGE + row * 50, 20), bytes[row * 100..][..20]);
            assert_eq!(memory.read(10 * PAGE + row * 50 + 20, 30), [0; 30]);
        }
    });
}

#[test]
fn a_batch_may_be_longer_than_the_ring() {
    live("commands::a_batch_may_be_longer_than_the_ring", Polling::default(), |cx, _, context| {
        const COMMANDS: usize = 20_000;
        let memory = Memory::new(COMMANDS * 4 / PAGE + 1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let mut batch: Vec<Command> = (0..COMMANDS).map(|n| store(&memory, n * 4, n as u32 + 1)).collect();
        run(cx, context, &batch).unwrap();
        let stored =
            |memory: &Memory, n: usize| u32::from_le_bytes(memory.read(n * 4, 4).try_into().unwrap());
        assert!((0..COMMANDS).all(|n| stored(&memory, n) == n as u32 + 1));
        batch.iter_mut().enumerate().for_each(|(n, command)| *command = store(&memory, n * 4, 0));
        for bad in [0, 1023, 1024, 5000, COMMANDS - 1] {
            let mut batch = batch.clone();
            batch[bad] = Command::StoreDword { dst: DeviceAddr(0x5000), value: 0 };
            match run(cx, context, &batch) {
                Err(FenceError::Fault(fault)) => assert_eq!(fault.command, bad),
                other => panic!("{other:?}"),
            }
            assert!((0..bad).all(|n| stored(&memory, n) == 0));
            assert!(bad + 1 == COMMANDS || stored(&memory, bad + 1) != 0);
        }
    });
}

#[test]
fn threads_share_the_device() {
    live("commands::threads_share_the_device", Polling::default(), |cx, device, _| {
        interleave::scope(cx, |scope, _| {
            for _ in 0..4 {
                scope.spawn("submitter", |cx| {
                    let context = KvmContext::new(cx, device).unwrap();
                    let memory = Memory::new(2);
                    let mapping = context.map_range(cx, memory.range(), Access::Write, None).unwrap();
                    for round in 0..300_u32 {
                        let batch = [
                            store(&memory, 0, round),
                            Command::Copy { dst: memory.at(PAGE), src: memory.at(0), len: 8 },
                        ];
                        run(cx, &context, &batch).unwrap();
                        assert_eq!(memory.word(PAGE), round.into());
                    }
                    context.unmap_range(cx, mapping);
                });
            }
        });
    });
}

#[test]
fn a_borrowed_batch_keeps_to_its_bytes() {
    live("commands::a_borrowed_batch_keeps_to_its_bytes", Polling::default(), |_, _, context| {
        let mut all = vec![7_u8; 3 * PAGE];
        let (before, rest) = all.split_at_mut(100);
        let (target, after) = rest.split_at_mut(5000);
        let from = pattern(5000, 9);
        let mut batch = context.batch();
        let (src, dst) = (batch.source(&from).unwrap(), batch.target(target).unwrap());
        for bad in [
            Command::Fill { dst, len: 5001, byte: 0 },
            Command::Fill { dst: DeviceAddr(dst.0 - 1), len: 2, byte: 0 },
            Command::Fill { dst: src, len: 1, byte: 0 },
            Command::Copy { dst, src: DeviceAddr(src.0 + 1), len: 5000 },
            Command::Checksum { src, len: 5000, result: DeviceAddr(dst.0 + 4993) },
        ] {
            assert!(matches!(batch.push(bad), Err(BatchError::NotBorrowed { .. })), "{bad:?}");
        }
        batch.push(Command::Copy { dst, src, len: 5000 }).unwrap();
        batch.run().unwrap();
        assert_eq!(target, from);
        assert!(before.iter().chain(after.iter()).all(|byte| *byte == 7));
        // The addresses are free again, and two buffers may share a page.
        let (left, right) = target.split_at_mut(50);
        let mut batch = context.batch();
        assert_eq!(batch.target(left).unwrap(), dst);
        let dst = batch.target(right).unwrap();
        batch.push(Command::Fill { dst, len: 10, byte: 1 }).unwrap();
        batch.run().unwrap();
        assert_eq!(
            (left.to_vec(), &right[..11]),
            (from[..50].to_vec(), &[[1; 10].as_slice(), &[from[60]]].concat()[..])
        );
        let mut batch = context.batch();
        assert!(matches!(batch.source(&[]), Err(BatchError::Range(_))));
        batch.run().unwrap();
    });
}

#[test]
fn polling_can_be_ended_and_begun() {
    live("commands::polling_can_be_ended_and_begun", Polling::Always, |cx, device, context| {
        let queue = &device.inner.shared.queue;
        for polling in [Polling::Never, Polling::For(SOON), Polling::Never] {
            device.set_polling(Polling::Always);
            run(cx, context, &[]).unwrap();
            assert!(!queue.is_idle());
            device.set_polling(polling);
            while !queue.is_idle() {
                interleave::time::sleep(cx, Duration::from_millis(1));
            }
            run(cx, context, &[]).unwrap();
        }
    });
}

#[test]
fn a_forked_child_is_refused() {
    live("commands::a_forked_child_is_refused", Polling::default(), |cx, device, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        // SAFETY: the child only asks and leaves.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: nothing is written, since it is refused.
            let submit = unsafe { context.submit(cx, &[store(&memory, 0, 1)]) };
            let refused = matches!(submit, Err(crate::device::SubmitError::Forked))
                && matches!(KvmContext::new(cx, device), Err(KvmError::Forked));
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!refused)) };
        }
        let mut status = 0;
        // SAFETY: our child.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
        run(cx, context, &[store(&memory, 0, 1)]).unwrap();
        assert_eq!(memory.word(0), 1);
    });
}
