// SPDX-License-Identifier: MIT OR Apache-2.0
//! uprobes: a breakpoint is written into program text, and taken out again.
//!
//! Notifier sequence: `uprobe_write` replaces the mapped page-cache page by an anonymous copy that holds the
//! breakpoint: range_start over the page. Only private, executable, never-writable mappings are probed, so no device
//! can pin the page for writing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use mmu_notifier::PAGE_SIZE;

use super::Outcome::{Coherent, NotMappable, Stale};
use super::mem::{self, Region};
use super::scene::{After, Arena, Change, Scene, Undo};
use super::{DisturbError, Event, Need, Via};

/// A page of `nop`: every offset is the start of an instruction that may be probed.
const NOPS: u64 = 0x9090_9090_9090_9090;
/// The same with `int3` as its first byte (little endian).
const PROBED: u64 = 0x9090_9090_9090_90cc;

pub(super) const EVENTS: &[&[Event]] = &[&[
    Event::new(
        "uprobe_insert/raw",
        "uprobe_register -> install_breakpoint -> uprobe_write",
        Via::RawSyscall,
        insert,
    )
    .expect(NotMappable, Stale, "text moves to an anonymous copy with the breakpoint in it")
    .needs(&[Need::Uprobe]),
    Event::new(
        "uprobe_remove/raw",
        "uprobe_unregister -> remove_breakpoint -> uprobe_write",
        Via::RawSyscall,
        remove,
    )
    .expect(NotMappable, Coherent, "the byte is put back into the anonymous copy, which stays")
    .needs(&[Need::Uprobe]),
]];

/// A file of `nop`s, mapped as text; its path for as long as the scene lives.
fn text(arena: &mut Arena, undo: &mut Undo) -> Result<(Region, Vec<u8>), DisturbError> {
    let failed = |source| DisturbError::Call { what: "a file of nops", range: None, source };
    let name = format!("userptr-text-{:x}", arena.stamp());
    let path = arena.dir().join(name);
    let mut file = File::create_new(&path).map_err(failed)?;
    let gone = path.clone();
    undo.push(move || {
        let _ = fs::remove_file(gone);
    });
    file.write_all(&[0x90; PAGE_SIZE as usize]).map_err(failed)?;
    let file = OwnedFd::from(File::open(&path).map_err(failed)?);
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    let region = Region::map(undo, 1, prot, libc::MAP_PRIVATE, Some(&file))?;
    region.load();
    let mut name = path.as_os_str().as_bytes().to_vec();
    name.push(0);
    Ok((region, name))
}

fn pmu_type() -> io::Result<u32> {
    let text = fs::read_to_string("/sys/bus/event_source/devices/uprobe/type")?;
    text.trim().parse().map_err(io::Error::other)
}

/// A uprobe at offset 0 of the file, in this process; gone when the descriptor is closed.
fn probe(path: &[u8]) -> io::Result<OwnedFd> {
    // struct perf_event_attr of 72 bytes (PERF_ATTR_SIZE_VER1): type and size, then config1 = path, config2 = offset.
    let mut attr = [0_u64; 9];
    attr[0] = u64::from(pmu_type()?) | 72 << 32;
    attr[7] = path.as_ptr() as u64;
    let (pid, cpu, group, cloexec) = (0, u64::MAX, u64::MAX, 8);
    let args = [(&raw const attr) as u64, pid, cpu, group, cloexec, 0];
    // SAFETY: attr and path outlive the call, which reads them. A breakpoint goes into the text of the scene's file only.
    let fd = unsafe { mem::call(Via::RawSyscall, libc::SYS_perf_event_open, args, || -1) }?;
    // SAFETY: the call has just returned this descriptor, to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn insert(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let mut undo = Undo::default();
    let (region, path) = text(arena, &mut undo)?;
    Ok(Scene::new(region.range(), NOPS, After::Stamp(PROBED), undo, move |returned, undo| {
        let probe = probe(&path).map_err(region.failed("perf_event_open of a uprobe"))?;
        returned();
        undo.keep(probe);
        Ok(Change::Happened)
    }))
}

fn remove(arena: &mut Arena, _: Via) -> Result<Scene, DisturbError> {
    let mut undo = Undo::default();
    let (region, path) = text(arena, &mut undo)?;
    let probe = probe(&path).map_err(region.failed("perf_event_open of a uprobe"))?;
    Ok(Scene::new(region.range(), PROBED, After::Stamp(NOPS), undo, move |returned, _| {
        drop(probe);
        returned();
        Ok(Change::Happened)
    }))
}
