// SPDX-License-Identifier: MIT OR Apache-2.0
//! A forked process that makes the calls it is told to.
//!
//! Parent and child share one page, the board: the parent writes a call there and rings, the child makes it, writes the
//! answer and rings back. The rings are pipes, so each sees the death of the other.

use std::io;

use rustix::io::Errno;

use super::{Answer, Call, Lab};
use crate::sys::lab::Server;

/// A child of a [`Lab`]. Dropping it kills it and waits until its memory is gone.
#[derive(Debug)]
pub struct Fork<'a> {
    server: Server,
    lab: &'a Lab,
}

impl<'a> Fork<'a> {
    pub(super) fn new(lab: &'a Lab) -> io::Result<Fork<'a>> {
        Ok(Fork { server: Server::fork(lab.arena, &lab.file)?, lab })
    }

    /// As [`Lab::call`], in the child. Sleeps until it is done.
    ///
    /// # Errors
    /// As [`Lab::call`]; `ESRCH` if the child is dead.
    pub fn call(&mut self, call: &Call) -> Answer {
        self.server.ask(call).unwrap_or(Err(Errno::SRCH))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// The lab that it is a fork of.
    #[must_use]
    pub fn lab(&self) -> &'a Lab {
        self.lab
    }
}
