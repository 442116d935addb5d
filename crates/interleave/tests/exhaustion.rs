// SPDX-License-Identifier: MIT OR Apache-2.0
//! More classes than the graph has room for: later ones are unchecked, and that is said once. Alone in its process.

use interleave::lockdep::{self, ReportKind};
use interleave::{LockClass, MaySleep, Mutex};

#[test]
fn classes_beyond_the_room_are_unchecked_and_reported_once() {
    let classes: Vec<&'static LockClass> =
        (0..600).map(|_| &*Box::leak(Box::new(LockClass::new("many")))).collect();
    let locks: Vec<_> = classes.iter().map(|class| Mutex::new(class, ())).collect();
    MaySleep::enter(|cx| {
        for lock in &locks {
            drop(lock.lock(cx));
        }
        let stats = lockdep::stats();
        assert_eq!((stats.classes, stats.unchecked_classes), (511, 89));
        let reports = lockdep::take_reports();
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert_eq!(reports[0].kind, ReportKind::Exhausted);

        let mut invert = |one: &Mutex<()>, two: &Mutex<()>| {
            for (a, b) in [(one, two), (two, one)] {
                let _a = a.lock(cx);
                let _b = b.lock(cx);
            }
            lockdep::take_reports().len()
        };
        assert_eq!(invert(&locks[0], &locks[510]), 1, "the last class with room is checked");
        assert_eq!(invert(&locks[0], &locks[511]), 0);
        assert_eq!(invert(&locks[511], &locks[599]), 0, "unchecked classes are not one class");
    });
}
