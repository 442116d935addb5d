// SPDX-License-Identifier: MIT OR Apache-2.0
//! Address spaces: objects at device addresses, and batches that use them.

use std::fmt;
use std::sync::Arc;

use interleave::MaySleep;
use mmu_notifier::primary::PrimaryMmu;

use super::core::Core;
use super::error::ObjectError;
use super::handle::Object;
use super::submit::Execution;
use crate::device::{Command, Device, DeviceAddr, Engine};

/// An address space of the device. Dropped, it forgets its bindings; batches that were submitted in it run on.
pub struct AddressSpace<M: PrimaryMmu, D: Device<M> + Engine> {
    core: Arc<Core<M, D>>,
    number: u64,
}

impl<M: PrimaryMmu, D: Device<M> + Engine> AddressSpace<M, D> {
    pub(super) fn new(core: Arc<Core<M, D>>) -> AddressSpace<M, D> {
        let number = MaySleep::enter(|cx| {
            let mut books = core.lock(cx);
            let number = books.number();
            books.spaces.insert(number, super::table::Table::default());
            number
        });
        AddressSpace { core, number }
    }

    /// Lets the device reach `object` in this space: with its first page at `at`, or where there is room. Where it has the
    /// object's first byte. An object can be bound in several spaces and several times, and stays bound while its
    /// pages come and go.
    ///
    /// # Errors
    /// [`ObjectError::Address`], [`ObjectError::OtherDevice`].
    pub fn bind(&self, object: &Object<M, D>, at: Option<DeviceAddr>) -> Result<DeviceAddr, ObjectError> {
        let object = object.of(&self.core)?;
        MaySleep::enter(|cx| {
            let mut books = self.core.lock(cx);
            // The handle is borrowed, so it is not closed.
            let Some(entry) = books.objects.get(&object) else { return Err(ObjectError::OtherDevice) };
            let (range, bytes, access) = (entry.range, entry.bytes, entry.access);
            let table = books.spaces.entry(self.number).or_default();
            table.bind(object, range, bytes, access, at).map_err(|why| ObjectError::Address {
                range,
                at,
                why,
            })
        })
    }

    /// Takes the binding away whose object has its first byte at `at`, and waits until the device is through with
    /// what was submitted before and names the object.
    ///
    /// # Errors
    /// [`ObjectError::NothingBound`].
    pub fn unbind(&self, at: DeviceAddr) -> Result<(), ObjectError> {
        MaySleep::enter(|cx| {
            let mut books = self.core.lock(cx);
            let object = books.spaces.get_mut(&self.number).and_then(|table| table.unbind(at));
            drop(books);
            let object = object.ok_or(ObjectError::NothingBound { at })?;
            if self.core.at_home() {
                self.core.wait_idle(cx, object);
            }
            Ok(())
        })
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static> AddressSpace<M, D> {
    /// Executes `commands`, in this space's addresses, on the objects of `list`, which may touch nothing else.
    ///
    /// Gets the objects' pages where it has none or they are the past. Batches that one thread submits are executed in
    /// order; between threads nothing is promised. The list's objects cannot be
    /// looked at until they are idle:
    /// ```compile_fail,E0502
    /// # use userptr::object::{AddressSpace, Object};
    /// # use userptr::device::{Engine, Device};
    /// # use mmu_notifier::PrimaryMmu;
    /// # fn f<M: PrimaryMmu + 'static, D: Device<M> + Engine + 'static>(
    /// #     space: &AddressSpace<M, D>, mut object: Object<M, D>) {
    /// let bytes = object.bytes().unwrap();
    /// let batch = space.execute(&[&object], &[]);
    /// bytes[0] = 1;
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ObjectError`]; nothing is executed then.
    pub fn execute(&self, list: &[&Object<M, D>], commands: &[Command]) -> Result<Execution<D>, ObjectError> {
        let mut numbers = list.iter().map(|object| object.of(&self.core)).collect::<Result<Vec<_>, _>>()?;
        numbers.sort_unstable();
        numbers.dedup();
        MaySleep::enter(|cx| self.core.execute(cx, self.number, &numbers, commands))
    }
}

impl<M: PrimaryMmu, D: Device<M> + Engine> fmt::Debug for AddressSpace<M, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace").field("number", &self.number).finish_non_exhaustive()
    }
}

impl<M: PrimaryMmu, D: Device<M> + Engine> Drop for AddressSpace<M, D> {
    fn drop(&mut self) {
        // Where nobody may sleep, a table of no use stays.
        let _ = MaySleep::try_enter(|cx| self.core.lock(cx).spaces.remove(&self.number));
    }
}
