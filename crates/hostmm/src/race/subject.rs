// SPDX-License-Identifier: MIT OR Apache-2.0
//! A whole primary MMU in the races: `read_begin` when a translation is cached, `read_retry` when it is used.

use interleave::MaySleep;
use mmu_notifier::{Range, Subscription};

use super::Subject;
use crate::primary::{HostMm, HostSubscription, LiveWatch, Source};

impl<S: Source> Subject for HostMm<S> {
    type Token = (HostSubscription<S::Watch>, <S::Watch as LiveWatch>::Seq);

    fn take(&self, range: Range) -> Result<Self::Token, String> {
        let sub = self.watch(range).map_err(|e| e.to_string())?;
        let seq = MaySleep::enter(|cx| sub.read_begin(cx)).map_err(|e| e.to_string())?;
        Ok((sub, seq))
    }

    fn is_current(&self, (sub, seq): &Self::Token) -> bool {
        !sub.read_retry(*seq)
    }
}
