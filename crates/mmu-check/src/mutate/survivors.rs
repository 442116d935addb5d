// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why some mutants live: what is known of operations that can be switched off and nothing notices.
//!
//! An entry is a claim that an exploration made good: that the operation is not needed by what is explored. One that
//! explains nothing any more is stale: the mutant is noticed, or there is none.

use super::{Off, source};
use drivers::{Callback, Kind};
use interleave::explore::SiteKind;

/// What an entry is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// An operation of this kind, in a function of a file.
    Site(&'static str, &'static str, SiteKind),
    /// A callback of a driver.
    Callback(&'static str, Callback),
}

/// One explanation.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Of what.
    pub what: What,
    /// Why nothing breaks without it.
    pub why: &'static str,
}

/// All that are known.
pub static SURVIVORS: &[Entry] = &[
    Entry {
        what: What::Site("kvm_v3_16.rs", "zap_page", SiteKind::Bump),
        why: "a fault in flight holds its page, and that keeps it in the swap cache: to lose it, reclaim must come a second \
              time, after the fault and before the next access, which takes two preemptions",
    },
    Entry {
        what: What::Site("design.rs", "install", SiteKind::Retry),
        why: "said twice in this design: what cancels has moved the sequence too, and that is looked at beside it",
    },
    Entry {
        what: What::Site("sequence.rs", "end", SiteKind::Bump),
        why: "said twice in this design: an invalidation that overlaps has cancelled whoever was getting pages",
    },
    Entry {
        what: What::Site("amd_iommu_v2_3_16.rs", "invalidate_range_end", SiteKind::Flush),
        why: "there is nothing to flush: since the start the device has walked an empty page table",
    },
    Entry {
        what: What::Site("i915_v5_13.rs", "unbind_and_unpin", SiteKind::Wait),
        why: "the callback has waited already, and a request that nobody has run finds no translation",
    },
    Entry {
        what: What::Site("i915_v5_13.rs", "submit_init", SiteKind::Retry),
        why: "asked once more, under notifier_lock, before the request is queued; here it saves work",
    },
    Entry {
        what: What::Site("i915_v5_13.rs", "execbuf", SiteKind::Retry),
        why: "pages of another sequence were put there after ours had moved, which the check under notifier_lock sees",
    },
    Entry {
        what: What::Site("cache/register.rs", "build", SiteKind::Retry),
        why: "asked once more when others can find the registration; here it keeps what is the past already from being listed",
    },
    Entry {
        what: What::Site("cache/register.rs", "hit_in_books", SiteKind::Retry),
        why: "what the lookup before it finds out of date is out of use: only a registration that was listed between the \
              two, and changed before its owner asked for the last time, gets here, which takes four preemptions",
    },
    Entry {
        what: What::Site("cache/hit.rs", "doubted", SiteKind::Retry),
        why: "of the two questions, the one that follows changes in order is for registrations that others have listed \
              meanwhile: they are out of date only before their owner asks for the last time, which takes three preemptions",
    },
];

/// Why `off` may survive in `kind`, if anybody knows.
pub fn why(kind: &Kind, off: Off) -> Option<&'static str> {
    let is = |what: What| match (what, off) {
        (What::Site(file, function, of), Off::Site(mutant)) => {
            of == mutant.kind
                && file == source::file_name(mutant.site)
                && source::function(mutant.site) == Some(function)
        }
        (What::Callback(driver, of), Off::Callback(callback)) => of == callback && driver == kind.name,
        _ => false,
    };
    SURVIVORS.iter().find(|entry| is(entry.what)).map(|entry| entry.why)
}
