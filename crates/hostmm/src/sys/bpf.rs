// SPDX-License-Identifier: MIT OR Apache-2.0
//! What we need of bpf(2): maps, one kind of program, and an assembler of a few instructions.
//!
//! No clang, no BTF, no libbpf: the programs are a few dozen instructions, written with the names below.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

const BPF_MAP_CREATE: u32 = 0;
const BPF_PROG_LOAD: u32 = 5;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
const BPF_MAP_FREEZE: u32 = 22;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;
const BPF_PROG_TYPE_TRACEPOINT: u32 = 5;
const BPF_F_MMAPABLE: u32 = 1 << 10;
/// Bytes of verifier log kept in an error.
const LOG_LEN: usize = 64 * 1024;

/// bpf(2) with an attribute of our own layout; the kernel takes a short attribute as one with zeros behind it.
fn bpf<T>(cmd: u32, attr: &mut T) -> io::Result<i32> {
    let attr: *mut T = attr;
    // SAFETY: `attr` points to `size_of::<T>()` initialised bytes, and every pointer inside is to a buffer that its
    // caller keeps alive over the call.
    match unsafe { libc::syscall(libc::SYS_bpf, cmd, attr, size_of::<T>()) } {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n as i32),
    }
}

fn own(fd: i32) -> OwnedFd {
    // SAFETY: a descriptor that bpf(2) just returned.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn object_name(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    for (to, from) in out.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    out
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

fn create_map(name: &str, map_type: u32, sizes: (u32, u32, u32), flags: u32) -> io::Result<OwnedFd> {
    let (key_size, value_size, max_entries) = sizes;
    let name = object_name(name);
    let mut attr =
        MapCreate { map_type, key_size, value_size, max_entries, flags, inner_map_fd: 0, numa_node: 0, name };
    bpf(BPF_MAP_CREATE, &mut attr).map(own)
}

/// An array of one entry of `len` bytes that can be mapped (Linux 5.5). One entry, because a program may hold a
/// direct pointer only into an array of one.
pub(crate) fn create_words(name: &str, len: u32) -> io::Result<OwnedFd> {
    create_map(name, BPF_MAP_TYPE_ARRAY, (4, len, 1), BPF_F_MMAPABLE)
}

/// A ring buffer of `len` bytes (a power of two, a multiple of the page size; Linux 5.8).
pub(crate) fn create_ring(name: &str, len: u32) -> io::Result<OwnedFd> {
    create_map(name, BPF_MAP_TYPE_RINGBUF, (0, 0, len), 0)
}

/// Makes the map read-only for user space, for good: no update, no writable mapping (Linux 5.2). Programs still write.
pub(crate) fn freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        map_fd: u32,
    }
    bpf(BPF_MAP_FREEZE, &mut Attr { map_fd: map.as_raw_fd() as u32 }).map(drop)
}

/// Why a program was not loaded.
#[derive(Debug, thiserror::Error)]
#[error("BPF_PROG_LOAD: {error}{}", if log.is_empty() { String::new() } else { format!("; the verifier says:\n{log}") })]
pub(crate) struct LoadError {
    pub(crate) error: io::Error,
    pub(crate) log: String,
}

/// Loads a tracepoint program. `license` decides which helpers it may call.
pub(crate) fn load_tracepoint(
    name: &str,
    code: &[Insn],
    license: &std::ffi::CStr,
) -> Result<OwnedFd, LoadError> {
    #[repr(C)]
    struct Attr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        name: [u8; 16],
    }
    let mut attr = Attr {
        prog_type: BPF_PROG_TYPE_TRACEPOINT,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        name: object_name(name),
    };
    let error = match bpf(BPF_PROG_LOAD, &mut attr) {
        Ok(fd) => return Ok(own(fd)),
        Err(e) => e,
    };
    // A log costs the verifier time and can itself fail the load (ENOSPC), so it is asked for only now.
    let mut log = vec![0u8; LOG_LEN];
    attr.log_level = 1;
    attr.log_size = LOG_LEN as u32;
    attr.log_buf = log.as_mut_ptr() as u64;
    match bpf(BPF_PROG_LOAD, &mut attr) {
        Ok(fd) => Ok(own(fd)),
        Err(_) => {
            log.truncate(log.iter().position(|b| *b == 0).unwrap_or(LOG_LEN));
            let log = String::from_utf8_lossy(&log).trim_end().to_owned();
            Err(LoadError { error, log })
        }
    }
}

/// Id of the program, and how often it was skipped because another one was running on that CPU (Linux 5.12).
fn id_and_misses(prog: BorrowedFd<'_>) -> io::Result<(u32, u64)> {
    /// Offset of `recursion_misses` in struct bpf_prog_info.
    const MISSES: usize = 208;
    #[repr(C)]
    struct Attr {
        fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut info = [0u64; (MISSES + 8) / 8];
    let mut attr = Attr {
        fd: prog.as_raw_fd() as u32,
        info_len: size_of_val(&info) as u32,
        info: info.as_mut_ptr() as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(((info[0] >> 32) as u32, info[MISSES / 8]))
}

/// A loaded program, kept for its statistics.
///
/// Not an `OwnedFd`: this descriptor stays open for long and nothing depends on it, so code that closes all descriptors
/// may close it and somebody else may get its number. The program's id tells.
#[derive(Debug)]
pub(crate) struct Program {
    fd: i32,
    id: u32,
}

impl Program {
    /// Keeps `prog` open.
    pub(crate) fn keep(prog: OwnedFd) -> io::Result<Program> {
        let (id, _) = id_and_misses(prog.as_fd())?;
        Ok(Program { fd: prog.into_raw_fd(), id })
    }

    /// How often the kernel skipped it; `None` if it cannot be known (any more).
    pub(crate) fn misses(&self) -> Option<u64> {
        // SAFETY: borrowed for one call, which fails cleanly on whatever else the number stands for.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        id_and_misses(fd).ok().filter(|(id, _)| *id == self.id).map(|(_, misses)| misses)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.misses().is_some() {
            // SAFETY: still our program's descriptor, and ours to close.
            unsafe { libc::close(self.fd) };
        }
    }
}

/// One instruction, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Insn {
    op: u8,
    /// Destination in the low half, source in the high half.
    regs: u8,
    off: i16,
    imm: i32,
}

/// A register: R0 is the result, R1 to R5 are arguments and lost in a call, R6 to R9 survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
}

/// A condition of a jump, on unsigned 64-bit values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cond {
    Eq,
    Ge,
    Le,
}

impl Cond {
    fn bits(self) -> u8 {
        match self {
            Cond::Eq => 0x10,
            Cond::Ge => 0x30,
            Cond::Le => 0xb0,
        }
    }
}

/// A helper function of the kernel that a program may call. None of these is for GPL-compatible programs only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Helper {
    /// bpf_ktime_get_ns: CLOCK_MONOTONIC (any licence since Linux 5.8).
    KtimeGetNs = 5,
    /// bpf_get_smp_processor_id.
    GetSmpProcessorId = 8,
    /// bpf_get_current_pid_tgid: of the initial pid namespace.
    GetCurrentPidTgid = 14,
    /// bpf_ringbuf_reserve(map, size, flags): null when full.
    RingbufReserve = 131,
    /// bpf_ringbuf_submit(record, flags).
    RingbufSubmit = 132,
}

/// A place in the code that jumps can name before it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// An assembler: push instructions, place labels, then [`Asm::finish`].
#[derive(Debug, Default)]
pub(crate) struct Asm {
    code: Vec<Insn>,
    labels: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

impl Asm {
    fn push(&mut self, op: u8, dst: Reg, src: u8, off: i16, imm: i32) {
        self.code.push(Insn { op, regs: dst as u8 | (src << 4), off, imm });
    }

    /// A label that is not placed yet.
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Places `label` before the next instruction.
    pub(crate) fn place(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    /// `dst = src`
    pub(crate) fn mov(&mut self, dst: Reg, src: Reg) {
        self.push(0xbf, dst, src as u8, 0, 0);
    }

    /// `dst = imm`
    pub(crate) fn mov_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0xb7, dst, 0, 0, imm);
    }

    /// `dst = imm`, all 64 bits
    pub(crate) fn load_imm64(&mut self, dst: Reg, imm: u64) {
        self.push(0x18, dst, 0, 0, imm as u32 as i32);
        self.code.push(Insn { op: 0, regs: 0, off: 0, imm: (imm >> 32) as i32 });
    }

    /// `dst = map` (BPF_PSEUDO_MAP_FD)
    pub(crate) fn load_map(&mut self, dst: Reg, map: BorrowedFd<'_>) {
        self.push(0x18, dst, 1, 0, map.as_raw_fd());
        self.code.push(Insn { op: 0, regs: 0, off: 0, imm: 0 });
    }

    /// `dst = &map[0] + offset` (BPF_PSEUDO_MAP_VALUE)
    pub(crate) fn load_map_value(&mut self, dst: Reg, map: BorrowedFd<'_>, offset: u32) {
        self.push(0x18, dst, 2, 0, map.as_raw_fd());
        self.code.push(Insn { op: 0, regs: 0, off: 0, imm: offset as i32 });
    }

    /// `dst = *(u64 *)(src + off)`
    pub(crate) fn load(&mut self, dst: Reg, src: Reg, off: i16) {
        self.push(0x79, dst, src as u8, off, 0);
    }

    /// `*(u64 *)(dst + off) = src`
    pub(crate) fn store(&mut self, dst: Reg, off: i16, src: Reg) {
        self.push(0x7b, dst, src as u8, off, 0);
    }

    /// `*(u64 *)(dst + off) += src`, atomically. Without BPF_FETCH: `lock add` on x86, every kernel since 3.19.
    pub(crate) fn atomic_add(&mut self, dst: Reg, off: i16, src: Reg) {
        self.push(0xdb, dst, src as u8, off, 0);
    }

    /// `dst += src`
    pub(crate) fn add(&mut self, dst: Reg, src: Reg) {
        self.push(0x0f, dst, src as u8, 0, 0);
    }

    /// `dst += imm`
    pub(crate) fn add_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0x07, dst, 0, 0, imm);
    }

    /// `dst -= src`
    pub(crate) fn sub(&mut self, dst: Reg, src: Reg) {
        self.push(0x1f, dst, src as u8, 0, 0);
    }

    /// `dst &= imm`, the immediate extended with its sign
    pub(crate) fn and_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0x57, dst, 0, 0, imm);
    }

    /// `dst <<= imm`
    pub(crate) fn shl_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0x67, dst, 0, 0, imm);
    }

    /// `dst >>= imm`, unsigned
    pub(crate) fn shr_imm(&mut self, dst: Reg, imm: i32) {
        self.push(0x77, dst, 0, 0, imm);
    }

    /// `goto label`
    pub(crate) fn jump(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(0x05, Reg::R0, 0, 0, 0);
    }

    /// `if (dst cond src) goto label`
    pub(crate) fn jump_if(&mut self, dst: Reg, cond: Cond, src: Reg, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(0x05 | 0x08 | cond.bits(), dst, src as u8, 0, 0);
    }

    /// `if (dst cond imm) goto label`, the immediate extended with its sign
    pub(crate) fn jump_if_imm(&mut self, dst: Reg, cond: Cond, imm: i32, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.push(0x05 | cond.bits(), dst, 0, 0, imm);
    }

    /// `R0 = helper(R1, ..., R5)`
    pub(crate) fn call(&mut self, helper: Helper) {
        self.push(0x85, Reg::R0, 0, 0, helper as i32);
    }

    /// `return R0`
    pub(crate) fn exit(&mut self) {
        self.push(0x95, Reg::R0, 0, 0, 0);
    }

    /// The code, with its jumps resolved. `None` if a label was never placed or a jump is too far.
    pub(crate) fn finish(mut self) -> Option<Vec<Insn>> {
        for (at, label) in self.jumps {
            let target = self.labels[label.0]? as i64;
            self.code[at].off = i16::try_from(target - at as i64 - 1).ok()?;
        }
        Some(self.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_count_from_the_instruction_after_them() {
        let mut asm = Asm::default();
        let (top, out) = (asm.label(), asm.label());
        asm.place(top);
        asm.mov_imm(Reg::R0, 1);
        asm.jump_if_imm(Reg::R0, Cond::Eq, 1, out);
        asm.jump(top);
        asm.place(out);
        asm.exit();
        let code = asm.finish().unwrap();
        assert_eq!(code[1].off, 1);
        assert_eq!(code[2].off, -3);
        assert_eq!(code[1].op, 0x15);
    }

    #[test]
    fn a_label_that_was_never_placed_is_refused() {
        let mut asm = Asm::default();
        let out = asm.label();
        asm.jump(out);
        assert!(asm.finish().is_none());
    }

    #[test]
    fn a_64_bit_immediate_takes_two_slots() {
        let mut asm = Asm::default();
        asm.load_imm64(Reg::R3, 0x1122_3344_5566_7788);
        let code = asm.finish().unwrap();
        assert_eq!((code[0].imm, code[1].imm), (0x5566_7788, 0x1122_3344));
        assert_eq!(size_of::<Insn>(), 8);
    }
}
