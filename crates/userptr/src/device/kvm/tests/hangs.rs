// SPDX-License-Identifier: MIT OR Apache-2.0
//! What hangs, who waits for it, and who ends it.

use super::*;

#[test]
fn a_hung_batch_is_killed_and_the_others_go_on() {
    live("hangs::a_hung_batch_is_killed_and_the_others_go_on", Polling::default(), |cx, device, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let other = KvmContext::new(cx, device).unwrap();
        other.map_range(cx, memory.range(), Access::Write, None).unwrap();
        for round in 1..20 {
            let hung = context.submit_wait(cx, memory.at(0), 1).unwrap();
            let queued = submit(cx, context, &[store(&memory, 8, round)]);
            let doomed = submit(cx, &other, &[store(&memory, 16, 1), store(&memory, 20, 1)]);
            let later = submit(cx, &other, &[store(&memory, 24, round)]);
            assert!(matches!(hung.wait_interruptible(cx, Some(SOON)), Err(WaitError::TimedOut(SOON))));
            assert!(!queued.is_signaled());
            doomed.kill(cx, "not wanted");
            assert!(matches!(doomed.wait_interruptible(cx, Some(SOON)), Err(WaitError::TimedOut(_))));
            hung.kill(cx, "hung");
            assert!(matches!(hung.wait(cx), Err(FenceError::Killed { why }) if why == "hung"));
            queued.wait(cx).unwrap();
            assert!(matches!(doomed.wait(cx), Err(FenceError::Killed { why }) if why == "not wanted"));
            later.kill(cx, "too late, or not");
            let _ = later.wait(cx);
            run(cx, &other, &[store(&memory, 28, round)]).unwrap();
            assert_eq!(memory.word(8), round.into());
            assert_eq!(memory.word(16), 0);
            assert_eq!(memory.word(24) >> 32, round.into());
        }
    });
}

#[test]
fn a_semaphore_that_is_signaled_lets_go() {
    live("hangs::a_semaphore_that_is_signaled_lets_go", Polling::Never, |cx, _, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let held = context.submit_wait(cx, memory.at(0), 0x0403_0201).unwrap();
        let after = submit(cx, context, &[store(&memory, 8, 1)]);
        assert!(matches!(after.wait_interruptible(cx, Some(SOON)), Err(WaitError::TimedOut(_))));
        assert_eq!(memory.word(8), 0);
        memory.write(0, &[1, 2, 3, 4]);
        held.wait(cx).unwrap();
        after.wait(cx).unwrap();
        assert_eq!(memory.word(8), 1);
    });
}

#[test]
fn closing_a_context_ends_what_hangs_in_it() {
    live("hangs::closing_a_context_ends_what_hangs_in_it", Polling::default(), |cx, device, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let other = KvmContext::new(cx, device).unwrap();
        other.map_range(cx, memory.range(), Access::Read, None).unwrap();
        let hung = other.submit_wait(cx, memory.at(0), 1).unwrap();
        let behind = submit(cx, context, &[store(&memory, 8, 1)]);
        drop(other);
        assert!(matches!(hung.wait(cx), Err(FenceError::Killed { .. })));
        behind.wait(cx).unwrap();
        // The device ends with its last user, however busy.
        let hung = context.submit_wait(cx, memory.at(0), 1).unwrap();
        hung.kill(cx, "done");
        assert!(hung.wait(cx).is_err());
    });
}

#[test]
fn a_signal_interrupts_a_wait() {
    extern "C" fn nothing(_: i32) {}
    live("hangs::a_signal_interrupts_a_wait", Polling::default(), |cx, _, context| {
        let memory = Memory::new(1);
        context.map_range(cx, memory.range(), Access::Write, None).unwrap();
        let hung = context.submit_wait(cx, memory.at(0), 1).unwrap();
        let handler: extern "C" fn(i32) = nothing;
        // SAFETY: the handler does nothing; `signal` asks for SA_RESTART, under which many waits are not interrupted.
        unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        let (waiter, done) = (signal::thread_id(), AtomicBool::new(false));
        interleave::scope(cx, |scope, cx| {
            scope.spawn("signals", |cx| {
                while !done.load(interleave::Ordering::SeqCst) {
                    interleave::time::sleep(cx, SOON);
                    // SAFETY: the thread waits for this one, so its id is its own.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), waiter, libc::SIGUSR1) };
                }
            });
            assert!(matches!(hung.wait_interruptible(cx, None), Err(WaitError::Interrupted)));
            hung.kill(cx, "enough");
            // Signals go on; this wait is not for them.
            assert!(matches!(hung.wait(cx), Err(FenceError::Killed { .. })));
            done.store(true, interleave::Ordering::SeqCst);
        });
    });
}

#[test]
fn killing_a_context_leaves_the_updates_of_others() {
    live(
        "hangs::killing_a_context_leaves_the_updates_of_others",
        Polling::default(),
        |cx, device, context| {
            let memory = Memory::new(2);
            let other = KvmContext::new(cx, device).unwrap();
            other.map_range(cx, memory.range(), Access::Read, None).unwrap();
            let hung = other.submit_wait(cx, memory.at(0), 1).unwrap();
            let range = memory.range();
            interleave::scope(cx, |scope, cx| {
                // The update waits behind it, in whichever address space is loaded: the other's.
                let mapper = scope.spawn("mapper", |cx| {
                    context.map_range(cx, range, Access::Write, None).unwrap();
                });
                while device.inner.shared.queue.lock(cx).jobs.len() < 2 {
                    interleave::time::sleep(cx, Duration::from_millis(1));
                }
                other.kill(cx, "it hangs");
                mapper.join(cx).unwrap();
            });
            assert!(matches!(hung.wait(cx), Err(FenceError::Killed { .. })));
            run(cx, context, &[store(&memory, PAGE, 7)]).unwrap();
            assert_eq!(memory.word(PAGE), 7);
        },
    );
}
