// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver of docs/tutorial.md, without the second look: prints the counterexample that the page shows.

use mmu_check::own::*;

struct Mine {
    lock: Mutex<()>,
}

static LOCK: LockClass = LockClass::new("my lock");

impl Mirror for Mine {
    fn new() -> Mine {
        Mine { lock: Mutex::new(&LOCK, ()) }
    }

    fn fault(
        &self,
        cx: &mut MaySleep<'_>,
        port: &Port<'_>,
        page: PageAddr,
        access: Access,
    ) -> Result<(), FaultError> {
        let got = port.get_page(cx, page, access)?;
        let _locked = self.lock.lock(cx);
        port.map(cx, page, &got, access);
        Ok(())
    }

    fn invalidate(
        &self,
        cx: &mut MaySleep<'_>,
        port: &Port<'_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> SeqMoved {
        let _locked = self.lock.lock(cx);
        port.unmap(cx, inv.range);
        port.flush(cx, inv.range);
        seq.set()
    }
}

fn main() {
    let checked = check::<Mine>().paths(&["dontneed"]).access(Access::Read).run();
    println!("{checked}");
}
