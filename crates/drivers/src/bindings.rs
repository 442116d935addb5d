// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a driver has bound, by the name that it gave out for it.

use crate::op::Binding;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};

/// A map that names what is put into it. No name is given out twice, whatever is removed or taken meanwhile.
pub(crate) struct Bindings<T> {
    next: u32,
    map: BTreeMap<Binding, T>,
}

impl<T> Default for Bindings<T> {
    fn default() -> Bindings<T> {
        Bindings { next: 0, map: BTreeMap::new() }
    }
}

impl<T> Bindings<T> {
    /// A name for what is put in later.
    pub(crate) fn reserve(&mut self) -> Binding {
        self.next += 1;
        Binding(self.next)
    }

    /// Puts `what` in under a new name.
    pub(crate) fn add(&mut self, what: T) -> Binding {
        let binding = self.reserve();
        self.map.insert(binding, what);
        binding
    }

    /// Takes everything out.
    pub(crate) fn take_all(&mut self) -> BTreeMap<Binding, T> {
        std::mem::take(&mut self.map)
    }
}

impl<T> Deref for Bindings<T> {
    type Target = BTreeMap<Binding, T>;

    fn deref(&self) -> &BTreeMap<Binding, T> {
        &self.map
    }
}

impl<T> DerefMut for Bindings<T> {
    fn deref_mut(&mut self) -> &mut BTreeMap<Binding, T> {
        &mut self.map
    }
}
