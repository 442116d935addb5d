// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `live` found out: the document that `--json` prints, and the judgement that becomes the exit code.

use serde::{Deserialize, Serialize};

/// What a device finds at its next use of the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Found {
    /// It works on a page that is not the program's any more.
    Stale,
    /// It works on the program's page, or knows that there is none.
    Coherent,
    /// With the page given to the device, the kernel does not make this change.
    Prevented,
    /// Such a device cannot be given this memory.
    NotMappable,
}

/// What is declared of a device before the event: [`Found`], and one that no comparison of bytes can find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Declared {
    /// It can go stale.
    Stale,
    /// It reads what the program reads, but its right to write is gone or its writes are not counted as dirty.
    WriteStale,
    /// It cannot go stale by this.
    Coherent,
    /// The kernel refuses the change, or the pin made it beforehand.
    Prevented,
    /// Such a device cannot be given this memory.
    NotMappable,
}

impl Declared {
    /// What the control must find.
    pub(crate) fn finding(self) -> Found {
        match self {
            Declared::Stale => Found::Stale,
            Declared::WriteStale | Declared::Coherent => Found::Coherent,
            Declared::Prevented => Found::Prevented,
            Declared::NotMappable => Found::NotMappable,
        }
    }
}

/// One device under one source (or under none), as the row's process found it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    /// The device, at its next use.
    pub(crate) found: Found,
    /// What the source did; absent in the control and where nothing happened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) heard: Option<Heard>,
    /// Why the source does not watch this memory, where it refuses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) refused: Option<String>,
}

/// When a source had reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Heard {
    /// At all.
    pub(crate) reported: bool,
    /// When the changing system call had just returned.
    pub(crate) before_return: bool,
    /// When another thread first saw the new bytes; absent where the change cannot be seen by reading.
    pub(crate) before_visible: Option<bool>,
}

/// Both devices under one source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Column {
    /// Must the source hear this event?
    pub(crate) must_hear: bool,
    /// The device that pins.
    pub(crate) pinned: Answer,
    /// The device that does not.
    pub(crate) unpinned: Answer,
}

/// A part, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// The row ran.
    Ran(Part),
    /// It crashed, hung or met an error.
    Failed(String),
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Its name.
    pub(crate) event: String,
    /// The path in the kernel.
    pub(crate) kernel_path: String,
    /// Who makes the change.
    pub(crate) via: String,
    /// Why the devices go stale or do not.
    pub(crate) why: String,
    /// What is declared of the device that pins.
    pub(crate) declared_pinned: Declared,
    /// What is declared of the device that does not.
    pub(crate) declared_unpinned: Declared,
    /// The control: no source; absent if the machine cannot make this event.
    pub(crate) no_notifier: Option<Column>,
    /// userfaultfd; absent if it was not asked for.
    pub(crate) uffd: Option<Column>,
    /// KVM's notifier; absent if it was not asked for.
    pub(crate) kvm: Option<Column>,
    /// Why the machine cannot make this event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) skipped: Option<String>,
    /// What does not hold; empty if all does.
    pub(crate) problems: Vec<String>,
}

impl Row {
    /// Compare what was found with what was declared.
    pub(crate) fn judge(&mut self) {
        let mut problems = Vec::new();
        if let Some(control) = &self.no_notifier {
            for (device, answer, declared) in [
                ("pinned", &control.pinned, self.declared_pinned),
                ("unpinned", &control.unpinned, self.declared_unpinned),
            ] {
                match answer {
                    Answer::Ran(part) if part.found == declared.finding() => {}
                    Answer::Ran(part) => problems.push(format!(
                        "no notifier: the {device} device is {}, declared {}",
                        word(&part.found),
                        word(&declared)
                    )),
                    Answer::Failed(why) => {
                        problems.push(format!("no notifier, {device} device: {why}"));
                    }
                }
            }
        }
        for (name, column) in [("uffd", &self.uffd), ("kvm", &self.kvm)] {
            let Some(column) = column else { continue };
            for (device, answer) in [("pinned", &column.pinned), ("unpinned", &column.unpinned)] {
                problems.extend(
                    complaint(answer, column.must_hear)
                        .map(|what| format!("{name}, {device} device: {what}")),
                );
            }
        }
        self.problems = problems;
    }
}

fn complaint(answer: &Answer, must_hear: bool) -> Option<String> {
    let part = match answer {
        Answer::Ran(part) => part,
        Answer::Failed(why) => return Some(why.clone()),
    };
    if !must_hear || part.refused.is_some() {
        return None;
    }
    if part.found == Found::Stale {
        return Some("stale at the next use".into());
    }
    match part.heard {
        Some(Heard { reported: false, .. }) => Some("not reported".into()),
        _ => None,
    }
}

/// The name that JSON gives a value of one of the enums above.
pub(crate) fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word.replace('_', " "),
        _ => String::new(),
    }
}

/// The whole document.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Kernel release.
    pub(crate) kernel: String,
    /// Version of this program.
    pub(crate) userptr: &'static str,
    /// Does everything hold?
    pub(crate) holds: bool,
    /// What each source can never hear, with the reason.
    pub(crate) cannot_hear: Vec<CannotHear>,
    /// The events.
    pub(crate) rows: Vec<Row>,
    /// Seconds that it took.
    pub(crate) seconds: f64,
}

/// One kind of change that a source never reports.
#[derive(Debug, Serialize)]
pub(crate) struct CannotHear {
    /// `uffd` or `kvm`.
    pub(crate) source: &'static str,
    /// The change.
    pub(crate) what: String,
    /// The reason.
    pub(crate) why: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(found: Found, reported: Option<bool>) -> Answer {
        let heard =
            reported.map(|reported| Heard { reported, before_return: reported, before_visible: None });
        Answer::Ran(Part { found, heard, refused: None })
    }

    fn row(control: Found, kvm: Answer) -> Row {
        let column = |must_hear, pinned: Answer| Column { must_hear, unpinned: pinned.clone(), pinned };
        let mut row = Row {
            event: "munmap/raw".into(),
            kernel_path: String::new(),
            via: String::new(),
            why: String::new(),
            declared_pinned: Declared::Stale,
            declared_unpinned: Declared::Stale,
            no_notifier: Some(column(false, ran(control, None))),
            uffd: None,
            kvm: Some(column(true, kvm)),
            skipped: None,
            problems: Vec::new(),
        };
        row.judge();
        row
    }

    #[test]
    fn a_row_holds_if_the_control_is_stale_as_declared_and_the_source_is_not() {
        assert!(row(Found::Stale, ran(Found::Coherent, Some(true))).problems.is_empty());
    }

    #[test]
    fn each_way_to_fail_is_seen() {
        let coherent = || ran(Found::Coherent, Some(true));
        assert_eq!(row(Found::Coherent, coherent()).problems.len(), 2, "a control without teeth");
        assert_eq!(row(Found::Stale, ran(Found::Stale, Some(true))).problems.len(), 2, "a stale device");
        assert_eq!(row(Found::Stale, ran(Found::Coherent, Some(false))).problems.len(), 2, "a deaf source");
        assert_eq!(row(Found::Stale, Answer::Failed("hang".into())).problems.len(), 2, "a hang");
    }

    #[test]
    fn json_round_trips() {
        let row = row(Found::Stale, ran(Found::Coherent, Some(true)));
        let text = serde_json::to_string(&row).unwrap();
        assert_eq!(serde_json::from_str::<Row>(&text).unwrap(), row);
        assert!(text.contains("\"event\":\"munmap/raw\""));
    }
}
