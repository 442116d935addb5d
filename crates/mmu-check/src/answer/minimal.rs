// SPDX-License-Identifier: MIT OR Apache-2.0
//! The callbacks that a driver cannot do without: each is switched off in turn and stays off if nothing breaks that did
//! not break before, and nothing with fewer preemptions; again, until every one that is left is needed beside the others that are left.
//!
//! What is found is minimal, not the only minimal set, and holds up to the bound on preemptions: a callback that only a
//! longer schedule needs would be left out.

use super::Row;
use crate::oracle::Rule;
use crate::path::Path;
use crate::scenario::explore;
use drivers::{Callback, Callbacks};
use interleave::explore::Strategy;
use softmm::KernelProfile;
use std::collections::HashMap;

/// What was found for one driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Minimal {
    /// All that the driver has.
    pub all: Callbacks,
    /// What is left.
    pub kept: Callbacks,
    /// Why each of them is: a path on which a rule breaks without it.
    pub because: Vec<(Callback, &'static str, Rule)>,
    /// Paths on which a rule breaks although all that is left is there; with all callbacks it breaks too.
    pub lost: Vec<&'static str>,
}

/// A path, and a rule that breaks on it.
type Harm = (&'static Path, Rule);

struct Search<'a> {
    row: Row,
    profile: KernelProfile,
    paths: &'a [&'static Path],
    bound: u32,
    /// What breaks with all callbacks, by path and bound; looked for where something breaks with fewer.
    before: HashMap<(&'static str, u32), Vec<Rule>>,
}

impl Search<'_> {
    /// What breaks on `path` in at most `bound` preemptions.
    fn broken(&self, path: &'static Path, callbacks: Callbacks, bound: u32) -> Vec<Rule> {
        let cell = self.row.cell(path, self.profile).with(callbacks);
        let outcome = explore(&cell, Strategy::Preemptions(bound), None);
        outcome.failures.into_iter().map(|(rule, _)| rule).collect()
    }

    /// What breaks on `path` with all callbacks, in at most `bound` preemptions.
    fn before(&mut self, path: &'static Path, bound: u32) -> Vec<Rule> {
        if let Some(known) = self.before.get(&(path.name, bound)) {
            return known.clone();
        }
        let broken = self.broken(path, self.row.kind.callbacks, bound);
        self.before.insert((path.name, bound), broken.clone());
        broken
    }

    /// The rule that breaks on `path` with `callbacks` and not with all.
    fn harm_on(&mut self, path: &'static Path, callbacks: Callbacks, bound: u32) -> Option<Harm> {
        let now = self.broken(path, callbacks, bound);
        if now.is_empty() {
            return None;
        }
        // A path that is lost already cannot show that a callback is needed, unless by another rule or with fewer
        // preemptions: who hears of an unmapping too late is still better off than who never does.
        let before = self.before(path, bound);
        now.into_iter().find(|rule| !before.contains(rule)).map(|rule| (path, rule))
    }

    /// Does anything break with `callbacks` that does not with all? `first` is looked at first.
    fn harm(&mut self, callbacks: Callbacks, first: Option<&'static Path>) -> Option<Harm> {
        // Without preemptions first, on every path: most of what breaks, breaks there.
        for bound in 0..=self.bound {
            for path in first.into_iter().chain(self.paths.iter().copied()) {
                if let Some(harm) = self.harm_on(path, callbacks, bound) {
                    return Some(harm);
                }
            }
        }
        None
    }
}

/// The smallest set that greed finds for `row` under `profile` on `paths`, with every order of up to `bound`
/// preemptions.
pub fn minimal(row: Row, profile: KernelProfile, paths: &[&'static Path], bound: u32) -> Minimal {
    let mut search = Search { row, profile, paths, bound, before: HashMap::new() };
    let all = row.kind.callbacks;
    let (mut kept, mut because) = (all, Vec::<(Callback, Harm)>::new());
    loop {
        let mut next = kept;
        let last = std::mem::take(&mut because);
        // From the rarest to the commonest, so that what remains is what a driver would hook first.
        for callback in kept.iter().collect::<Vec<_>>().into_iter().rev() {
            let hint = last.iter().find(|(other, _)| *other == callback).map(|(_, (path, _))| *path);
            match search.harm(next.without(callback), hint) {
                Some(harm) => because.push((callback, harm)),
                None => next = next.without(callback),
            }
        }
        if next == kept {
            break;
        }
        kept = next;
    }
    let lost =
        paths.iter().filter(|path| !search.before(path, bound).is_empty()).map(|path| path.name).collect();
    let because = because.into_iter().map(|(callback, (path, rule))| (callback, path.name, rule)).collect();
    Minimal { all, kept, because, lost }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::named;
    use mmu_notifier::Access;

    fn of(kind: &'static drivers::Kind, paths: &[&str]) -> Minimal {
        let paths: Vec<_> = paths.iter().filter_map(|name| named(name)).collect();
        minimal(Row { kind, access: Access::Write }, KernelProfile::V3_16, &paths, 0)
    }

    #[test]
    fn a_driver_that_does_not_pin_needs_to_hear_of_unmapping_and_not_of_change_pte() {
        let found = of(&drivers::kvm_v3_16::KIND, &["dontneed", "cow"]);
        assert!(found.kept.contains(Callback::Start), "{found:?}");
        assert!(!found.kept.contains(Callback::ChangePte), "{found:?}");
        assert!(found.because.iter().any(|(callback, ..)| *callback == Callback::Start));
    }

    #[test]
    fn a_callback_that_comes_too_early_is_needed_all_the_same() {
        let paths: Vec<_> = named("dontneed").into_iter().collect();
        let row = Row { kind: &drivers::i915_v3_16::MENDED, access: Access::Write };
        let found = minimal(row, KernelProfile::V3_16, &paths, 1);
        assert!(found.kept.contains(Callback::Start), "{found:?}");
        assert_eq!(found.lost, ["dontneed"], "the gap between start and change");
    }

    #[test]
    fn where_nothing_changes_nothing_is_needed() {
        let found = of(&drivers::design_exact_start_only::KIND, &["mprotect"]);
        assert!(found.kept.is_empty() && found.lost.is_empty(), "{found:?}");
    }
}
