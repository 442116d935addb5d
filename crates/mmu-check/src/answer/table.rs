// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table in few letters: what a cell says, and which letter is which rule.

use super::{Answer, Reach};
use crate::oracle::Rule;
use std::fmt;

/// What a cell of the table says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// Not asked: the driver was never in that kernel.
    Elsewhere,
    /// The driver does not take this memory.
    Refused,
    /// The model failed, which is no verdict.
    Odd,
    /// No bound was finished, and nothing was found.
    Unknown,
    /// No rule breaks in any order of so many preemptions, or in any at all; never [`Reach::Nothing`].
    Holds(Reach),
    /// These rules break, the first with so many preemptions.
    Breaks(Vec<Rule>, usize),
}

impl Mark {
    /// What `answer` comes to.
    pub fn of(answer: &Answer) -> Mark {
        if answer.facts.refused.is_some() {
            return Mark::Refused;
        }
        if let Some(least) = answer.broken.iter().map(|(_, failure)| failure.preemptions).min() {
            let mut rules: Vec<Rule> = answer.rules().collect();
            rules.sort();
            return Mark::Breaks(rules, least);
        }
        match answer.reach {
            _ if !answer.odd.is_empty() => Mark::Odd,
            Reach::Nothing => Mark::Unknown,
            reach => Mark::Holds(reach),
        }
    }

    /// The same verdict, whatever the bound?
    fn agrees(&self, other: &Mark) -> bool {
        match (self, other) {
            (Mark::Holds(_), Mark::Holds(_)) => true,
            _ => self == other,
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Mark::Elsewhere => ".".into(),
            Mark::Refused => "-".into(),
            Mark::Odd => "odd".into(),
            Mark::Unknown => "?".into(),
            Mark::Holds(Reach::Preemptions(bound)) => format!("ok{bound}"),
            Mark::Holds(_) => "ok*".into(),
            Mark::Breaks(rules, least) => {
                format!("{}{least}", rules.iter().map(|rule| letter(*rule)).collect::<String>())
            }
        };
        f.pad(&text)
    }
}

/// One row and one path under several profiles: once if all say the same, with the least that was tried.
pub fn across(marks: &[Mark]) -> String {
    match marks {
        [] => String::new(),
        [first, rest @ ..] if rest.iter().all(|mark| mark.agrees(first)) => {
            let reach = marks.iter().filter_map(|mark| match mark {
                Mark::Holds(reach) => Some(*reach),
                _ => None,
            });
            reach.min().map_or_else(|| first.to_string(), |reach| Mark::Holds(reach).to_string())
        }
        _ => marks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
    }
}

/// One letter for each rule.
pub const fn letter(rule: Rule) -> char {
    match rule {
        Rule::Coherence => 'C',
        Rule::WritePermission => 'W',
        Rule::MemorySafety => 'U',
        Rule::Isolation => 'I',
        Rule::Dirty => 'D',
        Rule::Pairing => 'P',
        Rule::Context => 'X',
        Rule::Locks => 'K',
        Rule::Retry => 'R',
        Rule::Lifetime => 'T',
        Rule::Range => 'N',
        Rule::Liveness => 'L',
        Rule::Frames => 'F',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_has_a_letter_of_its_own() {
        let mut letters: Vec<char> = Rule::ALL.into_iter().map(letter).collect();
        letters.sort_unstable();
        letters.dedup();
        assert_eq!(letters.len(), Rule::ALL.len());
    }

    #[test]
    fn profiles_that_agree_are_one_word_and_claim_the_least() {
        let [zero, one, two] = [0, 1, 2].map(|bound| Mark::Holds(Reach::Preemptions(bound)));
        let all = Mark::Holds(Reach::Everything);
        assert_eq!(across(&[two.clone(), one]), "ok1");
        assert_eq!(across(&[all.clone(), two.clone()]), "ok2");
        assert_eq!(across(&[all.clone(), all]), "ok*");
        let breaks = Mark::Breaks(vec![Rule::Coherence, Rule::Isolation], 1);
        assert_eq!(across(&[two, breaks.clone(), Mark::Refused]), "ok2 CI1 -");
        assert_eq!(across(&[breaks.clone(), breaks]), "CI1");
        assert_eq!(across(&[Mark::Unknown, zero]), "? ok0");
    }
}
