// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests watch: a program that changes its memory in known ways. Built by the tests with rustc, static and
//! dynamic; standard library alone.
//!
//! `subject WAY N`: does it N times. Prints what a test compares with a run that is not watched.

use std::ffi::c_void;

unsafe extern "C" {
    fn mmap(at: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn munmap(at: *mut c_void, len: usize) -> i32;
    fn mprotect(at: *mut c_void, len: usize, prot: i32) -> i32;
    fn madvise(at: *mut c_void, len: usize, advice: i32) -> i32;
    fn mremap(at: *mut c_void, old: usize, new: usize, flags: i32, to: *mut c_void) -> *mut c_void;
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(code: i32) -> !;
    fn close_range(first: u32, last: u32, flags: i32) -> i32;
    fn getpid() -> i32;
    fn kill(pid: i32, signal: i32) -> i32;
    fn pause() -> i32;
    fn memfd_create(name: *const std::ffi::c_char, flags: u32) -> i32;
    fn ftruncate(fd: i32, len: i64) -> i32;
}

const PAGE: usize = 4096;
/// Pages apart, so that no two of ours are ever one range.
const GAP: usize = 4 * PAGE;

fn map(pages: usize) -> *mut u8 {
    let at = unsafe { mmap(std::ptr::null_mut(), pages * PAGE, 3, 0x22, -1, 0) };
    assert_ne!(at as isize, -1);
    at.cast()
}

fn touch(at: *mut u8) {
    unsafe { at.write_volatile(1) };
}

fn each(n: usize, mut f: impl FnMut(*mut u8)) {
    // One arena, so that the number of mappings is the same for every n; less than 2 MiB, because to split a mapping
    // around an aligned 2 MiB announces all of these, huge page or not.
    assert!(n <= 64);
    let arena = map(64 * 4);
    for i in 0..n {
        let at = unsafe { arena.add(i * GAP) };
        touch(at);
        f(at);
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let n: usize = args.get(2).map_or(0, |n| n.parse().unwrap());
    match args.get(1).map_or("", String::as_str) {
        "munmap" => each(n, |at| assert_eq!(unsafe { munmap(at.cast(), PAGE) }, 0)),
        "dontneed" => each(n, |at| assert_eq!(unsafe { madvise(at.cast(), PAGE, 4) }, 0)),
        "mprotect" => each(n, |at| assert_eq!(unsafe { mprotect(at.cast(), PAGE, 1) }, 0)),
        "mremap" => each(n, |at| {
            // MAYMOVE and FIXED, onto an empty place in the same arena.
            let to = unsafe { mremap(at.cast(), PAGE, PAGE, 3, at.add(2 * PAGE).cast()) };
            assert_eq!(to, unsafe { at.add(2 * PAGE).cast() });
        }),
        "threads" => {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    std::thread::spawn(move || {
                        // MADV_FREE, which neither malloc nor the end of a thread uses.
                        let at = map(1);
                        for _ in 0..n {
                            touch(at);
                            assert_eq!(unsafe { madvise(at.cast(), PAGE, 8) }, 0);
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().unwrap());
        }
        // The child's n munmaps are in an mm of its own.
        "fork" => unsafe {
            let child = fork();
            if child == 0 {
                each(n, |at| assert_eq!(munmap(at.cast(), PAGE), 0));
                _exit(0);
            }
            let mut status = 0;
            assert_eq!((waitpid(child, &mut status, 0), status), (child, 0));
        },
        // n pages shared with a child, then written by the parent while the child lives. A private file mapping, because
        // it has a name.
        "cow" => unsafe {
            let fd = memfd_create(c"watched".as_ptr(), 0);
            assert_eq!(ftruncate(fd, 64 * PAGE as i64), 0);
            let arena = mmap(std::ptr::null_mut(), 64 * PAGE, 3, 0x2, fd, 0).cast::<u8>();
            assert_ne!(arena as isize, -1);
            (0..n).for_each(|i| touch(arena.add(i * PAGE)));
            let child = fork();
            if child == 0 {
                loop {
                    pause();
                }
            }
            (0..n).for_each(|i| touch(arena.add(i * PAGE)));
            kill(child, 9);
            waitpid(child, std::ptr::null_mut(), 0);
        },
        "close_range" => unsafe {
            assert_eq!(close_range(3, u32::MAX, 0), 0);
            each(n, |at| assert_eq!(munmap(at.cast(), PAGE), 0));
        },
        "exec" => {
            use std::os::unix::process::CommandExt;
            let why = std::process::Command::new(&args[0]).args(["munmap", &n.to_string()]).exec();
            panic!("{why}");
        }
        // What a program can see of its own state: descriptors, environment, signals, working directory, memory map.
        "state" => {
            let mut fds: Vec<_> = std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter_map(|e| {
                    let e = e.unwrap();
                    let to = std::fs::read_link(e.path()).ok()?;
                    Some((e.file_name(), to.display().to_string()))
                })
                .filter(|(_, to)| !to.starts_with("/proc/"))
                .map(|(fd, to)| (fd, to.split(':').next().unwrap().to_owned()))
                .collect();
            fds.sort();
            println!("{fds:?}");
            let mut env: Vec<_> = std::env::vars().collect();
            env.sort();
            println!("{env:?} {:?}", std::env::current_dir());
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            for line in status.lines().filter(|l| ["Sig", "Shd", "Cap", "NoNew", "Seccomp:"].iter().any(|p| l.starts_with(p))) {
                // 32 and 33 are glibc's, which ignores them in what posix_spawn starts and not in what fork does.
                match line.strip_prefix("SigIgn:\t").map(|mask| u64::from_str_radix(mask, 16).unwrap()) {
                    Some(mask) => println!("SigIgn {:x}", mask & !(3 << 31)),
                    None if line.starts_with("SigQ") => {}
                    None => println!("{line}"),
                }
            }
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            println!("{} mappings", maps.lines().count());
        }
        "signal" => unsafe {
            kill(getpid(), n as i32);
            pause();
        },
        // Waits for a line, works, waits for the end.
        "wait" => {
            println!("ready");
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).unwrap();
            each(n, |at| assert_eq!(unsafe { munmap(at.cast(), PAGE) }, 0));
            println!("done");
            std::io::stdin().read_line(&mut line).unwrap();
        }
        "exit" => std::process::exit(n as i32),
        way => panic!("no way {way:?}"),
    }
}
