// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every path under every kernel profile: which callbacks, in which order, and what the page table says at each.
//!
//! A token is a callback, what the pte of page 16 is then, and the range if it is not that page:
//! `S` invalidate_range_start, `E` _end, `C` change_pte, `P` invalidate_page that may sleep, `p` the same in atomic
//! context, `~` heard by a notifier without change_pte, `R` invalidate_range or arch_invalidate_secondary_tlbs, `Y`
//! clear_flush_young, `y` clear_young, `T` test_young, `X` release; `=` the pte is as it was before the operation, `-` cleared,
//! `*` another; `16+8` pages. `!` the frame that was mapped before is free.
//!
//! The expectations are written from what the kernels do, not from what softmm did.

mod common;

use common::log::{COPY, Log, covers, watched};
use common::range;
use interleave::MaySleep;
use softmm::{
    Config, Foll, FrameId, KernelProfile, Machine, Merge, MmUser, Placement, Prot, Reclaim, UserPages,
};
use std::sync::Arc;

/// A process with pages 16 to 23 mapped read-write, page 16 written with 1, watched; and another one.
struct Scene {
    machine: Arc<Machine>,
    user: MmUser,
    log: Arc<Log>,
    others: Vec<MmUser>,
    pages: Option<UserPages>,
}

impl Scene {
    fn new(cx: &mut MaySleep<'_>, profile: KernelProfile) -> Scene {
        let machine = Machine::new(Config { profile, ..Config::default() });
        let user = machine.new_mm().unwrap();
        let log = Log::of(cx, &user);
        user.mmap(cx, Placement::Fixed(range(16, 8)), Prot::ReadWrite).unwrap();
        let scene = Scene { machine, user, log, others: Vec::new(), pages: None };
        scene.store(cx, 1);
        scene
    }

    fn store(&self, cx: &mut MaySleep<'_>, value: u64) {
        self.machine.cpus()[0].store(cx, &self.user, 16 << 12, value).unwrap();
    }

    fn load(&self, cx: &mut MaySleep<'_>) -> u64 {
        self.machine.cpus()[0].load(cx, &self.user, 16 << 12).unwrap()
    }

    fn frame(&self) -> FrameId {
        self.machine.frames().id(self.user.peek_pte(watched()).pfn())
    }

    fn fork(&mut self, cx: &mut MaySleep<'_>) {
        self.others.push(self.user.fork(cx).unwrap());
    }

    fn pin(&mut self, cx: &mut MaySleep<'_>, foll: Foll) {
        self.pages = Some(self.user.get_user_pages(cx, range(16, 1), foll).unwrap());
    }

    /// Another mm with the same contents at page 16, and both mergeable.
    fn twin(&mut self, cx: &mut MaySleep<'_>) {
        let twin = self.machine.new_mm().unwrap();
        twin.mmap(cx, Placement::Fixed(range(16, 1)), Prot::ReadWrite).unwrap();
        self.machine.cpus()[1].store(cx, &twin, 16 << 12, 1).unwrap();
        twin.madvise_mergeable(cx, range(16, 1), true).unwrap();
        self.user.madvise_mergeable(cx, range(16, 8), true).unwrap();
        self.others.push(twin);
    }

    fn merge(&self, cx: &mut MaySleep<'_>) -> Merge {
        self.machine.ksm_merge(cx, (&self.others[0], watched()), (&self.user, watched()))
    }

    fn reclaim(&self, cx: &mut MaySleep<'_>) -> Reclaim {
        self.machine.reclaim_page(cx, self.frame(), true)
    }

    fn finish(self, cx: &mut MaySleep<'_>) {
        drop(self.pages);
        self.others.into_iter().for_each(|mm| mm.mmput(cx));
        let Scene { machine, user, .. } = Scene { others: Vec::new(), pages: None, ..self };
        user.mmput(cx);
        for frame in machine.swap_cache(cx) {
            assert_eq!(machine.reclaim_page(cx, frame, true), Reclaim::Reclaimed);
        }
        assert_eq!(machine.frames().free_frames(), machine.frames().total_frames());
        assert_eq!((machine.tables_in_use(), machine.swap().in_use(cx)), (0, 0));
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
/// A zap of the whole vma: flush and free after E.
const ZAP: &[(&str, &str)] = &[
    ("v3_16..unwrapped_c", "S=16+8 E-16+8"),
    ("v3_19..v5_10", "S=16+8 R-16+8 E-16+8 R-"),
    ("v6_18", "S=16+8 E-16+8 R-"),
];

const PATHS: &[Path] = &[
    Path {
        name: "copy-on-write of a page shared by fork",
        prepare: |cx, s| s.fork(cx),
        run: |cx, s| s.store(cx, 2),
        heard: COPY,
    },
    Path {
        name: "copy-on-write off the zero page",
        prepare: |cx, s| {
            s.user.madvise_dontneed(cx, range(16, 1)).unwrap();
            s.load(cx);
        },
        run: |cx, s| s.store(cx, 2),
        heard: COPY,
    },
    Path {
        name: "mremap to where nothing is",
        prepare: |_, _| {},
        run: |cx, s| s.user.mremap(cx, range(16, 1), range(40, 1)).unwrap(),
        heard: &[
            ("v3_16..unwrapped_c", "S= E- S- E-"),
            ("v3_19..v5_10", "S= R- E- S- R- E-"),
            ("v6_18", "S= R- E- S- E-"),
        ],
    },
    Path {
        name: "reuse by the last owner",
        prepare: |cx, s| {
            s.fork(cx);
            s.others.pop().unwrap().mmput(cx);
        },
        run: |cx, s| s.store(cx, 2),
        heard: NOTHING,
    },
    Path {
        name: "reuse of a page that a device holds",
        prepare: |cx, s| {
            s.pin(cx, Foll::GET.write());
            s.user.mprotect(cx, range(16, 1), Prot::Read).unwrap();
            s.user.mprotect(cx, range(16, 1), Prot::ReadWrite).unwrap();
        },
        run: |cx, s| s.store(cx, 2),
        // Only a kernel that counts references moves the CPU away from the device.
        heard: &[("v3_16..v4_14 v6_18", ""), ("v5_10", "S= R- C- E*")],
    },
    Path {
        name: "un-share for a read pin",
        prepare: |cx, s| s.fork(cx),
        run: |cx, s| s.pin(cx, Foll::PIN),
        heard: &[("v3_16..v5_10", ""), ("v6_18", "S= R- E*")],
    },
    Path {
        name: "forced write to a read-only mapping",
        prepare: |cx, s| {
            s.fork(cx);
            s.user.mprotect(cx, range(16, 1), Prot::Read).unwrap();
        },
        run: |cx, s| s.pin(cx, Foll::GET.write().force()),
        heard: COPY,
    },
    Path {
        name: "fork",
        prepare: |_, _| {},
        run: |cx, s| s.fork(cx),
        heard: &[
            ("v3_16..unwrapped_c", "S=16+8 E*16+8"),
            ("v3_19..v5_10", "S=16+8 R*16+8 E*16+8"),
            ("v6_18", "S=16+8 E*16+8 R*all"),
        ],
    },
    Path {
        name: "fork of a pinned page",
        prepare: |cx, s| s.pin(cx, Foll::PIN.write()),
        run: |cx, s| s.fork(cx),
        heard: &[
            ("v3_16..unwrapped_c", "S=16+8 E*16+8"),
            ("v3_19..v4_14", "S=16+8 R*16+8 E*16+8"),
            ("v5_10", "S=16+8 R=16+8 E=16+8"),
            ("v6_18", "S=16+8 E=16+8 R=all"),
        ],
    },
    Path { name: "munmap", prepare: |_, _| {}, run: |cx, s| s.user.munmap(cx, range(16, 8)), heard: ZAP },
    Path {
        name: "mmap over it",
        prepare: |_, _| {},
        run: |cx, s| assert!(s.user.mmap(cx, Placement::Fixed(range(16, 8)), Prot::Read).is_ok()),
        heard: ZAP,
    },
    Path {
        name: "MADV_DONTNEED",
        prepare: |_, _| {},
        run: |cx, s| s.user.madvise_dontneed(cx, range(16, 8)).unwrap(),
        heard: ZAP,
    },
    Path {
        name: "MADV_DONTNEED of two vmas",
        prepare: |cx, s| s.user.mprotect(cx, range(18, 6), Prot::Read).unwrap(),
        run: |cx, s| s.user.madvise_dontneed(cx, range(16, 8)).unwrap(),
        heard: &[
            ("v3_16..unwrapped_c", "S=16+2 E-16+2 S-!18+6 E-!18+6"),
            ("v3_19..v5_10", "S=16+2 R-16+2 E-16+2 R- S-!18+6 R-!18+6 E-!18+6"),
            ("v6_18", "S=16+2 E-16+2 S-18+6 E-18+6 R-"),
        ],
    },
    Path {
        name: "MADV_FREE",
        prepare: |_, _| {},
        run: |cx, s| {
            let freed = s.user.madvise_free(cx, range(16, 8));
            assert_eq!(freed.is_ok(), s.machine.profile().madvise_free);
        },
        heard: &[
            ("v3_16..v3_19", ""),
            ("v4_12..v5_10", "S=16+8 R=16+8 E=16+8 R="),
            ("v6_18", "S=16+8 E=16+8 R="),
        ],
    },
    Path {
        name: "reclaim of what MADV_FREE gave up",
        prepare: |cx, s| {
            let _ = s.user.madvise_free(cx, range(16, 8));
        },
        run: |cx, s| assert_eq!(s.reclaim(cx), Reclaim::Reclaimed),
        heard: &[
            ("v3_16..v3_19", "P* P~*"),
            ("v4_12", "p- p~-"),
            ("v4_14", "S= R- R- E-"),
            ("v5_10", "S= R- E-"),
            ("v6_18", "S= R-all E-"),
        ],
    },
    Path {
        name: "mprotect",
        prepare: |_, _| {},
        run: |cx, s| s.user.mprotect(cx, range(16, 8), Prot::Read).unwrap(),
        heard: &[
            ("v3_16..unwrapped_c", "S=16+8 E*16+8"),
            ("v3_19..v5_10", "S=16+8 R*16+8 E*16+8"),
            ("v6_18", "S=16+8 E*16+8 R*"),
        ],
    },
    Path {
        name: "mprotect back",
        prepare: |cx, s| s.user.mprotect(cx, range(16, 8), Prot::None).unwrap(),
        run: |cx, s| {
            s.user.mprotect(cx, range(16, 8), Prot::ReadWrite).unwrap();
            assert_eq!(s.user.peek_pte(watched()).is_writable(), s.machine.profile().mprotect_upgrades);
        },
        heard: &[
            ("v3_16..unwrapped_c", "S=16+8 E*16+8"),
            ("v3_19..v5_10", "S=16+8 R*16+8 E*16+8"),
            ("v6_18", "S=16+8 E*16+8 R*"),
        ],
    },
    Path {
        name: "mprotect to the same",
        prepare: |_, _| {},
        run: |cx, s| s.user.mprotect(cx, range(16, 8), Prot::ReadWrite).unwrap(),
        heard: NOTHING,
    },
    Path {
        name: "KSM merge",
        prepare: |cx, s| s.twin(cx),
        run: |cx, s| assert_eq!(s.merge(cx), Merge::Merged),
        heard: &[
            ("v3_16", "S= C- E* S* C- E*"),
            ("unwrapped_a", "C- C-"),
            ("unwrapped_b", "C- P~* C- P~*"),
            ("unwrapped_c", "C- p~- C- p~-"),
            ("v3_19..v4_14", "S= R- C- R* E* S* R- C- R* E*"),
            ("v5_10", "S= C- R* E* S* C- R* E*"),
            ("v6_18", "S= R- E* S* R- E*"),
        ],
    },
    Path {
        name: "KSM merge of a pinned page",
        prepare: |cx, s| {
            s.twin(cx);
            s.pin(cx, Foll::PIN.write());
        },
        run: |cx, s| assert_eq!(s.merge(cx), Merge::Held),
        heard: &[
            ("v3_16", "S= E="),
            ("unwrapped_a..unwrapped_c", ""),
            ("v3_19..v4_14", "S= R- R= E="),
            ("v5_10", "S= R= E="),
            ("v6_18", "S= R- E="),
        ],
    },
    Path {
        name: "KSM merge of a read-only, clean page that a device holds",
        prepare: |cx, s| {
            s.twin(cx);
            s.reclaim(cx);
            s.load(cx);
            s.pin(cx, Foll::GET);
        },
        run: |cx, s| {
            let merge = s.merge(cx);
            let refused = s.machine.profile().name == "v6_18";
            assert_eq!(merge, if refused { Merge::Held } else { Merge::Merged }, "{:?}", s.machine.profile());
        },
        heard: &[
            // write_protect_page has nothing to do and asks nobody.
            ("v3_16", "S= E= S= C- E*"),
            ("unwrapped_a", "C-"),
            ("unwrapped_b", "C- P~*"),
            ("unwrapped_c", "C- p~-"),
            ("v3_19..v4_14", "S= R= E= S= R- C- R* E*"),
            ("v5_10", "S= R= E= S= C- R* E*"),
            ("v6_18", "S= R- E="),
        ],
    },
    Path {
        name: "store to a merged page",
        prepare: |cx, s| {
            s.twin(cx);
            s.merge(cx);
        },
        run: |cx, s| s.store(cx, 2),
        heard: COPY,
    },
    Path {
        name: "reclaim of a merged page",
        prepare: |cx, s| {
            s.twin(cx);
            s.merge(cx);
            s.fork(cx);
        },
        run: |cx, s| {
            assert_eq!(s.reclaim(cx), Reclaim::Reclaimed);
            // Read back for one family and copied for the other.
            assert_eq!(s.machine.cpus()[1].load(cx, &s.others[0], 16 << 12), Ok(1));
            assert_eq!(s.load(cx), 1);
            assert_eq!(s.machine.cpus()[1].load(cx, &s.others[1], 16 << 12), Ok(1));
        },
        heard: &[
            ("v3_16..v3_19", "P* P~*"),
            ("v4_12", "p* p~*"),
            ("v4_14", "S= R* R* E*"),
            ("v5_10", "S= R* E*"),
            ("v6_18", "S= R-all E*"),
        ],
    },
    Path {
        name: "ageing",
        prepare: |_, _| {},
        run: |cx, s| {
            let frame = s.frame();
            assert!(s.machine.page_referenced(cx, frame));
            assert!(!s.machine.page_referenced(cx, frame));
        },
        heard: &[("v3_16..v6_18", "Y= Y=")],
    },
    Path {
        name: "idle tracking",
        prepare: |_, _| {},
        run: |cx, s| {
            let (frame, has) = (s.frame(), s.machine.profile().clear_young);
            assert_eq!(s.machine.page_idle_clear_refs(cx, frame), has.then_some(true));
            assert!(s.user.test_young(cx, watched()));
        },
        heard: &[("v3_16..v3_19", ""), ("v4_12..v6_18", "y= T=")],
    },
    Path {
        name: "reclaim",
        prepare: |_, _| {},
        run: |cx, s| assert_eq!(s.reclaim(cx), Reclaim::Reclaimed),
        heard: &[
            ("v3_16..v3_19", "P* P~*"),
            ("v4_12", "p* p~*"),
            ("v4_14", "S= R* R* E*"),
            ("v5_10", "S= R* E*"),
            ("v6_18", "S= R-all E*"),
        ],
    },
    Path {
        name: "reclaim of a page that was not used lately",
        prepare: |cx, s| assert!(s.machine.page_referenced(cx, s.frame())),
        run: |cx, s| assert_eq!(s.machine.reclaim_page(cx, s.frame(), false), Reclaim::Reclaimed),
        heard: &[
            ("v3_16..v3_19", "Y= Y= P* P~*"),
            ("v4_12", "Y= Y= p* p~*"),
            ("v4_14", "Y= S= Y= R* R* E*"),
            ("v5_10", "Y= S= Y= R* E*"),
            ("v6_18", "Y= S= R-all E*"),
        ],
    },
    Path {
        name: "reclaim of a pinned page",
        prepare: |cx, s| s.pin(cx, Foll::PIN.write()),
        run: |cx, s| assert_eq!(s.reclaim(cx), Reclaim::Held),
        heard: &[
            ("v3_16..v3_19", "P* P~*"),
            ("v4_12", "p* p~*"),
            ("v4_14", "S= R* R* E*"),
            ("v5_10", "S= R* E*"),
            ("v6_18", ""),
        ],
    },
    Path {
        name: "swap-in",
        prepare: |cx, s| assert_eq!(s.reclaim(cx), Reclaim::Reclaimed),
        run: |cx, s| assert_eq!(s.load(cx), 1),
        heard: NOTHING,
    },
    Path {
        name: "oom reaper",
        prepare: |_, _| {},
        run: |cx, s| drop(s.user.oom_reap(cx)),
        heard: &[
            ("v3_16..v3_19 v4_14", ""),
            ("v4_12", "R-"),
            ("v5_10", "S=16+8 R-16+8 E-16+8 R-"),
            ("v6_18", "S=16+8 E-16+8 R-"),
        ],
    },
];

#[test]
fn every_path_fires_what_its_kernel_fires() {
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

#[test]
fn exit_tells_list_notifiers_of_release_alone() {
    for profile in KernelProfile::ALL {
        MaySleep::enter(|cx| {
            let scene = Scene::new(cx, profile);
            scene.log.begin(cx);
            let log = scene.log.clone();
            scene.finish(cx);
            assert_eq!(*log.tokens.lock(cx), ["X="], "{}", profile.name);
        });
    }
}
