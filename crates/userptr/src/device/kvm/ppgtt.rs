// SPDX-License-Identifier: MIT OR Apache-2.0
//! Device page tables: four levels of x86-64, one tree for each address space.
//!
//! The host never writes an entry that the guest may have used. KVM without EPT or NPT shadows these tables and does
//! not see what the host stores into them, so changes are worked out here, as runs of entries ([`Update`]), and the
//! command processor writes them. That is as right with EPT or NPT, where it costs nothing.
//!
//! Invariants:
//! * an update is executed to its end before the next one is worked out: what is in memory is the truth;
//! * a table goes back to the pool when the update that unlinked it has been executed, with a flush;
//! * entries of two address spaces never point to the same table, but for the system's.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use super::layout::{LARGE, PAGE, POOL, SHARED_PDPT, SYSTEM, SYSTEM_LEN};
use super::memory::SystemMemory;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
pub(super) const LARGE_PAGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// What entries that point to tables have: rights are the leaf's business.
pub(super) const PRESENT_RW: u64 = PRESENT | WRITABLE | USER;
const ENTRIES: u64 = 512;

/// `count` entries from guest physical address `at` on: `first`, `first + step`, ...
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) at: u64,
    pub(super) first: u64,
    pub(super) step: u64,
    pub(super) count: u64,
}

/// A change of an address space.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// To be written in order.
    pub(super) runs: Vec<Run>,
    /// May the processor have cached what it takes away? Then it needs a flush.
    pub(super) takes_away: bool,
    /// Tables that it takes from the pool.
    taken: HashSet<u64>,
    /// Tables that it unlinks.
    freed: Vec<u64>,
}

/// A change that is being worked out.
#[derive(Debug)]
pub(super) struct Update<'a> {
    memory: &'a SystemMemory,
    pool: &'a mut Pool,
    plan: Plan,
    /// Links that it writes.
    links: HashMap<u64, u64>,
}

/// The pool is used up.
#[derive(Debug)]
pub(super) struct NoTables;

/// Tables that no address space uses.
#[derive(Debug)]
pub(super) struct Pool {
    free: Vec<u64>,
    /// Those from here on have never been used.
    fresh: u64,
}

impl Pool {
    pub(super) fn new() -> Pool {
        Pool { free: Vec::new(), fresh: POOL }
    }

    fn take(&mut self) -> Result<u64, NoTables> {
        if let Some(table) = self.free.pop() {
            return Ok(table);
        }
        if self.fresh == SYSTEM_LEN {
            return Err(NoTables);
        }
        self.fresh += PAGE;
        Ok(self.fresh - PAGE)
    }

    /// Leaves so many.
    #[cfg(test)]
    pub(super) fn shrink(&mut self, tables: u64) {
        self.free.clear();
        self.fresh = SYSTEM_LEN - tables * PAGE;
    }

    /// The update was not executed.
    pub(super) fn abandon(&mut self, plan: Plan) {
        self.free.extend(plan.taken);
    }

    /// The update was executed, and flushed if it took anything away.
    pub(super) fn settle(&mut self, plan: Plan) {
        self.free.extend(plan.freed);
    }
}

/// Index of the entry for `va` in a table of `level`, as an offset. Level 1 has the pages, level 4 is the top.
fn offset(va: u64, level: u32) -> u64 {
    (va >> (12 + 9 * (level - 1))) % ENTRIES * 8
}

/// Is this the entry that every address space shares?
fn is_system(table: u64, at: u64, level: u32) -> bool {
    level == 4 && at == table + offset(SYSTEM, 4)
}

impl<'a> Update<'a> {
    pub(super) fn new(memory: &'a SystemMemory, pool: &'a mut Pool) -> Update<'a> {
        Update { memory, pool, plan: Plan::default(), links: HashMap::new() }
    }

    /// What it comes to.
    pub(super) fn plan(self) -> Plan {
        self.plan
    }

    /// A new, empty address space: its top table.
    pub(super) fn create(&mut self) -> Result<u64, NoTables> {
        let root = self.table()?;
        self.link(root + offset(SYSTEM, 4), SHARED_PDPT);
        Ok(root)
    }

    fn table(&mut self) -> Result<u64, NoTables> {
        let table = self.pool.take()?;
        self.plan.taken.insert(table);
        // Also one that is all zeroes in memory: a shadow of its former self may be left.
        self.plan.runs.push(Run { at: table, first: 0, step: 0, count: ENTRIES });
        Ok(table)
    }

    fn link(&mut self, at: u64, table: u64) {
        let entry = if table == 0 { 0 } else { table | PRESENT_RW };
        self.links.insert(at, entry);
        self.plan.runs.push(Run { at, first: entry, step: 0, count: 1 });
    }

    /// The entry at `at`, once the update so far has been executed. Not for leaves that it wrote.
    fn entry(&self, at: u64) -> u64 {
        match self.links.get(&at) {
            Some(entry) => *entry,
            None if self.plan.taken.contains(&(at & !(PAGE - 1))) => 0,
            None => self.memory.word(at).load(Ordering::Relaxed),
        }
    }

    /// Maps `len` bytes at guest physical address `gpa` from `va` on, where nothing is mapped: whole pages, large ones
    /// where both addresses are aligned to them.
    pub(super) fn map(
        &mut self,
        root: u64,
        va: u64,
        gpa: u64,
        len: u64,
        writable: bool,
    ) -> Result<(), NoTables> {
        let flags = PRESENT | USER | NO_EXECUTE | if writable { WRITABLE } else { 0 };
        let mut done = 0;
        while done < len {
            let (va, gpa, left) = (va + done, gpa + done, len - done);
            let directory = self.descend(root, va, 2)?;
            let at = directory + offset(va, 2);
            let entry = self.entry(at);
            let fits = left >= LARGE && va.is_multiple_of(LARGE) && gpa.is_multiple_of(LARGE);
            if fits && (entry & PRESENT == 0 || self.is_empty(entry & ADDRESS)) {
                if entry & PRESENT != 0 {
                    self.plan.freed.push(entry & ADDRESS);
                    self.plan.takes_away = true;
                }
                self.plan.runs.push(Run { at, first: gpa | flags | LARGE_PAGE, step: 0, count: 1 });
                done += LARGE;
            } else {
                let table = self.descend(root, va, 1)?;
                let bytes = left.min(LARGE - va % LARGE);
                let run =
                    Run { at: table + offset(va, 1), first: gpa | flags, step: PAGE, count: bytes / PAGE };
                self.plan.runs.push(run);
                done += bytes;
            }
        }
        Ok(())
    }

    /// The table of `level` for `va`, linked if it was not.
    fn descend(&mut self, root: u64, va: u64, level: u32) -> Result<u64, NoTables> {
        let mut table = root;
        for above in (level + 1..=4).rev() {
            let at = table + offset(va, above);
            let entry = self.entry(at);
            table = if entry & PRESENT == 0 {
                let new = self.table()?;
                self.link(at, new);
                new
            } else {
                entry & ADDRESS
            };
        }
        Ok(table)
    }

    /// Takes the mapping `[va, va + len)` away, exactly as it was mapped.
    ///
    /// Its tables stay linked: to write a link is dear where tables are shadowed, and memory at the same addresses
    /// comes back often. See [`Update::prune`].
    pub(super) fn unmap(&mut self, root: u64, va: u64, len: u64) {
        self.plan.takes_away = true;
        let end = va + len;
        let mut va = va;
        while va < end {
            let step = (LARGE - va % LARGE).min(end - va);
            if let Some(at) = self.find(root, va, 2) {
                let entry = self.entry(at);
                if entry & (PRESENT | LARGE_PAGE) == PRESENT | LARGE_PAGE {
                    self.plan.runs.push(Run { at, first: 0, step: 0, count: 1 });
                } else if entry & PRESENT != 0 {
                    let at = (entry & ADDRESS) + offset(va, 1);
                    self.plan.runs.push(Run { at, first: 0, step: 0, count: step / PAGE });
                }
            }
            va += step;
        }
    }

    /// Is nothing in this last-level table, which is linked?
    fn is_empty(&self, table: u64) -> bool {
        (table..table + PAGE).step_by(8).all(|at| self.memory.word(at).load(Ordering::Relaxed) == 0)
    }

    /// Unlinks every last-level table with nothing in it.
    pub(super) fn prune(&mut self, root: u64) {
        self.prune_below(root, 4);
    }

    fn prune_below(&mut self, table: u64, level: u32) {
        for at in (table..table + PAGE).step_by(8) {
            let entry = self.memory.word(at).load(Ordering::Relaxed);
            if entry & (PRESENT | LARGE_PAGE) != PRESENT || is_system(table, at, level) {
                continue;
            }
            let below = entry & ADDRESS;
            if level > 2 {
                self.prune_below(below, level - 1);
            } else if self.is_empty(below) {
                self.link(at, 0);
                self.plan.freed.push(below);
                self.plan.takes_away = true;
            }
        }
    }

    /// Guest physical address of the entry for `va` in the table of `level`, if there is that table.
    fn find(&self, root: u64, va: u64, level: u32) -> Option<u64> {
        let mut table = root;
        for above in (level + 1..=4).rev() {
            let entry = self.entry(table + offset(va, above));
            if entry & PRESENT == 0 {
                return None;
            }
            table = entry & ADDRESS;
        }
        Some(table + offset(va, level))
    }

    /// Gives every table of the address space back. Nothing must run in it any more, and it is never loaded again.
    pub(super) fn destroy(&mut self, root: u64) {
        self.tables(root, 4);
    }

    fn tables(&mut self, table: u64, level: u32) {
        self.plan.freed.push(table);
        if level == 1 {
            return;
        }
        for at in (table..table + PAGE).step_by(8) {
            let entry = self.memory.word(at).load(Ordering::Relaxed);
            if entry & (PRESENT | LARGE_PAGE) == PRESENT && !is_system(table, at, level) {
                self.tables(entry & ADDRESS, level - 1);
            }
        }
    }
}

/// Guest physical address that `va` is translated to, as the guest's processor would do it.
pub(super) fn translate(memory: &SystemMemory, root: u64, va: u64) -> Option<u64> {
    let mut table = root;
    for level in (1..=4).rev() {
        let entry = memory.word(table + offset(va, level)).load(Ordering::Relaxed);
        if entry & PRESENT == 0 {
            return None;
        }
        if level == 1 {
            return Some((entry & ADDRESS) + va % PAGE);
        }
        if entry & LARGE_PAGE != 0 {
            return Some((entry & ADDRESS) + va % LARGE);
        }
        table = entry & ADDRESS;
    }
    None
}
