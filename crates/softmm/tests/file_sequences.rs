// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every path of files under every kernel profile, in the tokens of `sequences.rs`.
//!
//! The expectations are written from what the kernels do, not from what softmm did.

mod common;

use common::log::{COPY, Log, covers};
use common::range;
use interleave::MaySleep;
use softmm::uprobes::BREAKPOINT;
use softmm::{Config, File, FileKind, KernelProfile, Machine, MapKind, MmUser, Placement, Prot, Reclaimed};
use std::sync::Arc;

/// A file of four pages: 0 and 1 shared at 16 and 17, private at 20 and 21.
struct Scene {
    machine: Arc<Machine>,
    file: Arc<File>,
    user: MmUser,
    log: Arc<Log>,
}

impl Scene {
    fn new(cx: &mut MaySleep<'_>, profile: KernelProfile) -> Scene {
        let machine = Machine::new(Config { profile, ..Config::default() });
        let file = machine.new_file(FileKind::Regular, 4);
        let user = machine.new_mm().unwrap();
        let log = Log::of(cx, &user);
        let scene = Scene { machine, file, user, log };
        scene.map(cx, 16, Prot::ReadWrite, MapKind::Shared);
        scene.map(cx, 20, Prot::ReadWrite, MapKind::Private);
        scene
    }

    fn map(&self, cx: &mut MaySleep<'_>, at: u64, prot: Prot, kind: MapKind) {
        self.user.mmap_file(cx, Placement::Fixed(range(at, 2)), prot, &self.file, 0, kind).unwrap();
    }

    /// The text of a program at 16, and nothing else.
    fn text(&self, cx: &mut MaySleep<'_>) {
        self.user.munmap(cx, range(16, 8));
        self.map(cx, 16, Prot::Read, MapKind::Private);
    }

    fn store(&self, cx: &mut MaySleep<'_>, page: u64, value: u64) {
        self.machine.cpus()[0].store(cx, &self.user, page << 12, value).unwrap();
    }

    fn load(&self, cx: &mut MaySleep<'_>, page: u64) -> u64 {
        self.machine.cpus()[0].load(cx, &self.user, page << 12).unwrap()
    }

    fn finish(self, cx: &mut MaySleep<'_>) {
        self.user.mmput(cx);
        drop(self.file);
        assert_eq!(self.machine.frames().free_frames(), self.machine.frames().total_frames());
        assert_eq!(self.machine.tables_in_use(), 0);
        let reports = interleave::lockdep::take_reports();
        assert!(reports.is_empty(), "{reports:#?}");
    }
}

/// What is done, and what is heard of it by profile.
struct Path {
    name: &'static str,
    prepare: fn(&mut MaySleep<'_>, &mut Scene),
    run: fn(&mut MaySleep<'_>, &mut Scene),
    heard: &'static [(&'static str, &'static str)],
}

const NOTHING: &[(&str, &str)] = &[("v3_16..v6_18", "")];

const PATHS: &[Path] = &[
    Path {
        name: "first touch of shared and private pages",
        prepare: |_, _| {},
        run: |cx, s| {
            s.load(cx, 16);
            s.store(cx, 16, 1);
            s.store(cx, 17, 1);
            s.store(cx, 20, 2);
        },
        heard: NOTHING,
    },
    Path {
        name: "copy-on-write off a page of the file",
        prepare: |cx, s| {
            s.map(cx, 16, Prot::ReadWrite, MapKind::Private);
            s.load(cx, 16);
        },
        run: |cx, s| s.store(cx, 16, 2),
        heard: COPY,
    },
    Path {
        name: "writeback of a dirty page",
        prepare: |cx, s| s.store(cx, 16, 1),
        run: |cx, s| s.file.fsync(cx),
        heard: &[
            ("v3_16..v3_19", "P* P~*"),
            ("v4_12", "p* p~*"),
            ("v4_14", "S= R* R* E*"),
            ("v5_10", "S= R* E*"),
            ("v6_18", "S= R- E*"),
        ],
    },
    Path {
        name: "writeback of a page that write(2) dirtied and a shared mapping reads",
        prepare: |cx, s| {
            s.file.write(cx, 0, 0, 1).unwrap();
            s.load(cx, 16);
        },
        run: |cx, s| s.file.fsync(cx),
        // Nothing to take away: only those who say so before they look are heard.
        heard: &[("v3_16..v4_12", ""), ("v4_14 v5_10", "S= R= E="), ("v6_18", "S= E=")],
    },
    Path {
        name: "writeback of what is clean",
        prepare: |cx, s| {
            s.store(cx, 16, 1);
            s.file.fsync(cx);
        },
        run: |cx, s| s.file.fsync(cx),
        heard: NOTHING,
    },
    Path {
        name: "ageing",
        prepare: |cx, s| {
            s.load(cx, 16);
            s.load(cx, 20);
        },
        run: |cx, s| assert!(s.file.referenced(cx, 0)),
        heard: &[("v3_16..v6_18", "Y= Y=20+1")],
    },
    Path {
        name: "reclaim of a dirty page",
        prepare: |cx, s| {
            s.store(cx, 16, 1);
            s.load(cx, 20);
        },
        run: |cx, s| {
            let kept = !s.machine.profile().reclaim_writes_files;
            let done = if kept { Reclaimed::Kept } else { Reclaimed::Freed };
            assert_eq!(s.file.reclaim(cx, 0, true), done);
        },
        heard: &[
            ("v3_16..v3_19", "P- P~- P-20+1 P~-20+1"),
            ("v4_12", "p- p~- p-20+1 p~-20+1"),
            ("v4_14", "S= R- R- E- S-20+1 R-20+1 R-20+1 E-20+1"),
            ("v5_10", "S= R- E- S-20+1 R-20+1 E-20+1"),
            ("v6_18", "S= R-all E- S-20+1 R-all E-20+1"),
        ],
    },
    Path {
        name: "reclaim of a page that was not used lately",
        prepare: |cx, s| {
            s.load(cx, 16);
            s.file.referenced(cx, 0);
        },
        run: |cx, s| assert_eq!(s.file.reclaim(cx, 0, false), Reclaimed::Freed),
        heard: &[
            ("v3_16..v3_19", "Y= Y= P- P~-"),
            ("v4_12", "Y= Y= p- p~-"),
            ("v4_14", "Y= S= Y= R- R- E-"),
            ("v5_10", "Y= S= Y= R- E-"),
            ("v6_18", "Y= S= R-all E-"),
        ],
    },
    Path {
        name: "reclaim of a page whose copy a private mapping has",
        prepare: |cx, s| {
            s.store(cx, 20, 1);
            s.load(cx, 16);
        },
        run: |cx, s| assert_eq!(s.file.reclaim(cx, 0, true), Reclaimed::Freed),
        // After the last mapper nobody else is asked.
        heard: &[
            ("v3_16..v3_19", "P- P~-"),
            ("v4_12", "p- p~-"),
            ("v4_14", "S= R- R- E-"),
            ("v5_10", "S= R- E-"),
            ("v6_18", "S= R-all E-"),
        ],
    },
    Path {
        name: "truncate",
        prepare: |cx, s| {
            s.store(cx, 16, 1);
            s.load(cx, 20);
        },
        run: |cx, s| s.file.truncate(cx, 0).unwrap(),
        heard: &[
            ("v3_16..unwrapped_c", "S=16+2 E-16+2 S-20+2 E-20+2 S-!16+2 E-!16+2 S-!20+2 E-!20+2"),
            (
                "v3_19..v5_10",
                "S=16+2 R- R-16+2 E-16+2 S-20+2 R-20+2 E-20+2 R-20+1 \
                 S-!16+2 R-!16+2 E-!16+2 S-!20+2 R-!20+2 E-!20+2",
            ),
            ("v6_18", "S=16+2 R- E-16+2 S-20+2 E-20+2 R-20+1 S-!16+2 E-!16+2 S-!20+2 E-!20+2"),
        ],
    },
    Path {
        name: "hole punch over a shared page and a private copy",
        prepare: |cx, s| {
            s.store(cx, 16, 1);
            s.store(cx, 20, 2);
        },
        run: |cx, s| {
            s.file.punch_hole(cx, 0..1);
            assert_eq!(s.load(cx, 20), 2);
        },
        heard: &[
            ("v3_16..unwrapped_c", "S= E- S-20+1 E-20+1"),
            ("v3_19..v5_10", "S= R- R- E- S-20+1 R-20+1 E-20+1"),
            ("v6_18", "S= R- E- S-20+1 E-20+1"),
        ],
    },
    Path {
        name: "uprobe register over a page that is mapped",
        prepare: |cx, s| {
            s.text(cx);
            s.load(cx, 16);
        },
        run: |cx, s| s.file.uprobe_register(cx, 0, 0).unwrap(),
        heard: &[
            ("v3_16", "S= C- E*"),
            ("unwrapped_a", "C-"),
            ("unwrapped_b", "C- P~*"),
            ("unwrapped_c", "C- p~-"),
            ("v3_19..v5_10", "S= R- C- R* E*"),
            ("v6_18", "S= R- E* R-"),
        ],
    },
    Path {
        name: "uprobe register where nothing is mapped",
        prepare: |cx, s| s.text(cx),
        run: |cx, s| s.file.uprobe_register(cx, 0, 0).unwrap(),
        // The kernels that replace fault the file's page in first; 6.16 makes a private copy at once.
        heard: &[
            ("v3_16", "S* C- E*"),
            ("unwrapped_a", "C-"),
            ("unwrapped_b", "C- P~*"),
            ("unwrapped_c", "C- p~-"),
            ("v3_19..v5_10", "S* R- C- R* E*"),
            ("v6_18", "R-"),
        ],
    },
    Path {
        name: "uprobe unregister",
        prepare: |cx, s| {
            s.text(cx);
            s.file.write(cx, 0, 0, 7).unwrap();
            s.file.uprobe_register(cx, 0, 0).unwrap();
            assert_eq!(s.load(cx, 16), BREAKPOINT);
        },
        run: |cx, s| {
            s.file.uprobe_unregister(cx, 0, 0).unwrap();
            assert_eq!(s.load(cx, 16), 7);
        },
        heard: &[
            ("v3_16", "S= C- E*"),
            ("unwrapped_a", "C-"),
            ("unwrapped_b", "C- P~*"),
            ("unwrapped_c", "C- p~-"),
            ("v3_19..v4_14", "S= R- C- R* E*"),
            ("v5_10", "S= R- R- E-"),
            ("v6_18", "S= R- E-"),
        ],
    },
    Path {
        name: "write(2) to a hole that a private mapping reads",
        prepare: |cx, s| {
            s.user.munmap(cx, range(16, 8));
            s.file = s.machine.new_file(FileKind::Xip, 4);
            s.map(cx, 16, Prot::Read, MapKind::Private);
            assert_eq!(s.load(cx, 16), 0);
        },
        run: |cx, s| {
            s.file.write(cx, 0, 0, 7).unwrap();
            assert_eq!(s.load(cx, 16), 7);
        },
        // XIP alone has another page in the place of a hole.
        heard: &[("v3_16..v3_19", "P- P~-"), ("v4_12..v6_18", "")],
    },
];

#[test]
fn every_path_of_files_fires_what_its_kernel_fires() {
    let mut wrong = String::new();
    for path in PATHS {
        for profile in KernelProfile::ALL {
            let rows: Vec<_> = path.heard.iter().filter(|(names, _)| covers(names, &profile)).collect();
            assert_eq!(rows.len(), 1, "{} has one expectation for {}", path.name, profile.name);
            let expected = rows[0].1;
            MaySleep::enter(|cx| {
                let mut scene = Scene::new(cx, profile);
                (path.prepare)(cx, &mut scene);
                scene.log.begin(cx);
                (path.run)(cx, &mut scene);
                let heard = scene.log.tokens.lock(cx).join(" ");
                if heard != expected {
                    wrong +=
                        &format!("{} under {}: {heard:?}, expected {expected:?}\n", path.name, profile.name);
                }
                scene.finish(cx);
            });
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
