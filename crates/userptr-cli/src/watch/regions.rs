// SPDX-License-Identifier: MIT OR Apache-2.0
//! The mappings of a watched program, as far as they could be seen: names for addresses.
//!
//! The maps are read at an exec, when an address has no name (but not all the time), and before the mm ends. A mapping
//! that came and went between two looks has no name, and is said to have none.

use std::collections::BTreeMap;
use std::fs;
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
}

/// The mappings of one mm.
#[derive(Debug, Default)]
pub(super) struct Regions {
    now: BTreeMap<u64, Region>,
    /// Those of former looks that are no longer there, by start; later ones cover earlier ones.
    former: BTreeMap<u64, Region>,
    looked: Option<Instant>,
}

impl Regions {
    /// Reads `/proc/PID/maps`; keeps what it knew if it cannot.
    pub(super) fn look(&mut self, pid: i32) {
        self.looked = Some(Instant::now());
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/maps")) else { return };
        let now = parse(&text);
        if now.is_empty() {
            return;
        }
        let old = std::mem::replace(&mut self.now, now);
        self.former.extend(old);
    }

    /// Takes over what somebody else has seen.
    pub(super) fn know(&mut self, other: BTreeMap<u64, Region>) {
        self.now.extend(other);
        self.looked = Some(Instant::now());
    }

    /// The mapping around `address`; reads the maps again if it is not known.
    pub(super) fn at(&mut self, pid: i32, address: u64) -> Option<(u64, &Region)> {
        let stale = self.looked.is_none_or(|at| at.elapsed() > PAUSE);
        if around(&self.now, address).is_none() && stale {
            self.look(pid);
        }
        around(&self.now, address).or_else(|| around(&self.former, address))
    }

    /// Is the mapping there now, as far as is known?
    pub(super) fn maps(&self, address: u64) -> bool {
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

fn parse(text: &str) -> BTreeMap<u64, Region> {
    text.lines().filter_map(line).collect()
}

/// `start-end perms offset dev inode   name`
fn line(line: &str) -> Option<(u64, Region)> {
    let hex = |s| u64::from_str_radix(s, 16).ok();
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let _perms = fields.next()?;
    let offset = hex(fields.next()?)?;
    let _device = fields.next()?;
    let inode = fields.next()?;
    let name = fields.next().unwrap_or_default().trim();
    let name = match name {
        "" => "anonymous",
        name => name.strip_suffix(" (deleted)").unwrap_or(name),
    };
    let region = Region { end: hex(end)?, name: name.to_owned(), offset, anonymous: inode == "0" };
    Some((hex(start)?, region))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
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
