// SPDX-License-Identifier: MIT OR Apache-2.0
//! VMs whose mm is gone, closed where nobody waits for it.
//!
//! To close a VM waits for several SRCU grace periods, which is milliseconds. The tracing thread must not spend them: a
//! program that is stopped meanwhile would wait as well. Grace periods of several VMs pass together, so there is more
//! than one closer. Each keeps the last few: when all is over these are left to the kernel ([`crate::sys::later`]), so that
//! nobody waits for a close that began at the program's end.

use crate::sys::later;
use interleave::Scope;
use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::mpsc;

/// A program that forks and execs in a loop on one CPU fills about so many.
const CLOSERS: usize = 4;
/// VMs that each closer keeps, at about 100 KiB of the kernel's memory each. A program of some dozens of address spaces
/// has none closed while it runs: that costs as much as to make one (most of both is the VM's directory in debugfs).
const KEPT: usize = 16;

/// Where VMs go to be closed. The closers end when this and every [`Planted`] are gone.
pub(super) struct Reaper {
    closers: Vec<mpsc::Sender<OwnedFd>>,
    next: Cell<usize>,
}

impl Reaper {
    /// Starts the closers.
    pub(super) fn start<'scope>(scope: &Scope<'scope, '_>) -> Reaper {
        let closer = |_| {
            let (to, from) = mpsc::channel::<OwnedFd>();
            scope.spawn("vm-close", move |_| close(&from));
            to
        };
        Reaper { closers: (0..CLOSERS).map(closer).collect(), next: Cell::new(0) }
    }

    /// Takes charge of a VM.
    pub(super) fn keep(&self, vm: OwnedFd) -> Rc<Planted> {
        let at = self.next.get();
        self.next.set((at + 1) % self.closers.len());
        Rc::new(Planted { vm: Some(vm), to: self.closers[at].clone() })
    }
}

/// One closer: closes what comes, but for the last.
fn close(from: &mpsc::Receiver<OwnedFd>) {
    let mut kept = VecDeque::new();
    while let Ok(vm) = from.recv() {
        kept.push_back(vm);
        while kept.len() > KEPT {
            kept.pop_front();
            kept.extend(from.try_iter());
        }
    }
    later::close(kept.into());
}

/// A VM on a traced program's mm.
pub(super) struct Planted {
    vm: Option<OwnedFd>,
    to: mpsc::Sender<OwnedFd>,
}

impl Planted {
    /// Closes it here and now: it is on the mm of a program that goes on.
    pub(super) fn close(mut self) {
        self.vm = None;
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        if let Some(vm) = self.vm.take() {
            // A closer that is gone gives it back, and it is closed here.
            let _ = self.to.send(vm);
        }
    }
}
