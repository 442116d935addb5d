// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests watch: a program that changes its memory in known ways. Built by the tests with rustc, static and
//! dynamic; standard library alone.
//!
//! `subject WAY N`: does it N times. Prints what a test compares with a run that is not watched.

mod frameless;
mod rseq;

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
    fn sigprocmask(how: i32, set: *const [u64; 16], old: *mut [u64; 16]) -> i32;
    fn memfd_create(name: *const std::ffi::c_char, flags: u32) -> i32;
    fn ftruncate(fd: i32, len: i64) -> i32;
    fn clone(f: extern "C" fn(*mut c_void) -> i32, stack: *mut c_void, flags: i32, arg: *mut c_void) -> i32;
    fn vfork() -> i32;
    fn execv(path: *const std::ffi::c_char, argv: *const *const std::ffi::c_char) -> i32;
    fn open(path: *const std::ffi::c_char, flags: i32, ...) -> i32;
    fn prctl(option: i32, ...) -> i32;
    fn setsid() -> i32;
    fn syscall(number: i64, ...) -> i64;
    fn signal(signal: i32, handler: extern "C" fn(i32)) -> usize;
}

/// Another process in this one's mm (CLONE_VM, not a thread) that does n munmaps; `flags`: more of clone's.
fn clone_vm(n: usize, flags: i32) {
    extern "C" fn work(n: *mut c_void) -> i32 {
        each(n as usize, |at| assert_eq!(unsafe { munmap(at.cast(), PAGE) }, 0));
        0
    }
    const CLONE_VM: i32 = 0x100;
    const SIGCHLD: i32 = 17;
    let stack = map(64);
    let top = unsafe { stack.add(64 * PAGE) };
    let child = unsafe { clone(work, top.cast(), CLONE_VM | SIGCHLD | flags, n as *mut c_void) };
    assert!(child > 0);
    // With CLONE_PARENT it is not ours to wait for: see when it is gone.
    while unsafe { waitpid(child, std::ptr::null_mut(), 0) } != child && unsafe { kill(child, 0) } == 0 {
        let state = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        if state.contains(") Z") {
            break;
        }
        std::thread::yield_now();
    }
}

/// Becomes this program again, doing `way` n times.
fn exec(way: &std::ffi::CStr, n: usize) {
    let path = std::ffi::CString::new(std::env::args().next().unwrap()).unwrap();
    let n = std::ffi::CString::new(n.to_string()).unwrap();
    let argv = [path.as_ptr(), way.as_ptr(), n.as_ptr(), std::ptr::null()];
    unsafe { execv(path.as_ptr(), argv.as_ptr()) };
}

static INTERRUPTS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

extern "C" fn interrupted(_: i32) {
    INTERRUPTS.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
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
        "free" => each(n, |at| assert_eq!(unsafe { madvise(at.cast(), PAGE, 8) }, 0)),
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
        "clone_vm" => clone_vm(n, 0),
        "clone_vm_parent" => clone_vm(n, 0x8000),
        // A chain of n programs, each by vfork and exec; the last one works.
        "vfork" => unsafe {
            if n == 0 {
                return each(7, |at| assert_eq!(madvise(at.cast(), PAGE, 8), 0));
            }
            let child = vfork();
            if child == 0 {
                exec(c"vfork", n - 1);
                _exit(1);
            }
            let mut status = 0;
            assert_eq!((waitpid(child, &mut status, 0), status), (child, 0));
        },
        // exec by a thread that is not the first, while others live.
        "thread_exec" => {
            std::thread::spawn(|| loop {
                std::thread::park();
            });
            std::thread::spawn(move || exec(c"free", n)).join().unwrap();
        }
        // The first thread is gone; another one works.
        "no_leader" => {
            std::thread::spawn(move || {
                println!("ready");
                let mut line = String::new();
                std::io::stdin().read_line(&mut line).unwrap();
                each(n, |at| assert_eq!(unsafe { munmap(at.cast(), PAGE) }, 0));
                println!("done");
                std::io::stdin().read_line(&mut line).unwrap();
                std::process::exit(0);
            });
            const SYS_EXIT: i64 = 60;
            unsafe { syscall(SYS_EXIT, 0) };
        }
        // A SIGTRAP that is blocked and pending, taken along by exec.
        "trap" => unsafe {
            const SIGTRAP: i32 = 5;
            let mut set = [0_u64; 16];
            set[0] = 1 << (SIGTRAP - 1);
            assert_eq!(sigprocmask(0, &set, std::ptr::null_mut()), 0);
            assert_eq!(kill(getpid(), SIGTRAP), 0);
            exec(c"trapped", 0);
        },
        "trapped" => {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            // Of that signal alone: posix_spawn ignores some of the C library's own.
            let is_in = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                u64::from_str_radix(line.trim(), 16).unwrap() & 1 << 4 != 0
            };
            let pending = is_in("SigPnd:") || is_in("ShdPnd:");
            println!("pending {pending} blocked {} ignored {}", is_in("SigBlk:"), is_in("SigIgn:"));
        }
        // A filter that kills on any call but those of the work, of fork and of the end; children inherit it.
        "seccomp" => unsafe {
            const ALLOWED: [u16; 17] = [0, 1, 3, 9, 10, 11, 12, 14, 28, 39, 56, 60, 61, 131, 186, 231, 273];
            // Load the number; each allowed one jumps to the last instruction.
            let mut filter: Vec<(u16, u8, u8, u32)> = vec![(0x20, 0, 0, 0)];
            for (at, number) in ALLOWED.iter().enumerate() {
                filter.push((0x15, (ALLOWED.len() - at) as u8, 0, u32::from(*number)));
            }
            filter.push((0x06, 0, 0, 0x8000_0000));
            filter.push((0x06, 0, 0, 0x7fff_0000));
            let program = (filter.len() as u16, filter.as_ptr());
            assert_eq!(prctl(38, 1usize, 0usize, 0usize, 0usize), 0);
            assert_eq!(prctl(22, 2usize, &raw const program), 0);
            let child = fork();
            if child == 0 {
                each(n, |at| assert_eq!(munmap(at.cast(), PAGE), 0));
                _exit(0);
            }
            let mut status = 0;
            assert_eq!((waitpid(child, &mut status, 0), status), (child, 0));
        },
        // No descriptor is left when it forks, nor for the child.
        "full_table" => unsafe {
            let opened = (0..1_000_000).take_while(|_| open(c"/dev/null".as_ptr(), 0) >= 0).count();
            let child = fork();
            if child == 0 {
                each(n, |at| assert_eq!(munmap(at.cast(), PAGE), 0));
                _exit(i32::from(open(c"/dev/null".as_ptr(), 0) >= 0));
            }
            let mut status = 0;
            assert_eq!((waitpid(child, &mut status, 0), status), (child, 0));
            println!("{opened}");
        },
        // A file mapped privately n times, each page of it touched; the file is args[3].
        "map_file" => unsafe {
            let path = std::ffi::CString::new(args[3].as_str()).unwrap();
            let fd = open(path.as_ptr(), 2);
            for _ in 0..n {
                let at = mmap(std::ptr::null_mut(), 8 * PAGE, 1, 1, fd, 0).cast::<u8>();
                assert_ne!(at as isize, -1);
                (0..8).for_each(|i| assert_eq!(at.add(i * PAGE).read_volatile(), 7));
            }
            println!("ready");
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).unwrap();
        },
        // n pairs of equal pages, different from every other pair, offered to KSM.
        "ksm" => unsafe {
            let fd = memfd_create(c"merged".as_ptr(), 0);
            assert_eq!(ftruncate(fd, 64 * PAGE as i64), 0);
            let arena = mmap(std::ptr::null_mut(), 64 * PAGE, 3, 0x2, fd, 0).cast::<u8>();
            assert_ne!(arena as isize, -1);
            let unique = u64::from(std::process::id()) << 32;
            for i in 0..2 * n {
                let page = arena.add(i * PAGE).cast::<u64>();
                (0..512).for_each(|w| page.add(w).write_volatile(unique + (i / 2 * 512 + w) as u64));
            }
            assert_eq!(madvise(arena.cast(), 64 * PAGE, 12), 0);
            println!("ready");
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).unwrap();
        },
        // A daemon, which works when its parent is gone and there is no file args[4], and says so in the file args[3].
        "daemon" => unsafe {
            let (file, hold) = (args[3].clone(), std::path::PathBuf::from(&args[4]));
            if fork() == 0 {
                setsid();
                close_range(0, u32::MAX, 0);
                if fork() == 0 {
                    std::thread::sleep(std::time::Duration::from_millis(200));
                    while hold.exists() {
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                    each(n, |at| assert_eq!(munmap(at.cast(), PAGE), 0));
                    std::fs::write(file, "done").unwrap();
                }
                _exit(0);
            }
        },
        // Counts what a terminal or a kill sends; ends by itself some time after the first.
        "interrupts" => {
            for number in [2, 15] {
                unsafe { signal(number, interrupted) };
            }
            println!("ready");
            while INTERRUPTS.load(std::sync::atomic::Ordering::SeqCst) == 0 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            std::thread::sleep(std::time::Duration::from_millis(300));
            println!("{} interrupts", INTERRUPTS.load(std::sync::atomic::Ordering::SeqCst));
            std::process::exit(42);
        }
        // As fast as it can, until it is killed.
        "forks" => unsafe {
            println!("ready");
            loop {
                let child = fork();
                if child == 0 {
                    _exit(0);
                }
                let mut status = 0;
                assert_eq!((waitpid(child, &mut status, 0), status), (child, 0));
            }
        },
        // n changes as fast as it can, in several places and ways.
        "storm" => {
            let arena = map(16 << 10);
            for i in 0..n {
                let at = unsafe { arena.add((i * 7919 % ((16 << 10) - 4)) * PAGE) };
                touch(at);
                let how = if i % 3 == 0 { 8 } else { 4 };
                assert_eq!(unsafe { madvise(at.cast(), PAGE * (1 + i % 4), how) }, 0);
            }
        }
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
            let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
            println!("{:?}", limits.lines().find(|l| l.starts_with("Max open files")));
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
        "rseq" => rseq::stay(move || each(n, |at| assert_eq!(unsafe { munmap(at.cast(), PAGE) }, 0))),
        "frameless" => frameless::frees(n),
        "exit" => std::process::exit(n as i32),
        way => panic!("no way {way:?}"),
    }
}
