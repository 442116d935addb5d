//! scratch
use hostmm::trace::*;
use std::time::Instant;
struct O(u64, u32);
impl Observer for O {
    fn mm_made(&mut self, _: Tgid, at: u64, _: &str, _: std::ops::Range<u64>) {
        if self.0 == 0 {
            self.0 = at;
        }
        self.1 += 1;
    }
    fn mm_shared(&mut self, _: Tgid, _: Tgid, _: u64) {}
    fn unwatched(&mut self, t: Tgid, _: u64, why: &str) {
        eprintln!("unwatched {t} {why}");
    }
    fn mm_ends(&mut self, _: Tgid) {}
    fn gone(&mut self, _: Tgid, _: u64) {}
}
fn main() {
    let n: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    let prog: Vec<std::ffi::OsString> =
        ["sh", "-c", &format!("i=0; while [ $i -lt {n} ]; do /bin/true; i=$((i+1)); done")]
            .iter()
            .map(|s| s.into())
            .collect();
    let (mut a, mut w) = (vec![], vec![]);
    let mut mms = 0;
    let rounds: usize = std::env::args().nth(2).map_or(15, |s| s.parse().unwrap());
    let signals = Signals::block().unwrap();
    for _ in 0..rounds {
        if std::env::args().nth(3).is_none() {
            let t = Instant::now();
            assert!(std::process::Command::new(&prog[0]).args(&prog[1..]).status().unwrap().success());
            a.push(t.elapsed().as_micros());
        }
        let mut o = O(0, 0);
        let e = run(&What::Program(prog.clone()), Options { follow: true }, &signals, &mut o).unwrap();
        assert_eq!(e, Ended::Code(0));
        w.push((now() - o.0) as u128 / 1000);
        mms = o.1;
    }
    a.sort();
    w.sort();
    if a.is_empty() {
        a.push(0);
    }
    println!(
        "alone {} us, watched {} us, {} mms: {} us each (min {})",
        a[a.len() / 2],
        w[w.len() / 2],
        mms,
        (w[w.len() / 2] as i128 - a[a.len() / 2] as i128) / mms as i128,
        (w[0] as i128 - a[0] as i128) / mms as i128
    );
}
