// SPDX-License-Identifier: MIT OR Apache-2.0
//! This source in the races, whole and with half of its protocol.

use mmu_notifier::Range;

use super::{Seq, UffdSource, Watch};
use crate::race::Subject;

/// With the probe: never stale.
#[derive(Clone, Debug)]
pub struct Strict(pub UffdSource);

/// Without the probe: right for what has returned, and so stale when threads reuse each other's addresses. The
/// control of the races.
#[derive(Clone, Debug)]
pub struct Ordered(pub UffdSource);

fn take(source: &UffdSource, range: Range) -> Result<(Watch, Seq), String> {
    let watch = source.watch(range).map_err(|e| e.to_string())?;
    let seq = watch.snapshot().map_err(|e| e.to_string())?;
    Ok((watch, seq))
}

impl Subject for Strict {
    type Token = (Watch, Seq);

    fn take(&self, range: Range) -> Result<Self::Token, String> {
        take(&self.0, range)
    }

    fn is_current(&self, (watch, seq): &Self::Token) -> bool {
        !watch.changed_since_strict(*seq)
    }
}

impl Subject for Ordered {
    type Token = (Watch, Seq);

    fn take(&self, range: Range) -> Result<Self::Token, String> {
        take(&self.0, range)
    }

    fn is_current(&self, (watch, seq): &Self::Token) -> bool {
        !watch.changed_since_ordered(*seq)
    }
}
