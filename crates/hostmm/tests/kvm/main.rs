// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kvm source on the running kernel. Each test runs in a child process of its own.
mod cpus;
mod grant;
mod hears;
mod limits;
mod memory;
mod monitor;

use hostmm::capability::Capability;
use hostmm::kvm::{KvmSource, Options, Prefer};
use hostmm::testing;
use mmu_notifier::Range;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(180);
/// For what another thread or the kernel does in its own time.
const SOON: Duration = Duration::from_secs(60);

/// Runs `body` in a child once per way of listening.
fn live_both(name: &str, body: impl Fn(Prefer)) {
    for (way, prefer) in [("bpf", Prefer::Bpf), ("perf", Prefer::PerfRing)] {
        if available(prefer) {
            testing::in_child(&format!("{name}#{way}"), DEADLINE, || body(prefer));
        }
    }
}

fn live(name: &str, body: impl FnOnce()) {
    if available(Prefer::Bpf) {
        testing::in_child(name, DEADLINE, body);
    }
}

fn available(prefer: Prefer) -> bool {
    let way = if prefer == Prefer::PerfRing { Capability::PerfRing } else { Capability::Bpf };
    testing::require(Capability::DevKvm)
        && testing::require(Capability::KvmTracepoint)
        && testing::require(way)
}

fn open(prefer: Prefer) -> KvmSource {
    KvmSource::open(&Options { prefer, ..Options::default() }).unwrap()
}

/// Hears of `window` alone: what the VMs of other programs do elsewhere neither fills the ring nor is counted.
fn open_ring(prefer: Prefer, ring: u32, window: Range) -> KvmSource {
    let window = Some(window);
    KvmSource::open(&Options { prefer, ring: Some(ring), window, ..Options::default() }).unwrap()
}
