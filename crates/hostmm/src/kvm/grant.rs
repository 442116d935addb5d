// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handing a source to a process that could not open one.
//!
//! A privileged helper makes a map, a program and an event for one client and sends them over a Unix socket; the client
//! makes the VM itself, because a VM belongs to the mm of the process that makes it, and checks that it hears.
//! The helper may then exit: the event lives as long as the client has it mapped.
//!
//! # What the client gains
//!
//! * /dev/kvm: it can make virtual machines, as a member of group kvm can;
//! * the counters, read-only (the map is frozen), of the addresses in its window, also where it is *another* process
//!   with a VM that changes memory at such an address: so each client gets a map and a window of its own;
//! * with a ring, those ranges themselves, with pid, CPU and time. Without one, only how often;
//! * the event: it can enable it and read how many ranges were announced on CPU 0, of all processes.
//!
//! It cannot write the counters, load programs or open other events.

use super::canary::Canary;
use super::layout::{Buckets, Layout};
use super::parts::{Parts, check_ring};
use super::{KvmSource, OpenError, Options};
use crate::sys::signal::blocking_signals;
use mmu_notifier::Range;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// First word of the message; its last byte is the version of the layout.
const MAGIC: u32 = 0x6b76_6d02;
const WORDS: usize = 8;
/// /dev/kvm, counters, two events, ring.
const FDS_MAX: usize = 5;

/// The page that a client changes to learn whether it hears. Reserve it first: its address goes into the program.
#[derive(Debug)]
pub struct CanaryPage(Canary);

impl CanaryPage {
    /// Reserves the page in the calling process.
    ///
    /// # Errors
    /// No memory.
    pub fn reserve() -> io::Result<CanaryPage> {
        Canary::reserve().map(CanaryPage)
    }

    /// What to tell the helper.
    pub fn range(&self) -> Range {
        self.0.range()
    }
}

/// A source without a VM yet, as descriptors.
#[derive(Debug)]
pub struct Grant(Parts);

impl Grant {
    /// Makes one for a client whose canary page is `canary` (an address in the client). Only BPF can be granted.
    ///
    /// # Errors
    /// As [`KvmSource::open`].
    pub fn make(options: &Options, canary: Range) -> Result<Grant, OpenError> {
        blocking_signals(|| Parts::make(options, canary)).map(Grant)
    }

    /// Sends it as one message over a connected Unix socket (SOCK_SEQPACKET or SOCK_STREAM).
    ///
    /// # Errors
    /// sendmsg(2).
    pub fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let p = &self.0;
        let b = p.layout.buckets.unwrap_or(Buckets { count: 0, granule_shift: 0, wide: 0 });
        let ring_len = p.ring.as_ref().map_or(0, |(_, len)| *len);
        let words: [u32; WORDS] = [
            MAGIC,
            u32::from(p.layout.buckets.is_some()),
            b.count,
            b.granule_shift,
            b.wide,
            u32::from(p.layout.age),
            ring_len,
            p.events.len() as u32,
        ];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let mut fds: Vec<BorrowedFd<'_>> = vec![p.kvm.as_fd(), p.counters.as_fd()];
        fds.extend(p.events.iter().map(AsFd::as_fd));
        fds.extend(p.ring.iter().map(|(fd, _)| fd.as_fd()));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("too many descriptors"));
        }
        let sent = sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("the message was cut short")) }
    }

    /// Receives one that [`Grant::send`] sent.
    ///
    /// The sender is trusted as the kernel is: it could send counters that never move. The canary finds that out for
    /// its own page, at open.
    ///
    /// # Errors
    /// [`OpenError::Grant`] if the message is not a grant; [`OpenError::System`] if recvmsg(2) fails.
    pub fn receive(socket: impl AsFd) -> Result<Grant, OpenError> {
        let mut bytes = [0u8; WORDS * 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
        )
        .map_err(|e| OpenError::System { what: "receiving the grant", cause: e.into() })?;
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got.bytes != bytes.len() || got.flags.contains(ReturnFlags::CTRUNC) {
            return Err(OpenError::Grant(format!("{} bytes received, wanted {}", got.bytes, bytes.len())));
        }
        parse(&bytes, fds)
    }
}

fn parse(bytes: &[u8; WORDS * 4], fds: Vec<OwnedFd>) -> Result<Grant, OpenError> {
    let mut words = [0u32; WORDS];
    for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*chunk);
    }
    let [magic, bucketed, count, granule_shift, wide, age, ring_len, events] = words;
    if magic != MAGIC {
        return Err(OpenError::Grant("not a grant, or one of another version".to_owned()));
    }
    let buckets = (bucketed != 0).then_some(Buckets { count, granule_shift, wide });
    let layout = Layout { buckets, age: age != 0 }.check()?;
    let expected_events = if layout.age { 2 } else { 1 };
    let wanted = 2 + events as usize + usize::from(ring_len != 0);
    if events != expected_events || fds.len() != wanted {
        return Err(OpenError::Grant(format!("{} descriptors received, wanted {wanted}", fds.len())));
    }
    if ring_len != 0 {
        check_ring(ring_len)?;
    }
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(|| OpenError::Grant("a descriptor is missing".to_owned()));
    let (kvm, counters) = (next()?, next()?);
    let events = (0..events).map(|_| next()).collect::<Result<Vec<_>, _>>()?;
    let ring = if ring_len == 0 { None } else { Some((next()?, ring_len)) };
    Ok(Grant(Parts { kvm, counters, ring, events, progs: Vec::new(), layout }))
}

impl KvmSource {
    /// A source from a grant, for the calling process. `canary` is the page whose address the grant was made for.
    ///
    /// # Errors
    /// [`OpenError`]; [`OpenError::Canary`] if the grant was made for another page or does not hear.
    pub fn from_grant(grant: Grant, canary: CanaryPage) -> Result<KvmSource, OpenError> {
        blocking_signals(|| KvmSource::from_parts(grant.0, canary.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: [u32; WORDS]) -> [u8; WORDS * 4] {
        let mut out = [0; WORDS * 4];
        for (chunk, word) in out.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *chunk = word.to_ne_bytes();
        }
        out
    }

    fn fds(n: usize) -> Vec<OwnedFd> {
        (0..n).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn a_grant_with_odd_words_or_descriptors_is_refused() {
        let good = [MAGIC, 1, 1024, 16, 64, 0, 4096, 1];
        assert!(parse(&bytes(good), fds(4)).is_ok());
        assert!(parse(&bytes(good), fds(3)).is_err());
        assert!(parse(&bytes(good), fds(5)).is_err());
        for (at, value) in [(0, MAGIC + 1), (2, 1000), (3, 99), (6, 4097), (7, 2), (7, u32::MAX)] {
            let mut bad = good;
            bad[at] = value;
            assert!(parse(&bytes(bad), fds(4)).is_err(), "word {at} = {value}");
        }
    }
}
