// SPDX-License-Identifier: MIT OR Apache-2.0
//! docs/tutorial.md says what happens to its driver with one mistake or another: so it does. (Its listings are run as they
//! stand, as documentation tests.)

use mmu_check::own::*;

static LOCK: LockClass = LockClass::new("my lock");

const NONE: u8 = 0;
const NO_SECOND_LOOK: u8 = 1;
const LOOKS_BEFORE_LOCK: u8 = 2;
const GETS_UNDER_LOCK: u8 = 3;
const NO_FLUSH: u8 = 4;
const FIRST_TRY: u8 = 5;

struct Mine<const MISTAKE: u8>(Mutex<()>);

impl<const MISTAKE: u8> Mirror for Mine<MISTAKE> {
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
        if MISTAKE == GETS_UNDER_LOCK {
            let _locked = self.0.lock(cx);
            let got = port.get_page(cx, page, access)?;
            port.map(cx, page, &got, access);
            return Ok(());
        }
        if MISTAKE == FIRST_TRY {
            let got = port.get_page(cx, page, access)?;
            let _locked = self.0.lock(cx);
            port.map(cx, page, &got, access);
            return Ok(());
        }
        let seq = port.read_begin(cx);
        let got = port.get_page(cx, page, access)?;
        let early = MISTAKE == LOOKS_BEFORE_LOCK && port.read_retry(seq);
        let _locked = self.0.lock(cx);
        let late = matches!(MISTAKE, NONE | NO_FLUSH) && port.read_retry(seq);
        if !early && !late {
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
        let _locked = self.0.lock(cx);
        let moved = seq.set();
        port.unmap(cx, inv.range);
        if MISTAKE != NO_FLUSH {
            port.flush(cx, inv.range);
        }
        moved
    }
}

fn checked<const MISTAKE: u8>() -> Checked {
    check::<Mine<MISTAKE>>().paths(&["dontneed", "dontneed-bind"]).access(Access::Read).run()
}

fn rules(checked: &Checked) -> Vec<Rule> {
    checked.broken().map(|(_, rule, _)| rule).collect()
}

#[test]
fn the_page_shows_what_the_first_try_comes_to() {
    let page = include_str!("../../../docs/tutorial.md");
    let shown = page.split("```text\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a block");
    let said = checked::<FIRST_TRY>().to_string();
    // Which rule, in which cell, what happened; below that, every change of softmm moves a line.
    for (shown, said) in shown.lines().zip(said.lines()).take(3) {
        assert_eq!(shown, said);
    }
    assert!(shown.lines().count() > 3);
}

#[test]
fn without_a_mistake_it_is_safe() {
    checked::<NONE>().assert_safe();
}

#[test]
fn a_page_that_is_not_looked_at_again_is_used_after_it_was_freed() {
    assert!(rules(&checked::<NO_SECOND_LOOK>()).contains(&Rule::MemorySafety));
}

#[test]
fn looking_before_the_lock_is_not_enough() {
    assert!(rules(&checked::<LOOKS_BEFORE_LOCK>()).contains(&Rule::MemorySafety));
}

#[test]
fn getting_the_page_under_the_lock_is_a_cycle() {
    assert!(rules(&checked::<GETS_UNDER_LOCK>()).contains(&Rule::Locks));
}

#[test]
fn what_is_not_flushed_is_used_after_it_was_freed() {
    assert!(rules(&checked::<NO_FLUSH>()).contains(&Rule::MemorySafety));
}
