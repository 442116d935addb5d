// SPDX-License-Identifier: MIT OR Apache-2.0
//! The mappings of a watched program, as far as they could be seen: names for addresses.
//!
//! The maps are read when an address has no name (but not all the time), and before the mm ends. A mapping that came and
//! went between two looks has no name, and is said to have none.
//!
//! They are read through a descriptor that was opened when the mm was made: it stays about that mm, where the process
//! may have another one by now (and then reads as empty).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The maps of a program are not read more often than this.
const PAUSE: Duration = Duration::from_millis(5);

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) end: u64,
    /// File, `[heap]`, `[stack]`, or `anonymous`.
    pub(super) name: String,
    /// Where in its file it begins.
    pub(super) offset: u64,
    /// Memory of the program's own: not a file's.
    pub(super) anonymous: bool,
    /// Code.
    pub(super) executable: bool,
}

/// The mappings of one mm.
#[derive(Debug, Default)]
pub(super) struct Regions {
    /// `/proc/PID/maps`; `None` when there is nothing more to come.
    maps: Option<File>,
    now: BTreeMap<u64, Region>,
    /// Those of former looks that are no longer there, by start; later ones cover earlier ones.
    former: BTreeMap<u64, Region>,
    looked: Option<Instant>,
}

impl Regions {
    /// Of the mm that `/proc/PID/maps` was opened of.
    pub(super) fn of(maps: Option<File>) -> Regions {
        Regions { maps, ..Regions::default() }
    }

    /// The maps of process `pid`: of its first thread, or, if that is dead and has no mm any more, of another one.
    pub(super) fn open(pid: i32) -> Option<File> {
        let has_some = |file: &File| file.read_at(&mut [0], 0).is_ok_and(|n| n > 0);
        let first = File::open(format!("/proc/{pid}/maps")).ok().filter(has_some);
        let threads = || fs::read_dir(format!("/proc/{pid}/task")).ok().into_iter().flatten().flatten();
        first.or_else(|| threads().find_map(|t| File::open(t.path().join("maps")).ok().filter(has_some)))
    }

    /// What process `pid` maps now, to be read later: it is stopped meanwhile.
    pub(super) fn seen(pid: i32) -> Vec<u8> {
        Regions::open(pid).map(|file| read(&file)).unwrap_or_default()
    }

    /// Reads the maps; keeps what it knew if it cannot.
    fn look(&mut self) {
        self.looked = Some(Instant::now());
        let now = self.maps.as_ref().map(|file| parse(&read(file))).unwrap_or_default();
        if now.is_empty() {
            return;
        }
        let old = std::mem::replace(&mut self.now, now);
        self.former.extend(old);
    }

    /// The mm is gone, or will be.
    pub(super) fn close(&mut self) {
        self.maps = None;
    }

    /// Takes over what somebody else has seen.
    pub(super) fn know(&mut self, seen: &[u8]) {
        self.now.extend(parse(seen));
        self.looked = Some(Instant::now());
    }

    /// The mapping around `address`; reads the maps again if it is not known.
    pub(super) fn at(&mut self, address: u64) -> Option<(u64, &Region)> {
        let stale = self.looked.is_none_or(|at| at.elapsed() > PAUSE);
        if stale && around(&self.now, address).is_none() {
            self.look();
        }
        self.known(address)
    }

    /// The same without reading.
    pub(super) fn known(&self, address: u64) -> Option<(u64, &Region)> {
        around(&self.now, address).or_else(|| around(&self.former, address))
    }

    /// Is a mapping there, as far as is known?
    pub(super) fn maps(&mut self, address: u64) -> bool {
        let _ = self.at(address);
        around(&self.now, address).is_some()
    }

    /// All that there were, with their starts, later ones over earlier ones.
    pub(super) fn all(&self) -> BTreeMap<u64, Region> {
        let mut all = self.former.clone();
        all.extend(self.now.clone());
        all
    }
}

fn around(map: &BTreeMap<u64, Region>, address: u64) -> Option<(u64, &Region)> {
    let (start, region) = map.range(..=address).next_back()?;
    (address < region.end).then_some((*start, region))
}

/// All of it; what came before an error.
fn read(mut maps: &File) -> Vec<u8> {
    // Room at once: std's reading begins with small pieces.
    let mut text = Vec::with_capacity(1 << 14);
    if maps.rewind().is_ok() {
        let _ = maps.take(u64::MAX).read_to_end(&mut text);
    }
    text
}

fn parse(text: &[u8]) -> BTreeMap<u64, Region> {
    String::from_utf8_lossy(text).lines().filter_map(line).collect()
}

/// `start-end perms offset dev inode   name`
fn line(line: &str) -> Option<(u64, Region)> {
    let hex = |s| u64::from_str_radix(s, 16).ok();
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let executable = fields.next()?.as_bytes().get(2) == Some(&b'x');
    let offset = hex(fields.next()?)?;
    let _device = fields.next()?;
    let inode = fields.next()?;
    let name = fields.next().unwrap_or_default().trim();
    let name = match name {
        "" => "anonymous",
        name => name.strip_suffix(" (deleted)").unwrap_or(name),
    };
    let region =
        Region { end: hex(end)?, name: name.to_owned(), offset, anonymous: inode == "0", executable };
    Some((hex(start)?, region))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
55d0-55d8 r--p 00001000 fd:00 123                        /bin/with space
55d8-55e0 rw-p 00000000 00:00 0                          [heap]
7f00-7f10 rw-p 00000000 00:00 0 
7f10-7f20 rw-s 00000000 00:01 55                         /memfd:x (deleted)
";

    #[test]
    fn lines_of_every_kind_are_read() {
        let maps = parse(MAPS);
        let names: Vec<&str> = maps.values().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["/bin/with space", "[heap]", "anonymous", "/memfd:x"]);
        assert_eq!(maps[&0x55d0].offset, 0x1000);
        assert!(maps[&0x7f00].anonymous && !maps[&0x7f10].anonymous);
    }

    #[test]
    fn an_address_is_found_in_its_mapping_alone() {
        let maps = parse(MAPS);
        assert_eq!(around(&maps, 0x55d7).map(|(start, _)| start), Some(0x55d0));
        assert_eq!(around(&maps, 0x55e0), None);
        assert_eq!(around(&maps, 0x1), None);
    }
}
