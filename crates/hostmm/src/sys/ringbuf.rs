// SPDX-License-Identifier: MIT OR Apache-2.0
//! The reader's side of a BPF ring buffer.
//!
//! Layout (kernel/bpf/ringbuf.c since 5.8): page 0 holds the consumer's position and is ours to write; page 1 holds the
//! producer's, and the data follows, mapped twice in a row so that no record is split.

use super::map::{Mapping, Word};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

/// The consumer's position, which the kernel reads.
#[expect(clippy::disallowed_types, reason = "a word of the ring, in memory shared with the kernel")]
type Position = std::sync::atomic::AtomicU64;
/// The head of a record, which the kernel writes.
#[expect(clippy::disallowed_types, reason = "a word of the ring, in memory shared with the kernel")]
type Header = std::sync::atomic::AtomicU32;

const PAGE: usize = 4096;
const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
const HEADER: u64 = 8;

/// A ring buffer, to be read by one reader.
#[derive(Debug)]
pub(crate) struct RingReader {
    consumer: Mapping,
    producer: Mapping,
    producer_pos: Word,
    data_len: u64,
}

impl RingReader {
    /// Maps the ring `fd` of `data_len` bytes.
    pub(crate) fn new(fd: BorrowedFd<'_>, data_len: u32) -> io::Result<RingReader> {
        let data = data_len as usize;
        let consumer = Mapping::shared(fd, PAGE, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        let producer = Mapping::shared(fd, PAGE + 2 * data, libc::PROT_READ, PAGE as i64)?;
        let producer_pos =
            producer.word(0).ok_or_else(|| io::Error::other("ring without a producer position"))?;
        Ok(RingReader { consumer, producer, producer_pos, data_len: u64::from(data_len) })
    }

    /// Takes the next record of `N` words. `Ok(None)`: nothing there. `Err`: a record of another size, which is
    /// skipped.
    pub(crate) fn next<const N: usize>(&mut self) -> Result<Option<[u64; N]>, usize> {
        loop {
            let pos = self.consumer_pos().load(Ordering::Relaxed);
            if pos >= self.producer_pos.load() {
                return Ok(None);
            }
            let at = (pos & (self.data_len - 1)) as usize;
            let header = self.header(at);
            if header & BUSY != 0 {
                return Ok(None);
            }
            let len = (header & !DISCARD) as usize;
            let record = (len == N * 8).then(|| self.words(at + HEADER as usize));
            let next = pos + ((len as u64 + HEADER + 7) & !7);
            self.consumer_pos().store(next, Ordering::Release);
            if header & DISCARD == 0 {
                return record.map(Some).ok_or(len);
            }
        }
    }

    fn words<const N: usize>(&self, at: usize) -> [u64; N] {
        let mut out = [0; N];
        for (i, word) in out.iter_mut().enumerate() {
            // SAFETY: a committed record of N words lies at `at` in the doubled data area; the kernel does not write
            // it again before the consumer's position has passed it. Records are 8-byte aligned.
            *word = unsafe { self.producer.ptr().add(PAGE + at + i * 8).cast::<u64>().read() };
        }
        out
    }

    fn consumer_pos(&self) -> &Position {
        // SAFETY: the first word of our writable page; the kernel only reads it.
        unsafe { self.consumer.ptr().cast::<Position>().as_ref() }
    }

    fn header(&self, at: usize) -> u32 {
        // SAFETY: `at` is inside the data area and 8-byte aligned; the kernel clears the busy bit with one store.
        unsafe { self.producer.ptr().add(PAGE + at).cast::<Header>().as_ref() }.load(Ordering::Acquire)
    }
}
