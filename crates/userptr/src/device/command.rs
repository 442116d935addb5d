// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command set that devices with an engine share: what each command does to the byte, so that two engines can be
//! held against each other.
//!
//! Commands are executed in order; each sees what those before it wrote. A command accesses its bytes upwards, at each
//! offset what it reads before what it writes and `a` before `b`, its result last, and comparing ends at the first
//! difference: that says which access faults, if several could. All numbers in memory are little endian.
//! A range whose last byte overflows, and source and destination that overlap, are refused at submission
//! ([`Command::check`]), so no engine has to say what such a copy means. Zero bytes are allowed and touch nothing.

use std::fmt;
use std::time::Duration;

use interleave::MaySleep;
use mmu_notifier::Access;

/// An address in the device's own address space, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceAddr(pub u64);

impl fmt::Debug for DeviceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dev {:#x}", self.0)
    }
}

impl fmt::Display for DeviceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// One thing for an engine to do. Lengths, pitches and widths are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// Copies `len` bytes.
    Copy {
        /// To.
        dst: DeviceAddr,
        /// From.
        src: DeviceAddr,
        /// How many.
        len: u64,
    },
    /// Sets `len` bytes to `byte`.
    Fill {
        /// Where.
        dst: DeviceAddr,
        /// How many.
        len: u64,
        /// To what.
        byte: u8,
    },
    /// Stores the [`checksum`] of `len` bytes, eight bytes, at `result`.
    Checksum {
        /// Of what.
        src: DeviceAddr,
        /// How many.
        len: u64,
        /// Where to store it.
        result: DeviceAddr,
    },
    /// Compares `len` bytes and stores the offset of the first that differs, or `len`, eight bytes, at `result`.
    Compare {
        /// One side.
        a: DeviceAddr,
        /// The other.
        b: DeviceAddr,
        /// How many.
        len: u64,
        /// Where to store the offset.
        result: DeviceAddr,
    },
    /// Copies `height` rows of `width` bytes between surfaces whose rows are `dst_pitch` and `src_pitch` bytes apart.
    Blit2d {
        /// First byte of the destination's first row.
        dst: DeviceAddr,
        /// At least `width`.
        dst_pitch: u64,
        /// First byte of the source's first row.
        src: DeviceAddr,
        /// At least `width`.
        src_pitch: u64,
        /// Bytes in a row.
        width: u64,
        /// Rows.
        height: u64,
    },
    /// Stores four bytes, in one access; what fences are made of.
    StoreDword {
        /// Where: a multiple of four.
        dst: DeviceAddr,
        /// What.
        value: u32,
    },
}

/// Why a command is not executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// Past the last address.
    #[error("{command:?} reaches past the end of the device's address space")]
    Overflow {
        /// Which.
        command: Command,
    },
    /// Source and destination, or a result and what it is of, share a byte.
    #[error("{command:?} writes where it reads")]
    Overlap {
        /// Which.
        command: Command,
    },
    /// Rows overlap each other.
    #[error("{command:?} has rows longer than their pitch")]
    Pitch {
        /// Which.
        command: Command,
    },
    /// Not a multiple of four.
    #[error("{command:?} stores to an address that is not a multiple of four")]
    Unaligned {
        /// Which.
        command: Command,
    },
}

/// An access of an engine that nothing is mapped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("command {command} of the batch faulted: {access:?} at device address {addr}")]
pub struct Fault {
    /// Index in the batch. Those before it are done, it may be done in part, those after it are not begun.
    pub command: usize,
    /// The first byte that could not be accessed.
    pub addr: DeviceAddr,
    /// Which way.
    pub access: Access,
}

/// The wrapping sum of the bytes as little-endian 64-bit words, the last one filled up with zeros.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::wrapping_add(sum, u64::from_le_bytes(word))
    })
}

/// Bytes `[start, end)` in device addresses.
type Span = (u64, u64);

impl Command {
    /// What it accesses: first byte, length, access; in a blit with what lies between the rows. In the order in which
    /// each begins.
    pub fn spans(&self) -> impl Iterator<Item = (DeviceAddr, u64, Access)> {
        let rows = |pitch: u64, width: u64, height: u64| match height.checked_sub(1) {
            Some(above) if width != 0 => above.saturating_mul(pitch).saturating_add(width),
            _ => 0,
        };
        let read = |at: DeviceAddr, len: u64| Some((at, len, Access::Read));
        let write = |at: DeviceAddr, len: u64| Some((at, len, Access::Write));
        let spans = match *self {
            Command::Copy { dst, src, len } => [read(src, len), write(dst, len), None],
            Command::Fill { dst, len, .. } => [write(dst, len), None, None],
            Command::Checksum { src, len, result } => [read(src, len), write(result, 8), None],
            Command::Compare { a, b, len, result } => [read(a, len), read(b, len), write(result, 8)],
            Command::Blit2d { dst, dst_pitch, src, src_pitch, width, height } => {
                [read(src, rows(src_pitch, width, height)), write(dst, rows(dst_pitch, width, height)), None]
            }
            Command::StoreDword { dst, .. } => [write(dst, 4), None, None],
        };
        spans.into_iter().flatten()
    }

    /// Can it be executed at all?
    ///
    /// # Errors
    /// [`CommandError`], the same for each engine.
    pub fn check(&self) -> Result<(), CommandError> {
        let command = *self;
        let span = |at: DeviceAddr, len: u64| -> Result<Span, CommandError> {
            let end = at.0.checked_add(len).ok_or(CommandError::Overflow { command })?;
            Ok((at.0, end))
        };
        let apart = |a: Span, b: Span| {
            let overlap = a.0 < b.1 && b.0 < a.1;
            if overlap { Err(CommandError::Overlap { command }) } else { Ok(()) }
        };
        match command {
            Command::Copy { dst, src, len } => apart(span(dst, len)?, span(src, len)?),
            Command::Fill { dst, len, .. } => span(dst, len).map(drop),
            Command::Checksum { src, len, result } => apart(span(src, len)?, span(result, 8)?),
            Command::Compare { a, b, len, result } => {
                let result = span(result, 8)?;
                apart(span(a, len)?, result)?;
                apart(span(b, len)?, result)
            }
            Command::Blit2d { dst, dst_pitch, src, src_pitch, width, height } => {
                if width > dst_pitch || width > src_pitch {
                    return Err(CommandError::Pitch { command });
                }
                let rows = |at: DeviceAddr, pitch: u64| {
                    let Some(above) = height.checked_sub(1) else { return span(at, 0) };
                    let len = above.checked_mul(pitch).and_then(|n| n.checked_add(width));
                    span(at, len.ok_or(CommandError::Overflow { command })?)
                };
                apart(rows(dst, dst_pitch)?, rows(src, src_pitch)?)
            }
            Command::StoreDword { dst, .. } => {
                if !dst.0.is_multiple_of(4) {
                    return Err(CommandError::Unaligned { command });
                }
                span(dst, 4).map(drop)
            }
        }
    }
}

/// A batch that was submitted. Dropping it does not wait. Any number of threads may wait for it, and again, and all get the
/// same answer.
pub trait Fence: Send + Sync {
    /// Is it done, well or badly? Never sleeps.
    fn is_signaled(&self) -> bool;

    /// Waits until it is done.
    ///
    /// # Errors
    /// [`FenceError`]: a fault, or the end of the engine.
    fn wait(&self, cx: &mut MaySleep<'_>) -> Result<(), FenceError>;

    /// Waits until it is done, well or badly, which [`wait`](Fence::wait) tells then; until a signal was handled; or until
    /// the time is up (`None`: never).
    ///
    /// # Errors
    /// [`WaitError`]: it is not done, and runs on.
    fn wait_interruptible(&self, cx: &mut MaySleep<'_>, timeout: Option<Duration>) -> Result<(), WaitError>;
}

/// Why a wait ended before the batch did, which runs on: wait again, or kill it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// A signal was handled (EINTR).
    #[error("the wait was interrupted by a signal; the batch runs on")]
    Interrupted,
    /// The time is up (ETIME).
    #[error("the batch is not done after {0:?}; it runs on")]
    TimedOut(Duration),
}

/// Why a batch did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FenceError {
    /// An access that nothing is mapped for.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// Killed, with its context.
    #[error("the batch was killed: {why}")]
    Killed {
        /// By whom or for what.
        why: String,
    },
    /// The engine does not work any more.
    #[error("the engine is gone: {source}")]
    Gone {
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Executes commands on device addresses.
///
/// # Safety
/// A batch accesses nothing but what the commands name, at addresses where the same type's
/// [`Device`](super::Device) has mapped memory, for the access that it was mapped for; and nothing at all once its
/// fence is signaled, once [waiting](Fence::wait) for it has returned or panicked, or if [`submit`](Engine::submit) fails or
/// panics, once that has returned.
pub unsafe trait Engine: Send + Sync {
    /// What tells that a batch is done.
    type Fence: Fence;

    /// Hands over a batch; batches of one engine are executed in the order of submission.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing is executed then.
    ///
    /// # Safety
    /// The engine writes to memory of the program that is mapped at the commands' device addresses: until the fence
    /// is signaled no reference may exist to what it writes, and nobody may write what it reads.
    unsafe fn submit(&self, cx: &mut MaySleep<'_>, batch: &[Command]) -> Result<Self::Fence, SubmitError>;
}

/// Why a batch is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// It makes no sense.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The engine is of the parent process.
    #[error("the engine was opened before fork and serves the parent's memory: open another in the child")]
    Forked,
    /// The engine does not work (any more).
    #[error("the engine takes no batch: {source}")]
    Broken {
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
