// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every change of every mm with a VM on it, with its cause: the raw stream, for looking at other programs.
//!
//! A source tells one program of its own memory; this tells of all. It puts no notifier on anything: whoever wants a
//! program heard makes a VM on its mm ([`crate::trace`] does).
//!
//! Whose memory a record is about is *not* in it: the tracepoint has no mm. A task of a watched process changes its own
//! memory; a kernel thread, or another process that truncates a file, changes anybody's who maps the address.

use super::cause::{self, COMM, POINTERS, STACK, STACK_DEPTH, TOP, TOP_WORDS, WORDS};
use super::layout::Kind;
use super::parts::{check_ring, tracepoint};
use super::{OpenError, Record, error};
use crate::kvm::canary::Canary;
use crate::sys::later::Later;
use crate::sys::map::{Mapping, Word};
use crate::sys::ringbuf::RingReader;
use crate::sys::signal::blocking_signals;
use crate::sys::tracefs::Tracefs;
use crate::sys::{bpf, perf, vm};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// One change and what made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What the kernel announced.
    pub record: Record,
    /// The system call in which the task was, by number; `None`: a page fault, or an interrupt. Means nothing for a
    /// kernel thread.
    pub syscall: Option<u32>,
    /// The third argument of that call: madvise's advice.
    pub third: u64,
    /// Return addresses in user space, the innermost first, as far as frame pointers lead: the first is right, the
    /// others only in programs that keep them. Empty for a kernel thread.
    pub stack: Vec<u64>,
    /// The stack pointer of user space.
    pub sp: u64,
    /// Its frame pointer, or whatever the program keeps in that register.
    pub bp: u64,
    /// The words at the top of the user-space stack, from `sp` on; zeroes where they could not be read.
    pub top: [u64; TOP_WORDS],
    comm: [u8; 16],
}

impl Change {
    fn from_words(w: &[u64; WORDS]) -> Change {
        let record = Record::from_words([w[0] & 0xffff_ffff, w[1], w[2], w[3], w[4]]);
        // bpf_get_stack: bytes, or an error.
        let depth = usize::try_from(w[7].cast_signed()).map_or(0, |bytes| bytes / 8).min(STACK_DEPTH);
        let stack = w[STACK..STACK + depth].iter().copied().take_while(|ip| *ip != 0).collect();
        let mut comm = [0; 16];
        comm[..8].copy_from_slice(&w[COMM].to_ne_bytes());
        comm[8..].copy_from_slice(&w[COMM + 1].to_ne_bytes());
        let mut top = [0; TOP_WORDS];
        top.copy_from_slice(&w[TOP..]);
        let (sp, bp) = (w[POINTERS], w[POINTERS + 1]);
        Change { record, syscall: u32::try_from(w[5]).ok(), third: w[6], stack, sp, bp, top, comm }
    }

    /// One that no kernel told: for the tests of those who count them.
    #[doc(hidden)]
    #[must_use]
    pub fn invented(record: Record, syscall: Option<u32>, third: u64, stack: Vec<u64>) -> Change {
        Change { record, syscall, third, stack, sp: 0, bp: 0, top: [0; TOP_WORDS], comm: [0; 16] }
    }

    /// The command of the task (comm), at most 15 bytes.
    #[must_use]
    pub fn comm(&self) -> String {
        let len = self.comm.iter().position(|byte| *byte == 0).unwrap_or(self.comm.len());
        String::from_utf8_lossy(&self.comm[..len]).into_owned()
    }

    /// Did a kernel thread do it?
    #[must_use]
    pub fn by_kernel_thread(&self) -> bool {
        self.stack.is_empty()
    }
}

/// The stream. Its descriptor (`AsFd`) is readable when something has come.
///
/// Once it is dropped the kernel detaches the program, which takes it some grace periods that nobody waits for.
#[derive(Debug)]
pub struct Stream {
    reader: RingReader,
    ring: OwnedFd,
    lost: Mapping,
    lost_word: Word,
    prog: bpf::Program,
    #[expect(dead_code, reason = "held, never read: the program hangs on it")]
    event: Later,
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl Stream {
    /// Opens it with a ring of `len` bytes (a power of two from 4096; a record takes 712) and checks that it hears.
    ///
    /// # Errors
    /// [`OpenError`]. May sleep.
    pub fn open(len: u32) -> Result<Stream, OpenError> {
        blocking_signals(|| Stream::open_quietly(len))
    }

    fn open_quietly(len: u32) -> Result<Stream, OpenError> {
        let refused = |what| move |e: std::io::Error| error::bpf(what, &e, "");
        let fs = Tracefs::open().map_err(error::tracepoint)?;
        let (tracepoint, start, end) = tracepoint(&fs, Kind::Unmap)?;
        let ring = bpf::create_ring("watch_ring", check_ring(len)?).map_err(refused("making the ring"))?;
        let counters = bpf::create_words("watch_lost", 4096).map_err(refused("making the counter"))?;
        let code = cause::assemble(start, end, ring.as_fd(), counters.as_fd()).ok_or_else(|| {
            OpenError::Options("the tracepoint's record is too large to be read".to_owned())
        })?;
        let prog = bpf::load_tracepoint("watch", &code, c"Dual MIT/GPL")
            .map_err(|e| error::bpf("loading the program", &e.error, &e.log))?;
        let event = perf::attach_point(tracepoint.id).map_err(error::perf)?;
        perf::set_bpf(event.as_fd(), prog.as_fd())
            .map_err(|e| error::bpf("attaching the program", &e, ""))?;
        let prog = bpf::Program::keep(prog).map_err(refused("asking for the program"))?;
        let lost = Mapping::shared(counters.as_fd(), 4096, libc::PROT_READ, 0)
            .map_err(error::system("mapping the counter"))?;
        let lost_word =
            lost.word(0).ok_or_else(|| OpenError::Options("the counter is not a word".to_owned()))?;
        let reader = RingReader::new(ring.as_fd(), len).map_err(error::system("mapping the ring"))?;
        let event = Later::new(event);
        let mut stream = Stream { reader, ring, lost, lost_word, prog, event };
        stream.verify()?;
        Ok(stream)
    }

    /// A VM of our own for a moment, and a page changed on purpose.
    fn verify(&mut self) -> Result<(), OpenError> {
        let path = Path::new("/dev/kvm");
        let kvm = vm::open(path).map_err(|e| error::kvm(path, e))?;
        let _vm = Later::new(vm::create(kvm.as_fd()).map_err(|e| error::kvm(path, e))?);
        let canary = Canary::reserve().map_err(error::system("reserving the canary page"))?;
        let range = canary.range();
        canary.poke();
        let mut heard = Vec::new();
        self.drain(&mut heard);
        let ours = |c: &&Change| (c.record.start, c.record.end) == (range.start(), range.end());
        // The last: to map the page announces it as well.
        let Some(change) = heard.iter().rfind(ours) else {
            return Err(OpenError::Canary(format!("no record tells of madvise of {range:?}")));
        };
        let expected = (Some(libc::SYS_madvise as u32), libc::MADV_DONTNEED as u64, std::process::id());
        let found = (change.syscall, change.third, change.record.tgid);
        if found != expected || change.stack.is_empty() {
            return Err(OpenError::Canary(format!("madvise was told as {change:?}")));
        }
        Ok(())
    }

    /// Appends what has come since the last time. Never sleeps.
    pub fn drain(&mut self, into: &mut Vec<Change>) {
        // A record of another size cannot come from our program.
        while let Ok(Some(words)) = self.reader.next::<WORDS>() {
            into.push(Change::from_words(&words));
        }
    }

    /// Changes that did not fit the ring.
    pub fn lost(&self) -> u64 {
        debug_assert!(self.lost.len() == 4096);
        self.lost_word.load()
    }

    /// Times that the kernel skipped the program (see [`super::Health::misses`]), if it can be known.
    pub fn misses(&self) -> Option<u64> {
        self.prog.misses()
    }
}
