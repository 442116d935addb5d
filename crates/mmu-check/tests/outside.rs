// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two drivers of somebody outside, with the public API alone: one that is right and one that forgets to look again.

use drivers::{Mirror, Port};
use interleave::{LockClass, MaySleep, Mutex};
use mmu_check::{Rule, check};
use mmu_notifier::{Access, Invalidation, PageAddr, SeqMoved, SetSeq};
use softmm::FaultError;

static LOCK: LockClass = LockClass::new("my lock");

/// `LOOKS_AGAIN`: it asks whether anything has changed before it maps.
struct Mine<const LOOKS_AGAIN: bool>(Mutex<()>);

impl<const LOOKS_AGAIN: bool> Mirror for Mine<LOOKS_AGAIN> {
    fn new() -> Self {
        Mine(Mutex::new(&LOCK, ()))
    }

    fn fault(
        &self,
        cx: &mut MaySleep<'_>,
        port: &Port<'_>,
        page: PageAddr,
        access: Access,
    ) -> Result<(), FaultError> {
        let seq = port.read_begin(cx);
        let got = port.get_page(cx, page, access)?;
        let _lock = self.0.lock(cx);
        if !(LOOKS_AGAIN && port.read_retry(seq)) {
            port.map(cx, page, &got, access);
        }
        Ok(())
    }

    fn invalidate(
        &self,
        cx: &mut MaySleep<'_>,
        port: &Port<'_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> SeqMoved {
        let _lock = self.0.lock(cx);
        let moved = seq.set();
        port.unmap(cx, inv.range);
        port.flush(cx, inv.range);
        moved
    }
}

#[test]
fn the_driver_that_looks_again_is_safe() {
    check::<Mine<true>>().paths(&["dontneed", "fork"]).run().assert_safe();
}

#[test]
fn the_driver_that_does_not_is_told_how_it_fails() {
    let checked = check::<Mine<false>>().paths(&["dontneed"]).run();
    assert!(!checked.safe());
    assert!(checked.broken().any(|(_, rule, _)| rule == Rule::MemorySafety));
    let told = checked.to_string();
    assert!(told.contains("invalidate_range_start") && told.contains("replay: "), "{told}");
    assert!(told.lines().count() <= 26, "{told}");
}

#[test]
fn nothing_checked_is_not_safe() {
    let checked = check::<Mine<true>>().paths(&["no such path"]).run();
    assert!(!checked.safe());
    assert_eq!(checked.to_string(), "the device never used the memory: nothing was checked");
}
