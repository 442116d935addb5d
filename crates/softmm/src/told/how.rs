// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a change reaches a subscriber, and what can be wrong with that.

use mmu_notifier::primary::Delivery;

/// When the sequence moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// In the callback, which the change waits for: softmm itself.
    Waits,
    /// At the start of a change, which waits for nobody: kvm.
    InTime,
    /// At its end, before its system call returns: userfaultfd.
    Late,
}

/// What a source can do wrong. An exploration that does not find it has tested nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Nothing is heard: no sequence moves and nobody is called.
    Deaf,
    /// [`When::Waits`]: "nothing has changed" is always the answer, as if nobody asked.
    Unasked,
    /// [`When::InTime`]: the total moves before the bucket, so that an era can stand for a bucket of its past.
    TotalFirst,
    /// [`When::Late`]: the event is read, and its changer let go, before the epoch says so.
    ReadsFirst,
    /// [`When::Late`]: a strict check does not ask whether a change is in flight.
    NoProbe,
}

/// How a source tells. Begin with one of the constants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct How {
    /// When the sequence moves.
    pub when: When,
    /// Are subscribers called, by whoever works for the source? If not, it is as if that thread were never scheduled. A
    /// callback that the change waits for always comes.
    pub calls: bool,
    /// Is what is counted of a range given away ([`count_at`](mmu_notifier::primary::Subscription::count_at))? Live it is
    /// not where that would be many words; then eras are kept. Of [`When::InTime`] alone.
    pub counted: bool,
    /// What is wrong.
    pub fault: Option<Fault>,
}

impl How {
    /// As softmm does.
    pub const WAITS: How = How { when: When::Waits, calls: true, counted: false, fault: None };
    /// As the kvm source, and nobody is called.
    pub const KVM: How = How { when: When::InTime, calls: false, counted: true, fault: None };
    /// As the uffd source, and nobody is called.
    pub const UFFD: How = How { when: When::Late, calls: false, counted: false, fault: None };
    /// The control.
    pub const DEAF: How = How::KVM.uncounted().with(Fault::Deaf);

    /// What the type of the contract promises, with callbacks.
    pub const fn of<D: Delivery>() -> How {
        match (D::BLOCKS, D::COUNTED_BEFORE) {
            (true, _) => How::WAITS,
            (false, true) => How::KVM.calling(),
            (false, false) => How::UFFD.calling(),
        }
    }

    /// Subscribers are called.
    pub const fn calling(self) -> How {
        How { calls: true, ..self }
    }

    /// Eras are kept, not counts.
    pub const fn uncounted(self) -> How {
        How { counted: false, ..self }
    }

    /// With something wrong.
    pub const fn with(self, fault: Fault) -> How {
        How { fault: Some(fault), ..self }
    }

    /// Has it a thread of its own, which reads events and calls?
    pub fn has_monitor(self) -> bool {
        match self.when {
            When::Waits => false,
            When::InTime => self.calls,
            When::Late => true,
        }
    }

    pub(super) fn is(self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }
}
