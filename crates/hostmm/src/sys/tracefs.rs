// SPDX-License-Identifier: MIT OR Apache-2.0
//! Trace events by name: their id and where their fields lie.
//!
//! tracefs is read through an existing mount where there is one, else through a mount of our own that is attached
//! nowhere (fsopen, fsmount; Linux 5.2, CAP_SYS_ADMIN), so that nothing on the system changes.

use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A tracefs that can be read.
#[derive(Debug)]
pub(crate) struct Tracefs {
    root: OwnedFd,
}

/// Why an event cannot be described.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TracefsError {
    #[error("no tracefs: not mounted, and a mount of our own failed: {0}")]
    NoTracefs(io::Error),
    #[error("no permission to read tracefs: {0}")]
    Denied(io::Error),
    #[error("the kernel has no trace event {0}")]
    NoEvent(String),
    #[error("reading {path}: {error}")]
    Read { path: String, error: io::Error },
    #[error("{event}: {what}")]
    Format { event: String, what: String },
}

/// One field of a trace event's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    /// Bytes from the start of the record.
    pub(crate) offset: u32,
    /// Bytes.
    pub(crate) size: u32,
}

/// A trace event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// `attr.config` of perf_event_open.
    pub(crate) id: u64,
    fields: Vec<(String, Field)>,
    name: String,
}

impl Event {
    /// The field `name`, which must be an unsigned long on an 8-byte boundary.
    pub(crate) fn word(&self, name: &str) -> Result<Field, TracefsError> {
        let bad = |what: String| TracefsError::Format { event: self.name.clone(), what };
        let Some((_, field)) = self.fields.iter().find(|(n, _)| n == name) else {
            return Err(bad(format!("has no field `{name}`")));
        };
        if field.size != 8 || !field.offset.is_multiple_of(8) {
            return Err(bad(format!(
                "field `{name}` has {} bytes at offset {}, wanted 8 aligned ones",
                field.size, field.offset
            )));
        }
        Ok(*field)
    }
}

impl Tracefs {
    /// Opens the mounted tracefs, or mounts one that nobody else sees.
    pub(crate) fn open() -> Result<Tracefs, TracefsError> {
        let mut denied = None;
        for path in [c"/sys/kernel/tracing", c"/sys/kernel/debug/tracing"] {
            match open_dir(path) {
                Ok(root) if has_events(&root) => return Ok(Tracefs { root }),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => denied = Some(e),
                Err(_) => {}
            }
        }
        match detached_mount() {
            Ok(root) => Ok(Tracefs { root }),
            Err(e) => Err(match denied {
                Some(denied) => TracefsError::Denied(denied),
                None => TracefsError::NoTracefs(e),
            }),
        }
    }

    /// Reads the id and the format of `system:name`.
    pub(crate) fn event(&self, system: &str, name: &str) -> Result<Event, TracefsError> {
        let event = format!("{system}:{name}");
        let id = self.read(&format!("events/{system}/{name}/id"), &event)?;
        let id = id.trim().parse().map_err(|_| TracefsError::Format {
            event: event.clone(),
            what: format!("id is `{}`, not a number", id.trim()),
        })?;
        let format = self.read(&format!("events/{system}/{name}/format"), &event)?;
        let fields =
            parse_format(&format).map_err(|what| TracefsError::Format { event: event.clone(), what })?;
        Ok(Event { id, fields, name: event })
    }

    fn read(&self, path: &str, event: &str) -> Result<String, TracefsError> {
        let wrap = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => TracefsError::NoEvent(event.to_owned()),
            io::ErrorKind::PermissionDenied => TracefsError::Denied(error),
            _ => TracefsError::Read { path: path.to_owned(), error },
        };
        let cpath = CString::new(path).map_err(|e| wrap(io::Error::other(e)))?;
        // SAFETY: a NUL-terminated path below a directory descriptor that we own.
        let fd =
            unsafe { libc::openat(self.root.as_raw_fd(), cpath.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(wrap(io::Error::last_os_error()));
        }
        // SAFETY: a descriptor that openat just returned.
        let mut file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(wrap)?;
        Ok(text)
    }
}

/// The fields of a `format` file, in order. Lines look like `field:unsigned long start;  offset:8;  size:8;  signed:0;`.
fn parse_format(text: &str) -> Result<Vec<(String, Field)>, String> {
    let mut fields = Vec::new();
    for line in text.lines() {
        let Some(rest) = line.trim().strip_prefix("field:") else { continue };
        let mut parts = rest.split(';').map(str::trim);
        let declaration = parts.next().unwrap_or_default();
        // An array's name carries its length: `char comm[16]`.
        let name = declaration.rsplit(|c: char| c.is_whitespace() || c == '*').next().unwrap_or_default();
        let name = name.split('[').next().unwrap_or_default();
        if name.is_empty() {
            return Err(format!("a field without a name: `{}`", line.trim()));
        }
        let (mut offset, mut size) = (None, None);
        for part in parts {
            let value = |v: &str| v.trim().parse::<u32>().map_err(|_| format!("`{part}` of field `{name}`"));
            if let Some(v) = part.strip_prefix("offset:") {
                offset = Some(value(v)?);
            } else if let Some(v) = part.strip_prefix("size:") {
                size = Some(value(v)?);
            }
        }
        let (Some(offset), Some(size)) = (offset, size) else {
            return Err(format!("field `{name}` lacks its offset or size"));
        };
        fields.push((name.to_owned(), Field { offset, size }));
    }
    if fields.is_empty() {
        return Err("a format without fields".to_owned());
    }
    Ok(fields)
}

fn open_dir(path: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: a NUL-terminated path.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that open just returned.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// /sys/kernel/tracing is there, and empty, also where nothing is mounted on it.
fn has_events(root: &OwnedFd) -> bool {
    // SAFETY: a NUL-terminated path below a directory descriptor that we own.
    unsafe { libc::faccessat(root.as_raw_fd(), c"events".as_ptr(), libc::R_OK | libc::X_OK, 0) == 0 }
}

fn detached_mount() -> io::Result<OwnedFd> {
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const FSOPEN_CLOEXEC: u32 = 1;
    const FSMOUNT_CLOEXEC: u32 = 1;
    let own = |fd: libc::c_long| {
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the call just returned; descriptors fit an i32.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    };
    // SAFETY: fsopen(name, flags) with a NUL-terminated name.
    let fs = own(unsafe { libc::syscall(libc::SYS_fsopen, c"tracefs".as_ptr(), FSOPEN_CLOEXEC) })?;
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: fsconfig(fd, CMD_CREATE, NULL, NULL, 0) takes no pointers.
    if unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), FSCONFIG_CMD_CREATE, null, null, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fsmount(fd, flags, attributes) takes no pointers.
    own(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, 0u32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "name: kvm_unmap_hva_range\nID: 1234\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
        \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
        \tfield:unsigned long start;\toffset:8;\tsize:8;\tsigned:0;\n\
        \tfield:unsigned long end;\toffset:16;\tsize:8;\tsigned:0;\n\
        \tfield:char comm[16];\toffset:24;\tsize:16;\tsigned:0;\n\n\
        print fmt: \"mmu notifier unmap range: %#016lx -- %#016lx\", REC->start, REC->end\n";

    fn event(text: &str) -> Result<Event, String> {
        Ok(Event { id: 1, fields: parse_format(text)?, name: "kvm:x".to_owned() })
    }

    #[test]
    fn fields_are_found_by_name_with_offset_and_size() {
        let e = event(GOOD).unwrap();
        assert_eq!(e.word("start").unwrap(), Field { offset: 8, size: 8 });
        assert_eq!(e.word("end").unwrap(), Field { offset: 16, size: 8 });
        assert_eq!(e.fields.last().unwrap().0, "comm");
    }

    #[test]
    fn a_field_of_another_size_or_alignment_is_refused() {
        let e = event(&GOOD.replace("start;\toffset:8;\tsize:8", "start;\toffset:8;\tsize:4")).unwrap();
        assert!(e.word("start").is_err());
        let e = event(&GOOD.replace("start;\toffset:8", "start;\toffset:12")).unwrap();
        assert!(e.word("start").is_err());
        assert!(event(GOOD).unwrap().word("stop").is_err());
    }

    #[test]
    fn broken_formats_are_refused() {
        for bad in [
            "",
            "format:\n",
            "field:;\toffset:0;\tsize:8;\n",
            "field:unsigned long start;\n",
            "field:unsigned long start;\toffset:8;\n",
            "field:unsigned long start;\toffset:eight;\tsize:8;\n",
            "field:unsigned long start;\toffset:-8;\tsize:8;\n",
        ] {
            assert!(parse_format(bad).is_err(), "{bad:?}");
        }
    }
}
