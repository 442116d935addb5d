// SPDX-License-Identifier: MIT OR Apache-2.0
//! The page that `--report` writes, in a real browser: what its table does when it is clicked and typed at.

use crate::run::{able, run, subject, watch};
use hostmm::testing::skip_for;
use std::path::Path;
use std::process::Command;

/// Clicks and types, and leaves what is then to be seen as the page's text.
const HAND: &str = r##"<script>{
const said = [], head = k => document.querySelector(`#all th[data-k=${k}]`);
const rows = () => [...document.querySelectorAll("#all tbody tr")].map(t => [...t.children].map(c => c.textContent));
const filter = text => { const f = document.querySelector("#filter"); f.value = text; f.dispatchEvent(new Event("input")); };
const number = row => +row[3].replaceAll(",", "");
const falls = a => a.every((x, i) => !i || a[i - 1] >= x);
said.push("count falls " + falls(rows().map(number)));
head("count").click(); said.push("and rises " + falls(rows().map(number).reverse()));
head("name").click(); said.push("names rise " + falls(rows().map(r => r[1]).reverse()));
filter("MPROTECT"); said.push("filtered " + (rows().length > 0 && rows().every(r => r.join().includes("mprotect"))));
filter("no such thing"); said.push("left " + rows().length);
document.body.textContent = said.join(";");
}</script>"##;

#[test]
fn the_table_of_the_page_is_sorted_and_filtered() {
    if !able() {
        return;
    }
    if !Command::new("chromium").arg("--version").output().is_ok_and(|o| o.status.success()) {
        skip_for("chromium", "not installed");
        return;
    }
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page.html");
    let (output, _) = watch(&["--report", file.to_str().unwrap()], &subject("dynamic"), &["mprotect", "5"]);
    assert!(output.status.success());
    let page = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, page + HAND).unwrap();
    let options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"];
    let seen = run(Command::new("chromium").args(options).arg(format!("file://{}", file.display())));
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    let want = "count falls true;and rises true;names rise true;filtered true;left 0";
    assert!(seen.contains(want), "{}", seen.lines().last().unwrap_or_default());
    let _ = std::fs::remove_file(file);
}
