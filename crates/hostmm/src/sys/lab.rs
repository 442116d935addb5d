// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system calls of [`crate::lab`] and the child process that makes them.
//!
//! Between fork and its end the child makes system calls and touches the board, nothing else: the parent has threads,
//! whose locks (malloc's for one) may be held for ever in the child.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use mmu_notifier::{PAGE_SIZE, PageAddr, Range};
use rustix::io::Errno;

use super::map::Mapping;
use crate::lab::{Answer, Backing, Call, Rights};

fn ptr(range: Range) -> *mut libc::c_void {
    range.start() as *mut libc::c_void
}

fn answer(ret: i64) -> Answer {
    if ret >= 0 { Ok(0) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Is nothing mapped in `range`?
pub(crate) fn is_free(range: Range) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: it replaces nothing; what it maps is unmapped again at once.
    let got = unsafe { libc::mmap(ptr(range), range.len() as usize, libc::PROT_NONE, flags, -1, 0) };
    if got == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping of the line above.
    unsafe { libc::munmap(got, range.len() as usize) };
    if got == ptr(range) { Ok(()) } else { Err(Errno::EXIST.into()) }
}

/// Unmap all of a lab's arena; the caller is the lab.
pub(crate) fn unmap(arena: Range) -> io::Result<()> {
    // SAFETY: nobody but the lab uses its arena.
    match unsafe { libc::munmap(ptr(arena), arena.len() as usize) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An empty memfd.
pub(crate) fn memfd() -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    Ok(File::from(rustix::fs::memfd_create("userptr-lab", flags)?))
}

/// An empty file without a name in `dir`.
pub(crate) fn unnamed(dir: &std::path::Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).write(true).custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC).open(dir)
}

/// PR_SET_THP_DISABLE.
pub(crate) fn disable_huge_pages() -> io::Result<()> {
    // SAFETY: it changes no memory.
    match unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Make `call` on a lab's `arena` and `file`. Makes system calls and nothing else, so a forked child may call it.
pub(crate) fn call(arena: Range, file: &File, call: &Call) -> Answer {
    if !call.is_inside(arena) {
        return Err(Errno::INVAL);
    }
    match *call {
        Call::Map(range, rights, backing) => map(range, rights, backing, file),
        Call::Unmap(range) => {
            // SAFETY: inside the arena, which is the lab's alone.
            answer(unsafe { libc::munmap(ptr(range), range.len() as usize) }.into())
        }
        Call::Protect(range, rights) => {
            // SAFETY: as above.
            answer(unsafe { libc::mprotect(ptr(range), range.len() as usize, prot(rights)) }.into())
        }
        Call::DontNeed(range) => advise(range, libc::MADV_DONTNEED),
        Call::Free(range) => advise(range, libc::MADV_FREE),
        Call::PageOut(range) => advise(range, libc::MADV_PAGEOUT),
        Call::Mergeable(range, true) => advise(range, libc::MADV_MERGEABLE),
        Call::Mergeable(range, false) => advise(range, libc::MADV_UNMERGEABLE),
        Call::Move { from, to } => move_page(from, to),
        Call::Load(page) => load(page),
        Call::Store(page, value) => store(page, value),
        Call::ReadPinned(page) => read_pinned(page),
        Call::WritePinned(page, value) => write_pinned(page, value),
        Call::Sync => {
            // SAFETY: a call on a descriptor of ours, which changes no content.
            answer(unsafe { libc::fsync(file.as_raw_fd()) }.into())
        }
        Call::Truncate { pages } => {
            // SAFETY: a call on a descriptor of ours.
            answer(unsafe { libc::ftruncate(file.as_raw_fd(), bytes(pages)?) }.into())
        }
        Call::Punch { first, pages } => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: as above.
            answer(unsafe { libc::fallocate(file.as_raw_fd(), mode, bytes(first)?, bytes(pages)?) }.into())
        }
        Call::WriteFile { page, value } => {
            let buffer = [value; (PAGE_SIZE / 8) as usize];
            // SAFETY: as above; the buffer is as long as it says.
            let ret = unsafe {
                libc::pwrite(file.as_raw_fd(), buffer.as_ptr().cast(), PAGE_SIZE as usize, bytes(page)?)
            };
            answer(ret as i64)
        }
    }
}

fn move_page(from: PageAddr, to: PageAddr) -> Answer {
    let (page, flags) = (PAGE_SIZE as usize, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    let at = |page: PageAddr| page.get() as *mut libc::c_void;
    // SAFETY: both pages lie inside the arena, so what is moved and what is replaced are the lab's.
    let got = unsafe { libc::mremap(at(from), page, page, flags, at(to)) };
    if got == libc::MAP_FAILED { Err(last_errno()) } else { Ok(0) }
}

fn advise(range: Range, advice: i32) -> Answer {
    // SAFETY: the caller has checked that it lies inside the arena, to which no reference exists.
    answer(unsafe { libc::madvise(ptr(range), range.len() as usize, advice) }.into())
}

fn bytes(pages: u64) -> Result<i64, Errno> {
    pages.checked_mul(PAGE_SIZE).and_then(|bytes| bytes.try_into().ok()).ok_or(Errno::FBIG)
}

fn prot(rights: Rights) -> i32 {
    match rights {
        Rights::None => libc::PROT_NONE,
        Rights::Read => libc::PROT_READ,
        Rights::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    }
}

fn map(range: Range, rights: Rights, backing: Backing, file: &File) -> Answer {
    let (flags, fd, pgoff) = match backing {
        Backing::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        Backing::PrivateFile(pgoff) => (libc::MAP_PRIVATE, file.as_raw_fd(), pgoff),
        Backing::SharedFile(pgoff) => (libc::MAP_SHARED, file.as_raw_fd(), pgoff),
    };
    let (flags, offset) = (flags | libc::MAP_FIXED, bytes(pgoff)?);
    // SAFETY: inside the arena, so what it replaces is the lab's.
    let got = unsafe { libc::mmap(ptr(range), range.len() as usize, prot(rights), flags, fd, offset) };
    if got == libc::MAP_FAILED { Err(last_errno()) } else { Ok(0) }
}

/// The kernel reads the page as the CPU would, by the same page fault. The page must be the local side: the remote side
/// is pinned, and a read pin parts a page that is shared.
fn load(page: PageAddr) -> Answer {
    let mut word = 0_u64;
    let from = libc::iovec { iov_base: page.get() as *mut libc::c_void, iov_len: 8 };
    let to = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
    // SAFETY: the kernel checks the address that it reads, and writes eight bytes to `word`.
    let got = unsafe { libc::process_vm_writev(libc::getpid(), &raw const from, 1, &raw const to, 1, 0) };
    if got == 8 { Ok(word) } else { Err(Errno::FAULT) }
}

/// As [`load`]: the page is the local side, which the kernel writes as the CPU would.
fn store(page: PageAddr, value: u64) -> Answer {
    let to = libc::iovec { iov_base: page.get() as *mut libc::c_void, iov_len: 8 };
    let from = libc::iovec { iov_base: (&raw const value).cast_mut().cast(), iov_len: 8 };
    // SAFETY: inside the arena, to which no reference exists; the kernel checks the address.
    let got = unsafe { libc::process_vm_readv(libc::getpid(), &raw const to, 1, &raw const from, 1, 0) };
    if got == 8 { Ok(0) } else { Err(Errno::FAULT) }
}

/// The remote side of process_vm_readv: the kernel pins the page for reading while it copies.
fn read_pinned(page: PageAddr) -> Answer {
    let mut word = 0_u64;
    let to = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
    let from = libc::iovec { iov_base: page.get() as *mut libc::c_void, iov_len: 8 };
    // SAFETY: the kernel checks the address that it reads, and writes eight bytes to `word`.
    let got = unsafe { libc::process_vm_readv(libc::getpid(), &raw const to, 1, &raw const from, 1, 0) };
    if got == 8 { Ok(word) } else { Err(Errno::FAULT) }
}

/// The remote side of process_vm_writev: the kernel pins the page for writing.
fn write_pinned(page: PageAddr, value: u64) -> Answer {
    let from = libc::iovec { iov_base: (&raw const value).cast_mut().cast(), iov_len: 8 };
    let to = libc::iovec { iov_base: page.get() as *mut libc::c_void, iov_len: 8 };
    // SAFETY: inside the arena, to which no reference exists; the kernel checks the address.
    let got = unsafe { libc::process_vm_writev(libc::getpid(), &raw const from, 1, &raw const to, 1, 0) };
    if got == 8 { Ok(0) } else { Err(Errno::FAULT) }
}

/// What parent and child write on the board.
struct Board {
    call: Call,
    answer: Answer,
}

/// A child that serves calls. Dropping it kills and reaps it.
#[derive(Debug)]
pub(crate) struct Server {
    pid: i32,
    bell: OwnedFd,
    done: OwnedFd,
    board: Mapping,
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the array is for two descriptors, which are new and ours.
    unsafe {
        if libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

impl Server {
    pub(crate) fn fork(arena: Range, file: &File) -> io::Result<Server> {
        const { assert!(size_of::<Board>() <= PAGE_SIZE as usize && align_of::<Board>() <= PAGE_SIZE as usize) };
        let board = Mapping::shared_anonymous(PAGE_SIZE as usize)?;
        let (theirs, bell) = pipe()?;
        let (done, reply) = pipe()?;
        let first = Board { call: Call::Unmap(arena), answer: Ok(0) };
        // SAFETY: a fresh mapping, large and aligned enough; nobody else knows it yet.
        unsafe { board.ptr().cast::<Board>().write(first) };
        // SAFETY: the child runs `serve` only, which keeps to what the module promises.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => serve((&theirs, &reply, &bell), &board, arena, file),
            pid => Ok(Server { pid, bell, done, board }),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.cast_unsigned()
    }

    /// `None`: it is dead.
    pub(crate) fn ask(&mut self, call: &Call) -> Option<Answer> {
        let board = self.board.ptr().cast::<Board>();
        let mut byte = [0_u8; 1];
        // SAFETY: the board holds a valid `Board`; the child reads and writes it only between the bell and its reply.
        unsafe {
            (*board.as_ptr()).call = *call;
            if libc::write(self.bell.as_raw_fd(), byte.as_ptr().cast(), 1) != 1 {
                return None;
            }
            loop {
                match libc::read(self.done.as_raw_fd(), byte.as_mut_ptr().cast(), 1) {
                    1 => return Some((*board.as_ptr()).answer),
                    -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                    _ => return None,
                }
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SAFETY: our own child, not reaped yet, so the number is still its.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            while libc::waitpid(self.pid, std::ptr::null_mut(), 0) == -1
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
        }
    }
}

/// The child's life. Ends when the parent closes its end of the pipe, dead or alive.
fn serve(
    (bell, reply, parents_end): (&OwnedFd, &OwnedFd, &OwnedFd),
    board: &Mapping,
    arena: Range,
    file: &File,
) -> ! {
    let board = board.ptr().cast::<Board>().as_ptr();
    let mut byte = [0_u8; 1];
    // SAFETY: system calls on our own descriptors; the board as in `ask`; _exit runs no handler.
    unsafe {
        // Inherited: with it open the child would never see the end of the pipe.
        libc::close(parents_end.as_raw_fd());
        while libc::read(bell.as_raw_fd(), byte.as_mut_ptr().cast(), 1) == 1 {
            (*board).answer = call(arena, file, &(*board).call);
            libc::write(reply.as_raw_fd(), byte.as_ptr().cast(), 1);
        }
        libc::_exit(0)
    }
}
