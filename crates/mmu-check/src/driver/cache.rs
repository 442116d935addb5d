// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userptr-cache`, `userptr-cache-late`: the registration cache itself, [`userptr::cache`], as a driver.
//!
//! Bind: nothing is registered. Each operation of the device is one lookup: get a lease, let the device do it through the
//! lease's mapping, drop the lease. Unbind: invalidate.
//!
//! What is promised, and judged: what a lookup returns is what the CPU has when the lookup begins, or later; until
//! the lease ends the device stays there, whatever the program does to the address ([`drivers::Follows::PagesSince`]). What
//! the kernel does of its own accord must not part the device from the process even under a lease: that is what the
//! pins are for, in a kernel in which they hold (5.19).
//!
//! Lock order: that of the cache, and of the modelled source ([`softmm::told`]).

use super::consumer::{self, Consumer, Embedded};
use super::fault;
use super::hardware::Hardware;
use drivers::{
    BindError, Device, DeviceContext, DeviceFault, DeviceOp, Driver, Holds, Kind, OpenError, Options,
    SubmitError,
};
use interleave::MaySleep;
use mmu_notifier::primary::{After, CountedBefore, Delivery};
use mmu_notifier::{Access, Range};
use softmm::Mm;
use softmm::told::Told;
use std::sync::Arc;
use userptr::cache::{self, Reaper};
use userptr::{CacheError, RegistrationCache};

/// Over a source that counts before the change, as kvm.
pub static KIND: Kind = Kind {
    name: "userptr-cache",
    kernel: "userptr",
    summary: "our registration cache, told in time",
    holds: Holds::Pages,
    callbacks: consumer::IN_TIME,
    reads: true,
    open: |cx, mm, device, options| open::<CountedBefore>(cx, mm, device, &KIND, options),
};

/// Over a source that counts after it, as userfaultfd.
pub static LATE: Kind = Kind {
    name: "userptr-cache-late",
    summary: "our registration cache, told late",
    callbacks: consumer::LATE,
    open: |cx, mm, device, options| open::<After>(cx, mm, device, &LATE, options),
    ..KIND
};

fn open<D: Delivery + 'static>(
    cx: &mut MaySleep<'_>,
    mm: &Arc<Mm>,
    device: &Arc<Device>,
    kind: &'static Kind,
    options: Options,
) -> Result<Arc<dyn Driver>, OpenError> {
    let context = Arc::new(DeviceContext::new(cx, device, mm, kind.name));
    let hardware = Hardware::new(context.clone(), false);
    let told = Told::<D>::fed(mm);
    let events = told.events().clone();
    let small =
        cache::Options { entries: 2, threads: 1, reaper: Reaper::Manual, ..cache::Options::default() };
    // Refused for no entries and no bytes alone.
    let cache = RegistrationCache::new(Arc::new(told), hardware.clone(), small).ok();
    let cached = cache.map(|cache| Cached { cache, hardware });
    Ok(Embedded::open(cx, kind, context, Some(events), cached, options)?)
}

struct Cached<D: Delivery + 'static> {
    cache: RegistrationCache<Told<D>, Hardware>,
    hardware: Hardware,
}

fn refused(error: CacheError) -> SubmitError {
    match error {
        CacheError::Device(error) => fault(&error),
        CacheError::Full { .. } => SubmitError::Again,
        _ => SubmitError::Exited,
    }
}

impl<D: Delivery + 'static> Consumer for Cached<D> {
    type Bound = ();

    fn bind(&self, _: Range, _: Access) -> Result<(), BindError> {
        Ok(())
    }

    fn unbind(&self, range: Range, (): &()) -> Result<(), SubmitError> {
        let gone = self.cache.invalidate(range.start() as usize, range.len() as usize);
        gone.map(drop).map_err(refused)
    }

    fn operate(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        access: Access,
        (): &(),
        ops: &[DeviceOp],
    ) -> Result<Result<Vec<u64>, DeviceFault>, SubmitError> {
        self.hardware.asked(range);
        let lease = self.cache.get(range.start() as usize, range.len() as usize, access).map_err(refused)?;
        let request = self.hardware.start(cx, lease.mapping().binding, ops);
        let done = self.hardware.finish(cx, request);
        drop(lease);
        Ok(done)
    }

    fn work(&self) -> bool {
        self.cache.reap().is_ok_and(|gone| gone > 0)
    }
}
