// SPDX-License-Identifier: MIT OR Apache-2.0
//! The BPF program on the tracepoints: count, and where asked for report, each range.
//!
//! It runs inside mmu_notifier_invalidate_range_start, before the page tables change, with preemption off
//! (BPF_PROG_TYPE_TRACEPOINT runs under perf's tracepoint probe, which disables preemption itself on kernels where
//! tracepoints no longer do, 7.x). Two facts of kernel/trace/bpf_trace.c and trace_event_perf.c shape it:
//!
//! * its result decides whether perf goes on to the rings of *other* users of the tracepoint: it returns 1, so that
//!   `perf record -e kvm:kvm_unmap_hva_range` sees what it saw before;
//! * it filters by address only. A truncate by another process, process_madvise and kernel threads run in other
//!   tasks, so a filter by task would miss them; the same address in another process's VM costs a needless re-check.
//!
//! Order of the increments: the buckets, wide ones included, then the global counter, then the record. A reader takes them in
//! the opposite order, see [`super::Watch`].
//!
//! Licence: the helpers are bpf_ktime_get_ns, bpf_get_smp_processor_id, bpf_get_current_pid_tgid and
//! bpf_ringbuf_reserve/submit, none of them for GPL programs only (ktime since 5.8). The program says "Dual MIT/GPL".

use super::layout::{Buckets, Kind, LOST, Layout};
use crate::sys::bpf::asm::{Asm, Cond, Helper, Insn, Label, Reg};
use mmu_notifier::Range;
use std::os::fd::BorrowedFd;

/// Words in a record: kind and CPU, start, end, pid_tgid, ktime.
pub(crate) const RECORD_WORDS: usize = 5;

/// What a program is made for.
#[derive(Clone, Copy)]
pub(crate) struct Spec<'a> {
    pub(crate) kind: Kind,
    /// Offsets of `start` and `end` in the tracepoint's record.
    pub(crate) start: u32,
    pub(crate) end: u32,
    pub(crate) layout: Layout,
    /// Ranges that overlap neither of these are not counted; no window: all are.
    pub(crate) window: Option<Range>,
    pub(crate) canary: Range,
    pub(crate) counters: BorrowedFd<'a>,
    pub(crate) ring: Option<BorrowedFd<'a>>,
}

/// Assembles the program.
pub(crate) fn assemble(spec: &Spec<'_>) -> Option<Vec<Insn>> {
    use Reg::{R0, R1, R2, R6, R7, R8};
    let mut asm = Asm::default();
    let out = asm.label();
    // R6 = start, R7 = end, R8 = the counters: all survive calls.
    asm.load(R7, R1, i16::try_from(spec.end).ok()?);
    asm.load(R6, R1, i16::try_from(spec.start).ok()?);
    if let Some(window) = spec.window {
        let (canary, hit) = (asm.label(), asm.label());
        skip_unless_overlap(&mut asm, window, canary);
        asm.jump(hit);
        asm.place(canary);
        skip_unless_overlap(&mut asm, spec.canary, out);
        asm.place(hit);
        // Once more, so that the verifier does not know where they are: it would go through the loops once for each end.
        asm.load(R7, R1, i16::try_from(spec.end).ok()?);
        asm.load(R6, R1, i16::try_from(spec.start).ok()?);
    }
    asm.load_map_value(R8, spec.counters, 0);
    asm.mov_imm(R1, 1);
    bump_buckets(&mut asm, spec)?;
    asm.atomic_add(R8, Layout::global(spec.kind) as i16, R1);
    if let Some(ring) = spec.ring {
        let full = asm.label();
        asm.load_map(R1, ring);
        asm.mov_imm(R2, 8 * RECORD_WORDS as i32);
        asm.mov_imm(Reg::R3, 0);
        asm.call(Helper::RingbufReserve);
        asm.jump_if_imm(R0, Cond::Eq, 0, full);
        fill_record(&mut asm, spec.kind);
        asm.jump(out);
        asm.place(full);
        asm.mov_imm(R1, 1);
        asm.atomic_add(R8, LOST as i16, R1);
    }
    asm.place(out);
    asm.mov_imm(R0, 1);
    asm.exit();
    asm.finish()
}

/// Goes to `elsewhere` unless `[R6, R7)` overlaps `range`.
fn skip_unless_overlap(asm: &mut Asm, range: Range, elsewhere: Label) {
    asm.load_imm64(Reg::R2, range.start());
    asm.jump_if(Reg::R7, Cond::Le, Reg::R2, elsewhere);
    asm.load_imm64(Reg::R2, range.end());
    asm.jump_if(Reg::R6, Cond::Ge, Reg::R2, elsewhere);
}

/// One more in the bucket of each granule of `[R6, R7)`, or of each wide one: see [the layout](super::layout). R1 is 1
/// and R8 the counters before and after.
fn bump_buckets(asm: &mut Asm, spec: &Spec<'_>) -> Option<()> {
    use Reg::{R0, R2, R3, R6, R7};
    let Some(b) = spec.layout.buckets else { return Some(()) };
    let table = Table { at: i32::try_from(spec.layout.table(spec.kind)).ok()?, count: b.count };
    let at = i32::try_from(spec.layout.wide_table(spec.kind)).ok()?;
    let wide_table = Table { at, count: Buckets::WIDE_COUNT };
    let (wide, all, whole, ends, done) = (asm.label(), asm.label(), asm.label(), asm.label(), asm.label());
    asm.mov(R2, R6);
    asm.shr_imm(R2, b.granule_shift as i32);
    asm.mov(R3, R7);
    asm.add_imm(R3, -1);
    asm.shr_imm(R3, b.granule_shift as i32);
    // R3 = granules after the first one; an empty or backward range wraps to a huge number, and is everything.
    asm.sub(R3, R2);
    asm.jump_if_imm(R3, Cond::Ge, b.wide as i32, wide);
    table.bump(asm, Cond::Le);
    asm.jump(done);

    asm.place(wide);
    asm.jump_if_imm(R3, Cond::Ge, i32::try_from(Buckets::WIDE_MOST * b.wide).ok()?, all);
    // R0 = granules from R2 on that are not counted yet, R3 = those of them before the first whole wide one.
    asm.mov(R0, R3);
    asm.add_imm(R0, 1);
    asm.mov_imm(R3, 0);
    asm.sub(R3, R2);
    asm.and_imm(R3, b.wide as i32 - 1);
    asm.sub(R0, R3);
    asm.jump_if_imm(R3, Cond::Eq, 0, whole);
    table.bump(asm, Cond::Lt);
    asm.add(R2, R3);
    asm.place(whole);
    asm.and_imm(R2, LOW);
    asm.shr_imm(R2, b.wide_shift() as i32);
    asm.mov(R3, R0);
    asm.shr_imm(R3, b.wide_shift() as i32);
    asm.jump_if_imm(R3, Cond::Eq, 0, ends);
    wide_table.bump(asm, Cond::Lt);
    asm.add(R2, R3);
    asm.place(ends);
    asm.shl_imm(R2, b.wide_shift() as i32);
    asm.and_imm(R2, LOW);
    asm.mov(R3, R0);
    asm.and_imm(R3, b.wide as i32 - 1);
    asm.jump_if_imm(R3, Cond::Eq, 0, done);
    table.bump(asm, Cond::Lt);
    asm.jump(done);

    asm.place(all);
    wide_table.bump_all(asm);
    asm.place(done);
    Some(())
}

/// The bits of a granule's number that say which words are its own. Whatever the loop before has made of the rest is
/// cut off, so that the verifier has to look at the next loop once and not once for each length of that one.
const LOW: i32 = (1 << 30) - 1;

/// Words that are counted around.
#[derive(Clone, Copy)]
struct Table {
    /// Offset from R8.
    at: i32,
    /// A power of two.
    count: u32,
}

impl Table {
    /// R1 more in each word from the R2th on, as long as their number is (`Lt`: less than, `Le`: at most) R3; in one at
    /// least. The verifier must know how large R3 can be. R4, R5 and R9 are lost.
    fn bump(self, asm: &mut Asm, cond: Cond) {
        use Reg::{R1, R2, R3, R4, R5, R8, R9};
        let again = asm.label();
        asm.mov(R9, R8);
        asm.add_imm(R9, self.at);
        asm.mov_imm(R4, 0);
        asm.place(again);
        asm.mov(R5, R2);
        asm.add(R5, R4);
        asm.and_imm(R5, self.count as i32 - 1);
        asm.shl_imm(R5, 3);
        asm.add(R5, R9);
        asm.atomic_add(R5, 0, R1);
        asm.add_imm(R4, 1);
        asm.jump_if(R4, cond, R3, again);
    }

    /// R1 more in each word. R4 and R9 are lost.
    fn bump_all(self, asm: &mut Asm) {
        use Reg::{R1, R4, R8, R9};
        /// Words in a round: the verifier is done sooner with few long rounds.
        const ROUND: u32 = 32;
        let again = asm.label();
        asm.mov(R9, R8);
        asm.add_imm(R9, self.at);
        asm.mov_imm(R4, 0);
        asm.place(again);
        (0..ROUND as i16).for_each(|word| asm.atomic_add(R9, 8 * word, R1));
        asm.add_imm(R9, 8 * ROUND as i32);
        asm.add_imm(R4, 1);
        asm.jump_if_imm(R4, Cond::Lt, (self.count / ROUND) as i32, again);
    }
}

/// Fills and submits the record in R0.
fn fill_record(asm: &mut Asm, kind: Kind) {
    use Reg::{R0, R1, R2, R6, R7, R9};
    asm.mov(R9, R0);
    asm.store(R9, 8, R6);
    asm.store(R9, 16, R7);
    asm.call(Helper::GetSmpProcessorId);
    asm.load_imm64(R2, (kind as u64) << 32);
    asm.add(R0, R2);
    asm.store(R9, 0, R0);
    asm.call(Helper::GetCurrentPidTgid);
    asm.store(R9, 24, R0);
    asm.call(Helper::KtimeGetNs);
    asm.store(R9, 32, R0);
    asm.mov(R1, R9);
    asm.mov_imm(R2, 0);
    asm.call(Helper::RingbufSubmit);
}

#[cfg(test)]
mod tests;
