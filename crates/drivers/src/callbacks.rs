// SPDX-License-Identifier: MIT OR Apache-2.0
//! The callbacks of a driver by name, and sets of them: so that each can be switched off and the smallest set that keeps
//! a driver safe can be searched for.

use mmu_notifier::Ops;
use std::fmt;

/// One callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Callback {
    /// `invalidate_range_start`.
    Start,
    /// `invalidate_range_end`.
    End,
    /// `invalidate_page`, until 4.13.
    Page,
    /// `change_pte`, until 6.9.
    ChangePte,
    /// `arch_invalidate_secondary_tlbs`, `invalidate_range` before 6.6.
    SecondaryTlbs,
    /// `clear_flush_young`.
    ClearFlushYoung,
    /// `clear_young`.
    ClearYoung,
    /// `test_young`.
    TestYoung,
    /// `release`.
    Release,
    /// `invalidate` of an interval notifier, 5.5 and later.
    Invalidate,
}

impl Callback {
    /// All, in the order of the enum.
    pub const ALL: [Callback; 10] = [
        Callback::Start,
        Callback::End,
        Callback::Page,
        Callback::ChangePte,
        Callback::SecondaryTlbs,
        Callback::ClearFlushYoung,
        Callback::ClearYoung,
        Callback::TestYoung,
        Callback::Release,
        Callback::Invalidate,
    ];

    /// The kernel's name.
    pub const fn name(self) -> &'static str {
        match self {
            Callback::Start => "invalidate_range_start",
            Callback::End => "invalidate_range_end",
            Callback::Page => "invalidate_page",
            Callback::ChangePte => "change_pte",
            Callback::SecondaryTlbs => "arch_invalidate_secondary_tlbs",
            Callback::ClearFlushYoung => "clear_flush_young",
            Callback::ClearYoung => "clear_young",
            Callback::TestYoung => "test_young",
            Callback::Release => "release",
            Callback::Invalidate => "invalidate",
        }
    }

    /// The callback called `name`; `invalidate_range` is the older name of `arch_invalidate_secondary_tlbs`.
    pub fn from_name(name: &str) -> Option<Callback> {
        match name {
            "invalidate_range" => Some(Callback::SecondaryTlbs),
            _ => Callback::ALL.into_iter().find(|callback| callback.name() == name),
        }
    }

    const fn op(self) -> Ops {
        match self {
            Callback::Start => Ops::START,
            Callback::End => Ops::END,
            Callback::Page => Ops::PAGE,
            Callback::ChangePte => Ops::CHANGE_PTE,
            Callback::SecondaryTlbs => Ops::SECONDARY_TLBS,
            Callback::ClearFlushYoung => Ops::CLEAR_FLUSH_YOUNG,
            Callback::ClearYoung => Ops::CLEAR_YOUNG,
            Callback::TestYoung => Ops::TEST_YOUNG,
            Callback::Release => Ops::RELEASE,
            Callback::Invalidate => Ops::NONE,
        }
    }
}

impl fmt::Display for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A set of callbacks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Callbacks(u16);

impl Callbacks {
    /// None: the driver hears nothing.
    pub const NONE: Callbacks = Callbacks(0);
    /// Every one that a driver may have.
    pub const ALL: Callbacks = Callbacks((1 << Callback::ALL.len()) - 1);

    /// Those in `list`.
    pub const fn of(list: &[Callback]) -> Callbacks {
        let mut bits = 0;
        let mut i = 0;
        while i < list.len() {
            bits |= 1 << list[i] as u16;
            i += 1;
        }
        Callbacks(bits)
    }

    /// Is `callback` here?
    pub const fn contains(self, callback: Callback) -> bool {
        self.0 >> callback as u16 & 1 == 1
    }

    /// Without `callback`.
    pub const fn without(self, callback: Callback) -> Callbacks {
        Callbacks(self.0 & !(1 << callback as u16))
    }

    /// Those in both.
    pub const fn intersection(self, other: Callbacks) -> Callbacks {
        Callbacks(self.0 & other.0)
    }

    /// One after another.
    pub fn iter(self) -> impl Iterator<Item = Callback> {
        Callback::ALL.into_iter().filter(move |callback| self.contains(*callback))
    }

    /// How many.
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// None?
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Every subset, the empty one and itself among them, smaller ones first.
    pub fn subsets(self) -> Vec<Callbacks> {
        let mut all: Vec<Callbacks> =
            (0..=Callbacks::ALL.0).map(Callbacks).filter(|s| s.0 & !self.0 == 0).collect();
        all.sort_by_key(|set| (set.len(), set.0));
        all
    }

    /// What is registered: of `ops`, those that are here.
    pub(crate) fn mask(self, ops: Ops) -> Ops {
        self.iter().map(Callback::op).filter(|op| ops.contains(*op)).fold(Ops::NONE, Ops::and)
    }
}

impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.pad("none");
        }
        let names: Vec<_> = self.iter().map(Callback::name).collect();
        f.pad(&names.join(" + "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back() {
        for callback in Callback::ALL {
            assert_eq!(Callback::from_name(callback.name()), Some(callback));
        }
        assert_eq!(Callback::from_name("invalidate_range"), Some(Callback::SecondaryTlbs));
        assert_eq!(Callback::from_name("mmput"), None);
    }

    #[test]
    fn a_mask_keeps_what_is_in_both() {
        let set = Callbacks::ALL.without(Callback::End);
        assert_eq!(set.mask(Ops::START | Ops::END | Ops::RELEASE), Ops::START | Ops::RELEASE);
        let three = Callbacks::of(&[Callback::Start, Callback::End, Callback::Page]);
        let subsets = three.subsets();
        assert_eq!(subsets.len(), 8);
        assert_eq!((subsets[0], subsets[7]), (Callbacks::NONE, three));
        assert!(subsets.is_sorted_by_key(|set| set.len()));
    }
}
