// SPDX-License-Identifier: MIT OR Apache-2.0
//! The privileged half: maps, programs and the event that they hang on, made before anybody's VM is.

use super::layout::{Kind, Layout};
use super::program::{self, Spec};
use super::{OpenError, Options, error};
use crate::sys::tracefs::{Event, Tracefs, TracefsError};
use crate::sys::{bpf, perf, vm};
use mmu_notifier::Range;
use std::os::fd::{AsFd, OwnedFd};

/// The tracepoint of `kind`, with the offsets of start and end in its record.
pub(crate) fn tracepoint(fs: &Tracefs, kind: Kind) -> Result<(Event, u32, u32), OpenError> {
    let find = || -> Result<_, TracefsError> {
        let event = match kind {
            Kind::Unmap => fs.event("kvm", "kvm_unmap_hva_range")?,
            Kind::Age => fs.event("kvm", "kvm_age_hva")?,
        };
        let (start, end) = (event.word("start")?.offset, event.word("end")?.offset);
        Ok((event, start, end))
    };
    find().map_err(error::tracepoint)
}

/// The length of a ring, if it can have that.
pub(crate) fn check_ring(len: u32) -> Result<u32, OpenError> {
    if len.is_power_of_two() && len >= 4096 {
        return Ok(len);
    }
    Err(OpenError::Options(format!("a ring of {len} bytes: wants a power of two from 4096")))
}

/// Everything of a BPF source that needs privilege, as descriptors.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) kvm: OwnedFd,
    pub(crate) counters: OwnedFd,
    pub(crate) ring: Option<(OwnedFd, u32)>,
    /// One per kind, with its program attached.
    pub(crate) events: Vec<OwnedFd>,
    /// The programs, for their statistics; not handed over.
    pub(crate) progs: Vec<bpf::Program>,
    pub(crate) layout: Layout,
}

impl Parts {
    /// Makes them. `canary` is the page that the program reports whatever the window.
    pub(crate) fn make(options: &Options, canary: Range) -> Result<Parts, OpenError> {
        let layout = Layout { buckets: options.buckets, age: options.age }.check()?;
        let kvm = vm::open(&options.kvm_path).map_err(|e| error::kvm(&options.kvm_path, e))?;
        let fs = Tracefs::open().map_err(error::tracepoint)?;
        let refused = |what| move |e: std::io::Error| error::bpf(what, &e, "");
        let counters =
            bpf::create_words("notifier_counts", layout.map_len()).map_err(refused("making the counters"))?;
        let ring = match options.ring {
            None => None,
            Some(len) => {
                check_ring(len)?;
                Some((bpf::create_ring("notifier_ring", len).map_err(refused("making the ring"))?, len))
            }
        };
        let mut parts = Parts { kvm, counters, ring, events: Vec::new(), progs: Vec::new(), layout };
        for kind in [Kind::Unmap, Kind::Age] {
            if kind == Kind::Unmap || options.age {
                parts.attach(&fs, kind, options.window, canary)?;
            }
        }
        // Only now: the verifier turns the map of a frozen array that programs may not write into constants.
        bpf::freeze(parts.counters.as_fd()).map_err(refused("freezing the counters"))?;
        Ok(parts)
    }

    fn attach(
        &mut self,
        fs: &Tracefs,
        kind: Kind,
        window: Option<Range>,
        canary: Range,
    ) -> Result<(), OpenError> {
        let (event, start, end) = tracepoint(fs, kind)?;
        let spec = Spec {
            kind,
            start,
            end,
            layout: self.layout,
            window,
            canary,
            counters: self.counters.as_fd(),
            ring: self.ring.as_ref().map(|(fd, _)| fd.as_fd()),
        };
        let code = program::assemble(&spec).ok_or_else(|| {
            OpenError::Options("the tracepoint's record is too large to be read".to_owned())
        })?;
        let prog = bpf::load_tracepoint("mmu_notifier", &code, c"Dual MIT/GPL")
            .map_err(|e| error::bpf("loading the program", &e.error, &e.log))?;
        let point = perf::attach_point(event.id).map_err(error::perf)?;
        perf::set_bpf(point.as_fd(), prog.as_fd())
            .map_err(|e| error::bpf("attaching the program", &e, ""))?;
        self.events.push(point);
        let prog = bpf::Program::keep(prog).map_err(|e| error::bpf("asking for the program", &e, ""))?;
        self.progs.push(prog);
        Ok(())
    }
}
