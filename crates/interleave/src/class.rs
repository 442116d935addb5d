// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lock classes: all locks with one role share one class, and the rules are about classes.

/// The class of a lock. One static per role: `static MMAP_LOCK: LockClass = LockClass::new("mmap_lock");`
#[derive(Debug)]
pub struct LockClass {
    name: &'static str,
}

impl LockClass {
    /// A class called `name`, in the words of the field.
    pub const fn new(name: &'static str) -> LockClass {
        LockClass { name }
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }
}
