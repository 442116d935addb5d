// SPDX-License-Identifier: MIT OR Apache-2.0
//! What we need of bpf(2): maps and one kind of program.
//!
//! No clang, no BTF, no libbpf: the programs are a few dozen instructions, written with [`asm`].

pub(crate) mod asm;
#[cfg(test)]
pub(crate) mod run;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use asm::Insn;

const BPF_MAP_CREATE: u32 = 0;
const BPF_PROG_LOAD: u32 = 5;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
const BPF_MAP_FREEZE: u32 = 22;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;
const BPF_PROG_TYPE_TRACEPOINT: u32 = 5;
const BPF_F_MMAPABLE: u32 = 1 << 10;
/// The verifier gives up (EAGAIN) when the task has work to do, as for a signal: also what io_uring leaves to a thread
/// that has closed a ring, which no mask keeps away, and which is done when the call returns.
const LOAD_ATTEMPTS: u32 = 10;
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
    let mut attempts = 0..LOAD_ATTEMPTS;
    let error = loop {
        match bpf(BPF_PROG_LOAD, &mut attr) {
            Ok(fd) => return Ok(own(fd)),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && attempts.next().is_some() => {}
            Err(e) => break e,
        }
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
